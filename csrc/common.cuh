// What every kernel here is made of: element types, 16-byte accesses, Philox, shared-memory tiles, launches. Compiles
// with nvcc, and as plain C++ on host_emulation.h, where the same kernels run on a CPU.
#pragma once
#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>
#include <string>
// The one way to launch: LAUNCH(kernel, dim3 grid, threads, bytes of SHARED_MEMORY, stream, arguments...).
#define SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]
#define LAUNCH(kernel, grid, threads, shared_bytes, stream, ...)                                 \
    do {                                                                                         \
        peft::allow_shared(reinterpret_cast<const void*>(&kernel), shared_bytes);                \
        kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__); \
        peft::check(cudaGetLastError());                                                         \
    } while (0)
#else
#include "host_emulation.h"
#define SHARED_MEMORY(name) unsigned char* const name = emulation::shared_memory()
#define LAUNCH(kernel, grid, threads, shared_bytes, stream, ...) \
    emulation::launch(grid, threads, shared_bytes, [&] { kernel(__VA_ARGS__); })
#endif

namespace peft {

#ifdef __CUDACC__
inline void check(cudaError_t status) {
    if (status != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
}
// More than 48 KiB of dynamic shared memory has to be asked for.
inline void allow_shared(const void* kernel, size_t bytes) {
    if (bytes > 48 * 1024)
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
}
#endif

constexpr int kThreads = 256;  // of a block

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- elements -------------------------------------------------------------------------------------------------------
__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T> __device__ __forceinline__ T from_float(float v);
template <> __device__ __forceinline__ float from_float(float v) { return v; }
template <> __device__ __forceinline__ __half from_float(float v) { return __float2half_rn(v); }
template <> __device__ __forceinline__ __nv_bfloat16 from_float(float v) { return __float2bfloat16_rn(v); }

// A row-major matrix with unit column stride.
struct Matrix {
    const void* data;
    int64_t stride;
    bool is_float;  // float32 elements, whatever the kernel's T: master weights
    bool aligned;   // 8 columns from a multiple of 8 on may be accessed 16 bytes at a time
};

// Are they, where blocks of columns begin `block_columns` apart (0 if there is only one block)?
__host__ __device__ inline bool aligned16(const void* data, int64_t stride, int64_t block_columns,
                                          int element_bytes) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * element_bytes % 16 == 0 &&
           block_columns * element_bytes % 16 == 0;
}

template <typename T> __device__ __forceinline__ float load_float(const void* data, int64_t index, bool is_float) {
    return is_float ? static_cast<const float*>(data)[index] : to_float(static_cast<const T*>(data)[index]);
}

// A pointer that was itself read from memory may lead anywhere, shared memory included, as far as the compiler knows.
// This one leads to global memory: accesses are LDG and STG.
template <typename T> __device__ __forceinline__ T* global_memory(T* p) {
#ifdef __CUDACC__
    __builtin_assume(__isGlobal(p));
#endif
    return p;
}

// Eight neighbouring columns: one 16-byte access for a 2-byte type, two for float, and one Philox draw.
template <typename T> struct alignas(16) Oct {
    T v[8];
};

template <typename T> __device__ __forceinline__ Oct<T> load_oct(const T* p, int count, bool aligned) {
    Oct<T> oct;
    if (aligned && count >= 8) {
#pragma unroll
        for (int i = 0; i < int(sizeof(oct) / 16); ++i)
            reinterpret_cast<uint4*>(&oct)[i] = reinterpret_cast<const uint4*>(p)[i];
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) oct.v[i] = i < count ? p[i] : from_float<T>(0.f);
    }
    return oct;
}

template <typename T> __device__ __forceinline__ void store_oct(T* p, const Oct<T>& oct, int count, bool aligned) {
    if (aligned && count >= 8) {
#pragma unroll
        for (int i = 0; i < int(sizeof(oct) / 16); ++i)
            reinterpret_cast<uint4*>(p)[i] = reinterpret_cast<const uint4*>(&oct)[i];
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (i < count) p[i] = oct.v[i];
    }
}

