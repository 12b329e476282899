// J low-rank linears of one x (peft_kernels/ops/lowrank_projections.py): thin passes around products that cuBLAS does.
//
//     forward    z_j = drop_j(x) A_j^T             y0_j = s_j drop_j(z_j) B_j^T + b_j
//     backward   T_j = dY_j B_j, dB_j;             dz_j;           dA_j, dx0 = sum_j mask_j o (dz_j A_j)
//
// The caller adds x W_j^T to y0_j and sum_j dY_j W_j to dx0.
#pragma once
#include "lowrank_linear.h"

constexpr int kMostProjections = PEFT_KERNELS_MOST_PROJECTIONS;

// What a call's kernels depend on besides its rows and addresses.
struct ProjectionsKind {
    int64_t count = 0, rank = 0;  // J, R
    int64_t in_features = 0;      // K; 0: one z for all comes from elsewhere, and A has no part in the call
    int64_t out_features[kMostProjections] = {};
    DType dtype = DType::float32;  // of activations; factors are that, or float32:
    bool down_float = false, up_float = false;
    bool shared = false;  // one A for all, or none
    float dropout_p = 0.f;
    bool drop_input = false, drop_rank = false;  // one at most
    bool needs_x = false, needs_down = false, needs_up = false, needs_z = false;  // which gradients
    int64_t processors = 0;  // that strips are planned for

    // Products with A: one for all where A is shared and every projection reads the same x.
    int64_t products() const { return shared && !drop_input ? 1 : count; }
};

// A call, of M rows. Row-major device memory, column stride 1; a stride is counted in elements, from row to row. What
// has no stride is contiguous. A null pointer is in the place of what this kind of call does without.
struct LowRankProjections : ProjectionsKind {
    int64_t rows = 0;
    const int64_t* rng = nullptr;  // (J, 2): seed and offset of each projection
    const void* x = nullptr;
    void* z = nullptr;  // (M, products R); written by the forward if there are in_features, otherwise read
    int64_t x_stride = 0, z_stride = 0;
    struct Projection {
        const void *down = nullptr, *up = nullptr, *bias = nullptr;
        const float* scale = nullptr;
        void* y = nullptr;         // (M, N_j) y0_j
        const void* dy = nullptr;  // (M, N_j)
        int64_t stride = 0;        // of y or dy
    } of[kMostProjections];

    void* dx = nullptr;      // (M, K) dx0
    void* d_down = nullptr;  // (J R, K), or (R, K) if shared
    void* d_up = nullptr;    // (sum N_j, R)
    void* dz = nullptr;      // (M, products R); in the workspace unless it is needed itself

    // What the backward plans itself, and keeps in its workspace.
    int64_t up_strips = 1, down_strips = 1;
    float* t_partial[kMostProjections] = {};  // (column chunks, M, R)
    float* d_up_partial = nullptr;            // (strips, sum N_j, R)
    float* d_down_partial = nullptr;          // (strips, J R or R, K)
};

// As of lowrank_linear.h.
void lowrank_projections_fwd(const LowRankProjections& p, void* stream);
int64_t lowrank_projections_bwd_floats(const ProjectionsKind& kind, int64_t rows);
void lowrank_projections_bwd(LowRankProjections p, float* workspace, void* stream);
int64_t lowrank_projections_shared_bytes(DType dtype, int64_t rank);
