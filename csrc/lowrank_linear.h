// The low-rank linear (peft_kernels/ops/lowrank_linear.py): thin passes around a frozen product that cuBLAS does.
//
//     forward    z_i = drop(x_i) A^T          S_o = drop(sum_i drop(z_i) core[o,i])          y0_o = s S_o B^T + b_o
//     backward   T_o = dY_o B, dB;            dS_o = s T_o, dz_i, dcore;                     dx0_i = dz_i A, dA
//
// The caller adds x W^T to y0 and dY W to dx0.
#pragma once
#include <cstdint>

enum class DType : int { float32, bfloat16, float16 };
enum class Core : int { none, diagonal, dense };

// Row-major device memory, column stride 1; a stride is counted in elements, from row to row. What has no stride is
// contiguous. M rows, R rank, O output blocks, I input blocks. A null pointer leaves out the stage that would read or
// write it.
struct LowRankLinear {
    int64_t rows = 0, in_features = 0, out_features = 0, rank = 0, in_blocks = 1, out_blocks = 1;
    DType dtype = DType::float32;  // of activations; factors are that, or float32:
    bool down_float = false, up_float = false, core_float = false;
    Core core_kind = Core::none;

    float scale = 1.f;
    const float* scale_ptr = nullptr;  // replaces `scale`
    const int64_t* rng = nullptr;      // (seed, offset); null: no dropout
    float dropout_p = 0.f;
    bool drop_input = false, drop_rank = false, drop_core = false;

    const void *x = nullptr, *bias = nullptr, *down = nullptr, *up = nullptr, *core = nullptr;
    void* z = nullptr;      // (M, I R); written by the forward if `down` is given, otherwise read
    void* mixed = nullptr;  // (M, O R) S, unless S is z itself
    void* y = nullptr;      // (M, N) y0
    int64_t x_stride = 0, z_stride = 0;

    const void* dy = nullptr;
    void* dropped = nullptr;     // (M, I R) z after its dropout, if dcore needs it
    float* t_partial = nullptr;  // (column chunks, M, O R)
    void* ds = nullptr;          // (M, O R), if dcore needs it
    void* dz = nullptr;          // (M, I R)
    void* dx = nullptr;          // (M, K) dx0
    int64_t dy_stride = 0, dz_stride = 0;

    // A pass is split into strips of rows. In the backward each leaves partial sums, which a last kernel adds in order.
    int64_t expand_strips = 1, up_strips = 1, down_strips = 1, core_strips = 1;
    float* d_up_partial = nullptr;    // (strips, O, N / O, R)
    float* d_down_partial = nullptr;  // (strips, I, R, K / I)
    float* d_core_partial = nullptr;  // (strips, O, I, R) or (strips, O, I, R, R)
    void *d_up = nullptr, *d_down = nullptr, *d_core = nullptr;
};

constexpr int kLowRankLinearColumns = 128, kLowRankLinearRows = 64;  // of a tile: a chunk of columns, a step of a strip
constexpr int kLowRankLinearMaxRank = 128, kLowRankLinearMaxHidden = 1024;  // of R, of R times O or I

// `stream`: a cudaStream_t. Every kernel is launched on it; nothing waits.
void lowrank_linear_fwd(const LowRankLinear& p, void* stream);
void lowrank_linear_bwd(const LowRankLinear& p, void* stream);
int64_t lowrank_linear_fwd_shared_bytes(DType dtype, int64_t rank);  // the most shared memory a block takes
int64_t lowrank_linear_bwd_shared_bytes(DType dtype, int64_t rank);

// keep[row][column] = 1 where a mask keeps; for tests.
void philox_mask(const int64_t* rng, float p, int64_t rows, int64_t columns, uint8_t* keep, void* stream);
