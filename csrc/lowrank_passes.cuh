// The passes over wide matrices of which a low-rank linear consists, and low-rank projections for the most part. What
// differs between the J projections of one call stands in an array; a low-rank linear is one projection.
#pragma once
#include "lowrank_linear.cuh"
#include "lowrank_projections.h"

namespace peft {

// Factors of so many projections take no more shared memory and registers than one of the largest rank.
template <int RANK> constexpr int kSlots = kLowRankLinearMaxRank / RANK;

// Which projection a thread block works for. Those with block columns of their own have `tiles` thread blocks each, and
// `tile` becomes the place among them.
template <typename Each> __device__ __forceinline__ int projection_of(const Each* each, int& tile) {
    int j = 0;
    for (; tile >= each[j].tiles; ++j) tile -= each[j].tiles;
    return j;
}

// Projection j draws from (seed, offset) j.
__device__ __forceinline__ Dropout dropout_of(Dropout dropout, int j) {
    if (dropout.rng) dropout.rng += 2 * j;
    return dropout;
}

// z_j = drop_j(x) A_j^T, side by side. A low-rank linear has one A for `rounds` blocks of x's columns, `x_step` apart.
// A round of projections is as many as a thread block's shared memory holds.
struct ShrinkPass {
    Matrix x, downs[kMostProjections];
    void* z;
    int64_t z_stride;
    int rows, rank, cols;
    int projections, rounds, x_step;
    Dropout dropout;
};
void shrink(ShrinkPass p, DType dtype, void* stream);
int64_t shrink_shared_bytes(DType dtype, int64_t rank, int64_t projections);

// y_j = s_j drop_j(z_j) B_j^T + b_j.
struct ExpandPass {
    struct Projection {
        Matrix up;
        const void* bias;
        void* y;
        int64_t y_stride;
        bool y_aligned;
        int cols, tiles;  // cols: of one block
        const float* scale_ptr;
    } of[kMostProjections];
    Matrix s;
    int s_step;  // columns of `s` from one block or projection to the next
    int rows, rank;
    float scale;
    Dropout dropout;  // of `s`
};
void expand(const ExpandPass& p, DType dtype, int64_t tiles, int64_t strips, void* stream);

// A block owns up to 128 columns of one column block of `wide`, and a strip of rows. For each 64-row tile:
//     partial[c][r] += sum_m wide[m][c] thin[m][r]                  its 8 warps own 16 columns each
//     UP:    t[chunk][m][r] = sum_c wide[m][c] factor[c][r]         4 row tiles x 2 halves of the rank
//     DOWN:  out[m][c] = mask o sum_r thin[m][r] factor[r][c]       4 row tiles x 2 halves of the columns
// DOWN_FROM_T, where there is no core, makes `thin` itself of the chunks that UP has left. UP alone takes projections.
enum class Pass { up, down, down_from_t };

struct WidePass {
    struct Projection {
        Matrix wide, factor;  // a null `wide` is not read, a null `factor` leaves out the second product
        int cols, tiles;      // cols: of one block
        float* partial;
        float* t;  // written by UP, read by DOWN_FROM_T
        const float* scale_ptr;
    } of[kMostProjections];
    Matrix thin;
    int rows, rank, blocks;
    int thin_step, thin_z;  // columns of `thin` from one block or projection, or blockIdx.z, to the next
    int64_t partial_strip, partial_block, partial_z;  // strides
    int partial_c, partial_r;
    bool diagonal;  // keep only c == r
    int t_chunks;
    bool t_aligned;
    float scale = 1.f;  // of UP's partial sums, and of T where DOWN_FROM_T reads it
    Dropout thin_dropout;
    void* out;
    bool out_aligned;
    Dropout dropout;
};
void wide_bwd(Pass pass, const WidePass& p, DType dtype, int64_t tiles, int64_t strips, int64_t z, void* stream);

}  // namespace peft