// ---- dropout --------------------------------------------------------------------------------------------------------
// Philox-4x32 (Salmon et al., doi 10.1145/2063384.2063405); key = seed, counter = (row, column / 8, offset). Why so few
// rounds: triton_kernels/config.py.
constexpr int kPhiloxRounds = PEFT_KERNELS_PHILOX_ROUNDS;

struct Dropout {
    const int64_t* rng;  // (seed, offset) in device memory; null: no dropout
    uint32_t threshold;  // keep where a 16-bit draw is >= threshold
    float inverse_keep;
};

inline Dropout make_dropout(const int64_t* rng, float p) {
    const uint32_t threshold = p * 65536.f + 0.5f < 65535.f ? static_cast<uint32_t>(p * 65536.f + 0.5f) : 65535u;
    return {rng, threshold, 1.f / (1.f - p)};
}

// One bit for each of the columns 8 * group ... 8 * group + 7: is it kept?
__device__ __forceinline__ uint32_t keep_group(const Dropout& dropout, uint32_t row, uint32_t group) {
    const uint64_t seed = dropout.rng[0], offset = dropout.rng[1];
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    uint32_t c0 = row, c1 = group, c2 = uint32_t(offset), c3 = uint32_t(offset >> 32);
#pragma unroll
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
        c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
        c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
        c1 = uint32_t(p1);
        c3 = uint32_t(p0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    const uint32_t words[4] = {c0, c1, c2, c3};
    uint32_t keep = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i)
        keep |= uint32_t((words[i] & 0xffffu) >= dropout.threshold) << (2 * i) |
                uint32_t((words[i] >> 16) >= dropout.threshold) << (2 * i + 1);
    return keep;
}

// The same for any eight neighbouring columns (a block of columns need not start at a multiple of 8).
__device__ __forceinline__ uint32_t keep_oct(const Dropout& dropout, uint32_t row, int64_t column) {
    uint32_t keep = keep_group(dropout, row, uint32_t(column / 8));
    if (column % 8 != 0) keep = (keep | keep_group(dropout, row, uint32_t(column / 8 + 1)) << 8) >> (column % 8);
    return keep & 0xffu;
}

__device__ __forceinline__ float dropped(const Dropout& dropout, float v, uint32_t row, int64_t column) {
    return keep_group(dropout, row, uint32_t(column / 8)) >> (column % 8) & 1 ? v * dropout.inverse_keep : 0.f;
}

