// The low-rank linear with an adapter for each row (peft_kernels/ops/batched_lowrank_linear.py): thin passes around a
// frozen product that cuBLAS does. l is the adapter of a row; rows without one have no part in z, dz, dA and dB.
//
//     forward    z = x A_l^T                  y0 = s_l z B_l^T + b
//     backward   dz = s_l dY B_l              dx0 = dz A_l          dB_l = s_l sum dY^T z          dA_l = sum dz^T x
//
// The caller adds x W^T to y0 and dY W to dx0.
#pragma once
#include "lowrank_linear.h"  // DType

constexpr int kSegmentRows = PEFT_KERNELS_SEGMENT_ROWS;  // neighbouring places of one adapter in a tile

// Row-major device memory, column stride 1; a stride is counted in elements, from row to row. What has no stride is
// contiguous. M rows, L adapters, R rank. In the backward, a null pointer leaves out the stage that would write to it.
struct BatchedLowRankLinear {
    int64_t rows = 0, in_features = 0, out_features = 0, rank = 0, adapters = 0;
    DType dtype = DType::float32;  // of activations; factors are that, or float32:
    bool down_float = false, up_float = false;
    float scale = 1.f;
    const float* scale_ptr = nullptr;  // (L,), replaces `scale`

    // The rows in the order of their adapters, those without one first, and tiles of kSegmentRows places of that order.
    const int64_t* order = nullptr;         // (M,) row numbers
    const int64_t* offsets = nullptr;       // (L + 1,) adapter l has the places offsets[l] <= p < offsets[l + 1]
    const int64_t* tile_adapter = nullptr;  // (tiles,) -1: none
    const int64_t* tile_first = nullptr;    // (tiles,) the first place; M: no place at all
    int64_t tiles = 0;

    const void *x = nullptr, *bias = nullptr, *down = nullptr, *up = nullptr;
    void* z = nullptr;  // (M, R)
    void* y = nullptr;  // (M, N) y0
    int64_t x_stride = 0;

    const void* dy = nullptr;
    void* dz = nullptr;  // (M, R)
    void* dx = nullptr;  // (M, K) dx0
    int64_t dy_stride = 0;

    // The gradients' sums are split into strips of each adapter's rows; a last kernel adds those up in order. With one
    // strip there are no partial sums.
    int64_t up_strips = 1, down_strips = 1;
    float* d_up_partial = nullptr;    // (strips, L, N, R)
    float* d_down_partial = nullptr;  // (strips, L, R, K)
    void *d_up = nullptr, *d_down = nullptr;
};

// `stream`: a cudaStream_t. Every kernel is launched on it; nothing waits.
void batched_lowrank_linear_fwd(const BatchedLowRankLinear& p, void* stream);
void batched_lowrank_linear_bwd(const BatchedLowRankLinear& p, void* stream);
int64_t batched_lowrank_linear_fwd_shared_bytes(DType dtype, int64_t rank);  // the most shared memory a block takes
int64_t batched_lowrank_linear_bwd_shared_bytes(DType dtype, int64_t rank);
