// What the forward and backward kernels of the low-rank linear share, with each other and with the other operations.
#pragma once
#include "lowrank_linear.h"
#include "multiply.cuh"

namespace peft {

constexpr int kCols = kLowRankLinearColumns, kRows = kLowRankLinearRows, kMixRows = 16;

// Products run over whole pairs of 8-column pieces; the ranks beyond R are zeros.
__host__ __device__ constexpr int rank_pieces(int rank) { return (rank + 15) / 16 * 2; }

// One of `strips` nearly equal runs of whole row tiles.
struct Strip {
    int first, last;
    __device__ __forceinline__ Strip(int rows, int strip, int strips) {
        const int64_t tiles = ceil_div(rows, kRows);
        first = int(tiles * strip / strips) * kRows;
        last = int(tiles * (strip + 1) / strips) * kRows;
    }
};

// sum_b in_b core[., .], for four rows of `in` (float, `stride` apart) and one output column (block, r): the core's
// product of the forward (z -> S), or TRANSPOSED, of the backward (dS -> dz).
template <typename T, bool TRANSPOSED> __device__ __forceinline__ void apply_core(float (&acc)[4], const float* in,
                                                                                  int stride, const LowRankLinear& p,
                                                                                  int block, int r) {
    const int rank = p.rank, blocks = TRANSPOSED ? p.out_blocks : p.in_blocks;
    for (int b = 0; b < blocks; ++b) {
        const int64_t pair = TRANSPOSED ? int64_t(b) * p.in_blocks + block : int64_t(block) * p.in_blocks + b;
        const bool dense = p.core_kind == Core::dense;
        for (int q = dense ? 0 : r; q < (dense ? rank : r + 1); ++q) {
            float weight = 1.f;
            if (dense)
                weight = load_float<T>(p.core, (pair * rank + (TRANSPOSED ? q : r)) * rank + (TRANSPOSED ? r : q),
                                       p.core_float);
            else if (p.core_kind == Core::diagonal) weight = load_float<T>(p.core, pair * rank + r, p.core_float);
#pragma unroll
            for (int i = 0; i < 4; ++i) acc[i] += weight * in[i * stride + b * rank + q];
        }
    }
}

// ---- launching ------------------------------------------------------------------------------------------------------
// `block_cols`: columns from one block to the next; 0 where there is only one.
template <typename T> Matrix activation(const void* data, int64_t stride, int64_t block_cols) {
    return {data, stride, false, aligned16(data, stride, block_cols, sizeof(T))};
}
template <typename T> Matrix factor(const void* data, int64_t stride, bool is_float) {
    const bool widened = is_float && sizeof(T) != 4;
    return {data, stride, widened, aligned16(data, stride, 0, widened ? 4 : sizeof(T))};
}

template <typename F> void with_dtype(DType dtype, F&& f) {
    if (dtype == DType::float32) f(float{});
    else if (dtype == DType::bfloat16) f(__nv_bfloat16{});
    else f(__half{});
}
// Kernels are compiled for ranks up to 32, 64 and 128.
template <typename F> void with_dtype_and_rank(DType dtype, int64_t rank, F&& f) {
    with_dtype(dtype, [&](auto type) {
        if (rank <= 32) f(type, std::integral_constant<int, 32>{});
        else if (rank <= 64) f(type, std::integral_constant<int, 64>{});
        else f(type, std::integral_constant<int, 128>{});
    });
}

void mix(const LowRankLinear& p, void* stream);

// One launch adds the partial sums of up to three gradients, in order.
struct Sum {
    const float* partial;  // (count, elements); null: nothing to do
    int64_t count, elements;
    void* total;
    bool is_float;
};
struct Reduce {
    Sum up, down, core;
};
void reduce(const Reduce& sums, DType dtype, void* stream);

}  // namespace peft