// ---- tiles ----------------------------------------------------------------------------------------------------------
// ROWS x COLS elements on their way from global memory (load, into registers) to shared memory (store): loading the
// next tile before computing on the present one hides the latency. Rows of a shared tile are an odd number of 16-byte
// units apart, which keeps ldmatrix free of bank conflicts. Whatever lies outside the matrix is zero.
template <typename T, int ROWS, int COLS> struct Tile {
    static constexpr int kStride = COLS + 16 / int(sizeof(T)), kElements = ROWS * kStride;
    static constexpr int kPerRow = COLS / 8, kRowStep = kThreads / kPerRow, kOcts = ROWS / kRowStep;
    static_assert(kOcts * kRowStep == ROWS && kRowStep * kPerRow == kThreads,
                  "a thread has whole octs, all in the same columns");
    Oct<T> octs[kOcts];

    static __device__ __forceinline__ int row_of(int i) { return int(threadIdx.x) / kPerRow + i * kRowStep; }
    static __device__ __forceinline__ int col() { return int(threadIdx.x) % kPerRow * 8; }

    // Reads `rows` x `cols` elements from (row0, col0) on. MIXED: the matrix may be float32 while Stored, the type of
    // all other matrices, is not.
    template <bool MIXED = false, typename Stored = T>
    __device__ __forceinline__ void load(const Matrix& m, int row0, int rows, int64_t col0, int cols) {
        if constexpr (MIXED && sizeof(Stored) != 4)
            if (m.is_float) return load_as(static_cast<const float*>(m.data), m, row0, rows, col0, cols);
        load_as(static_cast<const Stored*>(m.data), m, row0, rows, col0, cols);
    }

    template <typename From>
    __device__ __forceinline__ void load_as(const From* p, const Matrix& m, int row0, int rows, int64_t col0,
                                            int cols) {
        p += int64_t(row0 + row_of(0)) * m.stride + col0 + col();
#pragma unroll
        for (int i = 0; i < kOcts; ++i, p += kRowStep * m.stride) {
            const Oct<From> oct = load_oct(p, row_of(i) < rows ? cols - col() : 0, m.aligned);
            if constexpr (std::is_same_v<From, T>) octs[i] = oct;
            else
#pragma unroll
                for (int j = 0; j < 8; ++j) octs[i].v[j] = from_float<T>(to_float(oct.v[j]));
        }
    }

    // The rows that lie at some places of a list of row numbers: those of this thread's octs, -1 beyond the last.
    struct Rows {
        int at[kOcts];
        __device__ __forceinline__ void find(const int64_t* list, int count) {
#pragma unroll
            for (int i = 0; i < kOcts; ++i) at[i] = row_of(i) < count ? int(list[row_of(i)]) : -1;
        }
    };

    __device__ __forceinline__ void gather(const Matrix& m, const Rows& rows, int64_t col0, int cols) {
#pragma unroll
        for (int i = 0; i < kOcts; ++i)
            octs[i] = load_oct(static_cast<const T*>(m.data) + max(rows.at[i], 0) * m.stride + col0 + col(),
                               rows.at[i] < 0 ? 0 : cols - col(), m.aligned);
    }

    __device__ __forceinline__ void scatter(T* data, int64_t stride, bool aligned, const Rows& rows, int64_t col0,
                                            int cols) const {
        data += col0 + col();
#pragma unroll
        for (int i = 0; i < kOcts; ++i)
            if (rows.at[i] >= 0) store_oct(data + rows.at[i] * stride, octs[i], cols - col(), aligned);
    }

    // The keep bits of this thread's elements, 8 for each group.
    static __device__ __forceinline__ uint32_t draw(const Dropout& dropout, int row0, int64_t col0) {
        static_assert(kOcts <= 4, "");
        uint32_t keep = 0;
#pragma unroll
        for (int i = 0; i < kOcts; ++i) keep |= keep_oct(dropout, row0 + row_of(i), col0 + col()) << (8 * i);
        return keep;
    }

    __device__ __forceinline__ void drop(uint32_t keep, float inverse_keep) {
#pragma unroll
        for (int i = 0; i < kOcts; ++i)
#pragma unroll
            for (int j = 0; j < 8; ++j)
                octs[i].v[j] = from_float<T>(keep >> (8 * i + j) & 1 ? to_float(octs[i].v[j]) * inverse_keep : 0.f);
    }

    __device__ __forceinline__ void store(T* shared) const {
#pragma unroll
        for (int i = 0; i < kOcts; ++i) store_oct(shared + row_of(i) * kStride + col(), octs[i], 8, true);
    }

    // Straight from global to shared memory, at most four octs of a thread at a time.
    template <bool MIXED>
    static __device__ __forceinline__ void copy(T* shared, const Matrix& m, int row0, int rows, int64_t col0,
                                                int cols) {
        constexpr int kPart = kOcts > 4 ? 4 * kRowStep : ROWS;
#pragma unroll 1
        for (int first = 0; first < ROWS; first += kPart) {
            Tile<T, kPart, COLS> part;
            part.template load<MIXED>(m, row0 + first, rows - first, col0, cols);
            part.store(shared + first * kStride);
        }
    }

    __device__ __forceinline__ void fetch(const T* shared) {
#pragma unroll
        for (int i = 0; i < kOcts; ++i) octs[i] = load_oct(shared + row_of(i) * kStride + col(), 8, true);
    }

    __device__ __forceinline__ void write(T* data, int64_t stride, bool aligned, int row0, int rows, int64_t col0,
                                          int cols) const {
        data += int64_t(row0 + row_of(0)) * stride + col0 + col();
#pragma unroll
        for (int i = 0; i < kOcts; ++i, data += kRowStep * stride)
            if (row_of(i) < rows) store_oct(data, octs[i], cols - col(), aligned);
    }
};

}  // namespace peft
