// What the kernels of the weight distance share: a tile of one matrix product in float32. See weight_distance.h.
#pragma once
#include "lowrank_linear.cuh"
#include "weight_distance.h"

namespace peft {

// A block owns 64 x 128 elements; its warps are 4 row tiles x 2 column halves. Operands come 32 columns of `left` at a
// time, the next ones on their way while these are multiplied.
constexpr int kDepth = 32, kHalf = kCols / 2;
static_assert(kRows == kWeightDistanceRows && kCols == kWeightDistanceColumns, "tiles are the low-rank linear's");

template <Form FORM> struct Operands {
    using Left = std::conditional_t<FORM == Form::tn, Tile<float, kDepth, kRows>, Tile<float, kRows, kDepth>>;
    using Right = std::conditional_t<FORM == Form::nt, Tile<float, kCols, kDepth>, Tile<float, kDepth, kCols>>;
    static constexpr int kElements = Left::kElements + Right::kElements;
};
using Sums = Tile<float, kRows, kCols>;
static_assert(Operands<Form::nn>::kElements <= Sums::kElements && Operands<Form::nt>::kElements <= Sums::kElements &&
                  Operands<Form::tn>::kElements <= Sums::kElements,
              "operands lie where the sums will");
constexpr int kSharedBytes = Sums::kElements * int(sizeof(float));

__device__ __forceinline__ Matrix matrix(const Strided& m) {
    return {global_memory(m.data), m.stride, false, aligned16(m.data, m.stride, 0, sizeof(float))};
}
__device__ __forceinline__ float* element(const Strided& v, int64_t i) {
    return static_cast<float*>(global_memory(v.data)) + i * v.stride;
}

// A block's place in a product: its first row and column, how many there are from there on.
struct Place {
    int row0, col0, rows, cols;
};

// acc += factor op(left) op(right), of which `depth` columns of op(left) meet as many rows of op(right). `memory` holds
// the operands; whatever lies outside them is zero.
template <Form FORM>
__device__ __forceinline__ void add_product(float (&acc)[kHalf / 8][4], float* memory, const Place& at,
                                            const TermRow& term) {
    using Left = typename Operands<FORM>::Left;
    using Right = typename Operands<FORM>::Right;
    float* const left = memory;
    float* const right = left + Left::kElements;
    const int warp = threadIdx.x / 32, row_tile = warp % 4 * 16, half = warp / 4 * kHalf;
    const int pieces = min(kHalf / 8, rank_pieces(at.cols - half)), right_cols = int(term.right_cols) - at.col0;
    const int depth = int(term.depth);
    const Matrix left_matrix = matrix(term.left), right_matrix = matrix(term.right);
    const float factor = term.factor ? *global_memory(term.factor) : 1.f;

    Left l;
    Right r;
    const auto load = [&](int k0) {
        if (FORM == Form::tn) l.load(left_matrix, k0, depth - k0, at.row0, at.rows);
        else l.load(left_matrix, at.row0, at.rows, k0, depth - k0);
        if (FORM == Form::nt) r.load(right_matrix, at.col0, right_cols, k0, depth - k0);
        else r.load(right_matrix, k0, depth - k0, at.col0, right_cols);
        if constexpr (FORM == Form::nn) {
            const int last = right_cols - Right::col();  // where `right_last` comes in this thread's octs
            if (!term.right_last.data || last < 0 || last >= 8) return;
#pragma unroll
            for (int i = 0; i < Right::kOcts; ++i) {
                const int k = k0 + Right::row_of(i);
                const float v = k < depth ? *element(term.right_last, k) : 0.f;
#pragma unroll
                for (int j = 0; j < 8; ++j)
                    if (j == last) r.octs[i].v[j] = v;
            }
        }
    };
    load(0);
    for (int k0 = 0; k0 < depth; k0 += kDepth) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < Left::kOcts; ++i)
#pragma unroll
            for (int j = 0; j < 8; ++j) l.octs[i].v[j] *= factor;
        l.store(left);
        r.store(right);
        __syncthreads();
        if (k0 + kDepth < depth) load(k0 + kDepth);
        if (row_tile < at.rows && pieces > 0)
            multiply<FORM == Form::tn, FORM != Form::nt>(
                acc, left + row_tile * (FORM == Form::tn ? 1 : Left::kStride), Left::kStride,
                right + half * (FORM == Form::nt ? Right::kStride : 1), Right::kStride,
                min(kDepth, rank_pieces(depth - k0) * 8), pieces);
    }
}

// The block's product in rows of `memory`, for all threads to read.
__device__ __forceinline__ void store_sums(float* memory, const float (&acc)[kHalf / 8][4]) {
    const int warp = threadIdx.x / 32, row_tile = warp % 4 * 16, half = warp / 4 * kHalf;
    __syncthreads();
    for_each_element(acc, kHalf / 8, [&](float v, int row, int col) {
        memory[(row_tile + row) * Sums::kStride + half + col] = v;
    });
    __syncthreads();
}

}  // namespace peft
