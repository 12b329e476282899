// Aurora's gated query transformation (peft_kernels/ops/gated_query.py), forward and backward; t' = gamma o t + beta.
//
//     additive: out = h + s (a_s o gamma + beta) + s (a_c o gamma_c + beta_c)
//     gated:    out = g f + (1 - g) t', g the softmax of <f, sum_j m_j t'_j> over a sequence's kept positions
#pragma once
#include "lowrank_linear.h"  // DType

// Row-major device memory; whatever has no stride here has no gaps. M rows of d columns; B sequences of S positions,
// M = B S. A null gradient is not computed, and what only it needs may be null.
struct GatedQuery {
    int64_t rows = 0, columns = 0;
    int64_t positions = 0;  // S; "gated" only
    DType dtype = DType::float32;  // of (M, d); vectors are that, or float32:
    bool gamma_float = false, beta_float = false, cross_gamma_float = false, cross_beta_float = false;

    float scale = 1.f;
    const float* scale_ptr = nullptr;  // replaces `scale`

    const void *hidden = nullptr, *text = nullptr, *cross = nullptr;  // (M, d)
    int64_t hidden_stride = 0, text_stride = 0, cross_stride = 0;
    const void *gamma = nullptr, *beta = nullptr, *cross_gamma = nullptr, *cross_beta = nullptr;  // (d,)
    const uint8_t* padding_mask = nullptr;  // (B, S), 1 where kept; null: all is
    void* out = nullptr;                    // (M, d)
    float *gate = nullptr, *total = nullptr;  // g (B, S) and sum_j m_j t'_j (B, d): written forward, read backward

    const void* dy = nullptr;  // (M, d)
    int64_t dy_stride = 0;
    void *d_hidden = nullptr, *d_text = nullptr, *d_cross = nullptr;  // (M, d)
    float* q = nullptr;                                               // (B, S), scratch
    // Sums over a strip of rows each, of a sequence each for "gated": (strips, d)
    int64_t strips = 0;
    float *gamma_partial = nullptr, *beta_partial = nullptr, *cross_gamma_partial = nullptr;
    void *d_gamma = nullptr, *d_beta = nullptr, *d_cross_gamma = nullptr;  // (d,)
    void* d_cross_beta = nullptr;                                          // the same sum as d_beta
};

constexpr int kGatedQueryRows = 8, kGatedQueryColumns = 256;  // of "additive", in one thread block

// `stream`: a cudaStream_t. One kernel forward and at most two backward are launched on it; nothing waits.
void additive_query_fwd(const GatedQuery& p, void* stream);
void additive_query_bwd(const GatedQuery& p, void* stream);
void gated_query_fwd(const GatedQuery& p, void* stream);
void gated_query_bwd(const GatedQuery& p, void* stream);
