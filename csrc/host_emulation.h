// Runs the kernels of this folder on a CPU, for tests: types, barriers and warp instructions as a kernel sees them. The
// threads behind them are in host_emulation.cpp. A missing barrier shows in the results, as threads take turns in
// random orders, and to ThreadSanitizer, where a kernel is compiled for it: threads know of each other's accesses by
// __syncthreads and __syncwarp alone. A warp also meets at every shuffle, ldmatrix and mma; these order no memory.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

// ThreadSanitizer does not see what a function does with the emulation's own memory, or with registers, if it is UNSEEN;
// what is inlined there has to be ALWAYS_INLINE.
#define UNSEEN __attribute__((no_sanitize("thread")))
#define ALWAYS_INLINE inline __attribute__((always_inline))

using std::max, std::min;
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

// ---- half-precision types: round to nearest, ties to even -----------------------------------------------------------
namespace emulation {
template <typename To, typename From> ALWAYS_INLINE To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
}  // namespace emulation

struct __nv_bfloat16 {
    uint16_t bits;
};
struct __half {
    uint16_t bits;
};

ALWAYS_INLINE float __bfloat162float(__nv_bfloat16 v) { return emulation::bits<float>(uint32_t(v.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
    const uint32_t u = emulation::bits<uint32_t>(v);
    return {v != v ? uint16_t(0x7fff) : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
ALWAYS_INLINE float __half2float(__half v) {
    const uint32_t magnitude = v.bits & 0x7fff, sign = uint32_t(v.bits & 0x8000) << 16;
    if (magnitude >= 0x7c00) return emulation::bits<float>(sign | 0x7f800000 | magnitude << 13);
    return emulation::bits<float>(sign | emulation::bits<uint32_t>(emulation::bits<float>(magnitude << 13) * 0x1p112f));
}
inline __half __float2half_rn(float v) {
    const uint32_t u = emulation::bits<uint32_t>(v), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
    if (magnitude > 0x7f800000) return {0x7fff};
    if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds beyond 65504
    if (magnitude < 0x38800000)  // subnormal: adding 0.5 puts the last half-precision bit at float's last
        return {uint16_t(sign | (emulation::bits<uint32_t>(emulation::bits<float>(magnitude) + 0.5f) - 0x3f000000))};
    return {uint16_t(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13)};
}

// ---- threads --------------------------------------------------------------------------------------------------------
namespace emulation {
// kernel(arguments) by every thread of every block of the grid. A block is 32 to 1024 threads, in whole warps.
void run_grid(dim3 grid, unsigned threads, size_t shared_bytes, void (*kernel)(void*), void* arguments);
template <typename Kernel> void launch(dim3 grid, unsigned threads, size_t shared_bytes, Kernel kernel) {
    run_grid(grid, threads, shared_bytes, [](void* call) { (*static_cast<Kernel*>(call))(); }, &kernel);
}

unsigned char* shared_memory();  // filled with NaN bytes before each block; ends at an unmapped page

// Tests may ask for a barrier to be left out, by its place in the sources.
void synchronize_block(const char* file, int line);
void synchronize_warp(const char* file, int line);

// What a lane shows to its warp.
struct alignas(32) Slot {
    unsigned char bytes[32];
};
Slot* next_slot();
const Slot* meet(const Slot* mine);  // where lane 0's is, once all lanes have shown theirs

template <typename V> UNSEEN const Slot* exchange(const V& mine) {
    static_assert(sizeof(V) <= sizeof(Slot), "");
    Slot* const slot = next_slot();
    *reinterpret_cast<V*>(slot) = mine;
    return meet(slot);
}
template <typename V> UNSEEN ALWAYS_INLINE V shown(const Slot* slots, unsigned lane) {
    return *reinterpret_cast<const V*>(slots + lane);
}
}  // namespace emulation

#define __syncthreads() emulation::synchronize_block(__FILE__, __LINE__)
#define __syncwarp(...) emulation::synchronize_warp(__FILE__, __LINE__)
template <typename V> V __shfl_sync(unsigned, V v, int lane) {
    return emulation::shown<V>(emulation::exchange(v), lane & 31);
}
template <typename V> V __shfl_xor_sync(unsigned, V v, int mask) {
    return emulation::shown<V>(emulation::exchange(v), (threadIdx.x & 31) ^ mask);
}

// ---- warp instructions ----------------------------------------------------------------------------------------------
namespace emulation {
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, bool transposed) {
    const auto* rows = exchange(row);
    const unsigned lane = threadIdx.x % 32;
    for (unsigned i = 0; i < 4; ++i) {
        uint16_t pair[2];
        for (unsigned j = 0; j < 2; ++j) {
            const unsigned from = transposed ? lane % 4 * 2 + j : lane / 4,
                           at = transposed ? lane / 4 : lane % 4 * 2 + j;
            const auto* source = shown<const uint16_t*>(rows, 8 * i + from);
            if (bits<uintptr_t>(source) % 16 != 0)
                throw std::runtime_error("emulation: ldmatrix needs 16-byte alignment");
            pair[j] = source[at];
        }
        r[i] = uint32_t(pair[1]) << 16 | pair[0];
    }
}

ALWAYS_INLINE float widened(uint16_t v, __half) { return __half2float({v}); }
ALWAYS_INLINE float widened(uint16_t v, __nv_bfloat16) { return __bfloat162float({v}); }

template <typename T>
UNSEEN void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct Fragments {
        uint32_t a[4], b[2];
    };
    const auto* set = exchange(Fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}});
    const unsigned lane = threadIdx.x % 32, row = lane / 4, col = lane % 4 * 2;
    // Element i is at (row + 8 * (i / 2), col + i % 2); four lanes hold a row of A or a column of B between them.
    for (unsigned i = 0; i < 4; ++i)
        for (unsigned k = 0; k < 16; ++k) {
            const auto from_a = shown<Fragments>(set, row * 4 + k % 8 / 2);
            const auto from_b = shown<Fragments>(set, (col + i % 2) * 4 + k % 8 / 2);
            const uint32_t pair_a = from_a.a[i / 2 + k / 8 * 2], pair_b = from_b.b[k / 8];
            c[i] += widened(uint16_t(pair_a >> k % 2 * 16), T{}) * widened(uint16_t(pair_b >> k % 2 * 16), T{});
        }
}
}  // namespace emulation
