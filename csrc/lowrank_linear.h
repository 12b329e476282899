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

// What a call's kernels depend on besides its rows and addresses. R rank, O output blocks, I input blocks.
struct LowRankKind {
    int64_t in_features = 0;   // 0: z comes from elsewhere, and A has no part in the call
    int64_t out_features = 0;  // 0: the call is of z alone
    int64_t rank = 0, in_blocks = 1, out_blocks = 1;
    DType dtype = DType::float32;  // of activations; factors are that, or float32:
    bool down_float = false, up_float = false, core_float = false;
    Core core_kind = Core::none;
    float dropout_p = 0.f;
    bool drop_input = false, drop_rank = false, drop_core = false;  // one at most
    bool needs_x = false, needs_down = false, needs_up = false, needs_core = false, needs_z = false;  // which gradients
    int64_t processors = 0;  // that strips are planned for
};

// A call, of M rows. Row-major device memory, column stride 1; a stride is counted in elements, from row to row. What has
// no stride is contiguous. A null pointer is in the place of what this kind of call does without.
struct LowRankLinear : LowRankKind {
    int64_t rows = 0;
    float scale = 1.f;
    const float* scale_ptr = nullptr;  // replaces `scale`
    const int64_t* rng = nullptr;      // (seed, offset), where the kind drops

    const void *x = nullptr, *bias = nullptr, *down = nullptr, *up = nullptr, *core = nullptr;
    void* z = nullptr;      // (M, I R); written by the forward if it has in_features, otherwise read
    void* mixed = nullptr;  // (M, O R) S, unless S is z itself
    void* y = nullptr;      // (M, N) y0
    int64_t x_stride = 0, z_stride = 0;

    const void* dy = nullptr;
    void* dz = nullptr;  // (M, I R); read if there are no out_features
    void* dx = nullptr;  // (M, K) dx0
    void *d_down = nullptr, *d_up = nullptr, *d_core = nullptr;
    int64_t dy_stride = 0, dz_stride = 0;

    // What the backward plans itself, and keeps in its workspace with S. A pass is split into strips of rows, each of
    // which leaves partial sums; a last kernel adds them in order.
    int64_t up_strips = 1, down_strips = 1, core_strips = 1;
    float* t_partial = nullptr;       // (column chunks, M, O R)
    void* dropped = nullptr;          // (M, I R) z after its dropout, if dcore needs it
    void* ds = nullptr;               // (M, O R), if dcore needs it
    float* d_up_partial = nullptr;    // (strips, O, N / O, R)
    float* d_down_partial = nullptr;  // (strips, I, R, K / I)
    float* d_core_partial = nullptr;  // (strips, O, I, R) or (strips, O, I, R, R)
};

constexpr int kLowRankLinearColumns = 128, kLowRankLinearRows = 64;  // of a tile: a chunk of columns, a step of a strip
constexpr int kLowRankLinearMaxRank = 128, kLowRankLinearMaxHidden = 1024;  // of R, of R times O or I

// All column tiles of the pass that gives dA and dx0 read each row of T. Up to so many reads, and without a core, that
// pass makes dz of T itself; above it, hidden_bwd's launch costs less.
constexpr int kMostChunkReads = PEFT_KERNELS_MOST_CHUNK_READS;

// `stream`: a cudaStream_t. Every kernel is launched on it; nothing waits. workspace: as many floats as a call of that
// kind and with so many rows takes, at a multiple of 16 bytes; free again when the stream gets there.
void lowrank_linear_fwd(const LowRankLinear& p, void* stream);
int64_t lowrank_linear_bwd_floats(const LowRankKind& kind, int64_t rows);
void lowrank_linear_bwd(LowRankLinear p, float* workspace, void* stream);
int64_t lowrank_linear_fwd_shared_bytes(DType dtype, int64_t rank);  // the most shared memory a block takes
int64_t lowrank_linear_bwd_shared_bytes(DType dtype, int64_t rank);

// Thread blocks that a multiprocessor runs at a time: what registers allow the pass that takes most of them.
int64_t lowrank_linear_resident(DType dtype, int64_t rank);
// Into how many row strips a pass over blocks of so many columns is split, so that all its thread blocks run at a time.
// A pure function of these numbers, and with it the order of every sum.
int64_t row_strips(DType dtype, int64_t rank, int64_t rows, int64_t block_columns, int64_t blocks, int64_t processors);

// keep[row][column] = 1 where a mask keeps; for tests.
void philox_mask(const int64_t* rng, float p, int64_t rows, int64_t columns, uint8_t* keep, void* stream);
