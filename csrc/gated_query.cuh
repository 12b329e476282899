// What the kernels of the gated query transformation share. A warp takes 256 columns of one row at a time, eight for
// each lane, and a block's warps take different rows.
#pragma once
#include "gated_query.h"
#include "lowrank_linear.cuh"

namespace peft {

constexpr int kWidth = kGatedQueryColumns;
static_assert(kWidth == 32 * 8 && kGatedQueryRows == kThreads / 32, "a lane has eight columns, a warp a row");

__device__ __forceinline__ int warp() { return int(threadIdx.x) / 32; }
__device__ __forceinline__ int warps() { return int(blockDim.x) / 32; }
__device__ __forceinline__ int lane() { return int(threadIdx.x) % 32; }

// ---- eight columns, as floats ---------------------------------------------------------------------------------------
using Octet = Oct<float>;

template <typename T> __device__ __forceinline__ Octet load(const Matrix& m, int64_t row, int64_t col, int64_t cols) {
    const int count = int(min(cols - col, int64_t(8)));
    if constexpr (sizeof(T) != 4)
        if (m.is_float) return load_oct(static_cast<const float*>(m.data) + row * m.stride + col, count, m.aligned);
    const Oct<T> oct = load_oct(static_cast<const T*>(m.data) + row * m.stride + col, count, m.aligned);
    Octet floats;
#pragma unroll
    for (int j = 0; j < 8; ++j) floats.v[j] = to_float(oct.v[j]);
    return floats;
}

// Into a matrix without gaps. 16 bytes at once are said outright: of a plain store nvcc 13.0 makes four here for sm_80 and
// sm_90.
__device__ __forceinline__ void store16(void* p, const uint4& v) {
#ifdef __CUDACC__
    __stwb(static_cast<uint4*>(p), v);
#else
    *static_cast<uint4*>(p) = v;
#endif
}
template <typename T>
__device__ __forceinline__ void store(void* data, const Octet& floats, int64_t row, int64_t col, int64_t cols) {
    T* const p = static_cast<T*>(data) + row * cols + col;
    Oct<T> oct;
#pragma unroll
    for (int j = 0; j < 8; ++j) oct.v[j] = from_float<T>(floats.v[j]);
    if (cols - col >= 8 && aligned16(data, cols, 0, sizeof(T))) {
#pragma unroll
        for (int i = 0; i < int(sizeof(oct) / 16); ++i)
            store16(reinterpret_cast<uint4*>(p) + i, reinterpret_cast<const uint4*>(&oct)[i]);
    } else {
        store_oct(p, oct, int(min(cols - col, int64_t(8))), false);
    }
}

// f(j) for each of the eight columns.
template <typename F> __device__ __forceinline__ void each(F&& f) {
#pragma unroll
    for (int j = 0; j < 8; ++j) f(j);
}

// ---- sums of a block; `memory` holds kWidth floats for each warp ----------------------------------------------------
// Of what the warps have for the same eight columns: every thread gets the total.
__device__ __forceinline__ void add_rows(Octet& sum, float* memory) {
    __syncthreads();
    reinterpret_cast<Octet*>(memory)[threadIdx.x] = sum;
    __syncthreads();
    sum = reinterpret_cast<const Octet*>(memory)[lane()];
    for (int w = 1; w < warps(); ++w) {
        const Octet other = reinterpret_cast<const Octet*>(memory)[w * 32 + lane()];
        each([&](int j) { sum.v[j] += other.v[j]; });
    }
}

__device__ __forceinline__ float add_lanes(float v) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) v += __shfl_xor_sync(~0u, v, mask);
    return v;
}

// Of one number of each thread, by f(a, b).
template <typename F> __device__ __forceinline__ float combine(float v, float* memory, F&& f) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) v = f(v, __shfl_xor_sync(~0u, v, mask));
    __syncthreads();
    if (lane() == 0) memory[warp()] = v;
    __syncthreads();
    v = memory[0];
    for (int w = 1; w < warps(); ++w) v = f(v, memory[w]);
    return v;
}

// ---- arguments ------------------------------------------------------------------------------------------------------
struct Inputs {
    Matrix dy, hidden, text, cross, gamma, beta, cross_gamma, cross_beta;
};

template <typename T> Inputs inputs(const GatedQuery& p) {
    return {activation<T>(p.dy, p.dy_stride, 0),
            activation<T>(p.hidden, p.hidden_stride, 0),
            activation<T>(p.text, p.text_stride, 0),
            activation<T>(p.cross, p.cross_stride, 0),
            factor<T>(p.gamma, 0, p.gamma_float),
            factor<T>(p.beta, 0, p.beta_float),
            factor<T>(p.cross_gamma, 0, p.cross_gamma_float),
            factor<T>(p.cross_beta, 0, p.cross_beta_float)};
}

// One launch adds the partial sums of every vector's gradient, in order.
void finish_gated_query(const GatedQuery& p, void* stream);

}  // namespace peft
