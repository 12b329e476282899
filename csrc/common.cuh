// What every kernel here is made of: element types, 16-byte accesses, Philox, shared-memory tiles, tensor-core
// products, launches. Compiles with nvcc, and as plain C++ on host_emulation.h, where the same kernels run on a CPU.
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
inline bool aligned16(const void* data, int64_t stride, int64_t block_columns, int element_bytes) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * element_bytes % 16 == 0 &&
           block_columns * element_bytes % 16 == 0;
}

template <typename T> __device__ __forceinline__ float load_float(const void* data, int64_t index, bool is_float) {
    return is_float ? static_cast<const float*>(data)[index] : to_float(static_cast<const T*>(data)[index]);
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
// Philox-4x32-10 (Salmon et al., doi 10.1145/2063384.2063405); key = seed, counter = (row, column / 8, offset).
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
    for (int round = 0; round < 10; ++round) {
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

// ---- products -------------------------------------------------------------------------------------------------------
// Of each 16 x 8 piece of a product, lane l of a warp holds four elements: rows l / 4 and l / 4 + 8, columns 2 (l % 4)
// and 2 (l % 4) + 1, row by row.
__device__ __forceinline__ int lane_row() { return int(threadIdx.x) % 32 / 4; }
__device__ __forceinline__ int lane_col() { return int(threadIdx.x) % 4 * 2; }

// f(value, row, column) for every element of a warp's product that this lane holds.
template <int N, typename F> __device__ __forceinline__ void for_each_element(const float (&c)[N][4], int n, F&& f) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
        if (j >= n) break;
#pragma unroll
        for (int i = 0; i < 4; ++i) f(c[j][i], lane_row() + i / 2 * 8, j * 8 + lane_col() + i % 2);
    }
}

// The tensor-core instruction mma.m16n8k16 and the loads that feed it (PTX ISA 9.7.14.5.8 and 9.7.14.5.15).
template <typename T> struct Mma {
    // Four 8 x 8 matrices, lanes 0-7 giving the row addresses of the first, and so on; each transposed, if asked for.
    template <bool TRANSPOSED> static __device__ __forceinline__ void load(uint32_t (&r)[4], const T* row) {
#ifdef __CUDACC__
        const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
        if constexpr (TRANSPOSED)
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                         : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                         : "r"(address)
                         : "memory");
        else
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                         : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                         : "r"(address)
                         : "memory");
#else
        emulation::ldmatrix_x4(r, row, TRANSPOSED);
#endif
    }
    static __device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef __CUDACC__
        if constexpr (std::is_same_v<T, __half>)
            asm volatile(
                "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                "{%0,%1,%2,%3};"
                : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
        else
            asm volatile(
                "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                "{%0,%1,%2,%3};"
                : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
        emulation::mma_m16n8k16<T>(c, a, b0, b1);
#endif
    }
};

// Two neighbouring floats in shared memory, read at once.
struct alignas(8) Pair {
    float v[2];
};
__device__ __forceinline__ Pair pair_at(const float* p) { return *reinterpret_cast<const Pair*>(p); }

// Elements k and k + 1 of row m, in a matrix that lies as [m][k], or as [k][m] if TRANSPOSED.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_pair(float (&pair)[2], const float* matrix, int stride, int m, int k) {
    if (TRANSPOSED) {
        pair[0] = matrix[k * stride + m], pair[1] = matrix[(k + 1) * stride + m];
    } else {
        const Pair both = pair_at(matrix + m * stride + k);
        pair[0] = both.v[0], pair[1] = both.v[1];
    }
}

// C (16 x 8n) += A (16 x k) B (k x 8n) by one warp, both operands in shared memory. A lies as [m][k], or as [k][m] if
// TRANSPOSE_A; B lies as [n][k], or as [k][n] if TRANSPOSE_B. k is a multiple of 16, n even and at most N. float stays
// float: no tf32.
template <bool TRANSPOSE_A, bool TRANSPOSE_B, typename T, int N>
__device__ __forceinline__ void multiply(float (&c)[N][4], const T* a, int stride_a, const T* b, int stride_b, int k,
                                         int n) {
    if constexpr (sizeof(T) == 4) {
        const int row = lane_row(), col = lane_col();
#pragma unroll 1
        for (int i = 0; i < k; i += 2) {  // two steps at once: all that is adjacent in memory is read as pairs
            float a0[2], a1[2];
            load_pair<TRANSPOSE_A>(a0, a, stride_a, row, i);
            load_pair<TRANSPOSE_A>(a1, a, stride_a, row + 8, i);
#pragma unroll
            for (int j = 0; j < N; ++j) {
                if (j >= n) break;
                float b0[2], b1[2];
                if (TRANSPOSE_B) {
                    const Pair first = pair_at(b + i * stride_b + j * 8 + col);
                    const Pair second = pair_at(b + (i + 1) * stride_b + j * 8 + col);
                    b0[0] = first.v[0], b1[0] = first.v[1], b0[1] = second.v[0], b1[1] = second.v[1];
                } else {
                    load_pair<false>(b0, b, stride_b, j * 8 + col, i);
                    load_pair<false>(b1, b, stride_b, j * 8 + col + 1, i);
                }
#pragma unroll
                for (int step = 0; step < 2; ++step) {
                    c[j][0] += a0[step] * b0[step];
                    c[j][1] += a0[step] * b1[step];
                    c[j][2] += a1[step] * b0[step];
                    c[j][3] += a1[step] * b1[step];
                }
            }
        }
    } else {
        // The 8 x 8 quarters of a 16 x 16 square, in the order the instruction wants them: down first, or across first.
        const int lane = int(threadIdx.x) % 32, inner = lane % 8 + (lane & 8), outer = lane / 16 * 8;
        const int swapped = lane % 8 + outer, across = lane & 8;
        a += TRANSPOSE_A ? swapped * stride_a + across : inner * stride_a + outer;
        b += TRANSPOSE_B ? inner * stride_b + outer : swapped * stride_b + across;
#pragma unroll 1
        for (int i = 0; i < k; i += 16) {
            uint32_t fragment_a[4];
            Mma<T>::template load<TRANSPOSE_A>(fragment_a, a + i * (TRANSPOSE_A ? stride_a : 1));
#pragma unroll
            for (int j = 0; j < N; j += 2) {
                if (j >= n) break;
                uint32_t fragment_b[4];
                Mma<T>::template load<TRANSPOSE_B>(
                    fragment_b, b + i * (TRANSPOSE_B ? stride_b : 1) + j * 8 * (TRANSPOSE_B ? 1 : stride_b));
                Mma<T>::multiply(c[j], fragment_a, fragment_b[0], fragment_b[1]);
                Mma<T>::multiply(c[j + 1], fragment_a, fragment_b[2], fragment_b[3]);
            }
        }
    }
}

}  // namespace peft
