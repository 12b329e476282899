// Reconstruction of a weight: every element of the result is written once, after a loop over the rank. See
// reconstruct.h.
#include "reconstruct.h"

#include <algorithm>

#include "lowrank_linear.cuh"

namespace peft {
namespace {

// A block owns 64 x 128 elements of one result block; its warps are 4 row tiles x 2 column halves. Per 32 ranks:
//     sum[m][n] += sum_r left[m][r] right[r][n]       left = B, right = A; with a core, right = diag(c) A
//     left[m][r] = sum_a B[m][a] core[a][r]           with a dense core, formed 32 ranks a at a time
// The products are in the type Operand: float32, or where both factors have the result's 2-byte type T and nothing
// stands between them, T: tensor cores multiply that exactly.
constexpr int kDepth = 32;
static_assert(kRows == kReconstructRows && kCols == kReconstructColumns, "tiles are those of the low-rank linear");

struct Blocks {
    Matrix up, down;
    const void* core;  // null: none
    bool core_float;
    const void* base;
    int64_t base_block;  // elements of the base from one output block to the next
    bool base_aligned;
    void* out;
    bool out_aligned;
    int rows, cols, rank, in_blocks, row_tiles, col_tiles;
    float scale;
    const float* scale_ptr;
};

template <typename Operand> constexpr int reconstruct_bytes() {
    const int operands =
        (Tile<Operand, kRows, kDepth>::kElements + Tile<Operand, kDepth, kCols>::kElements) * int(sizeof(Operand));
    const int sums = Tile<float, kRows, kCols>::kElements * int(sizeof(float));
    return operands > sums ? operands : sums;
}

// left = B core for the ranks from r0 on. `square` holds 32 x 32 elements of the core.
template <typename T, typename Left>
__device__ __forceinline__ void apply_dense_core(float* left, float* square, const Blocks& p, int64_t pair, int row0,
                                                 int r0, int row_tile, int half) {
    constexpr int kStride = kDepth + 4;
    float acc[kDepth / 16][4] = {};
    for (int a0 = 0; a0 < p.rank; a0 += kDepth) {
        Left up;
        up.template load<true, T>(p.up, row0, p.rows - row0, a0, p.rank - a0);
        __syncthreads();
        up.store(left);
        for (int e = threadIdx.x; e < kDepth * kDepth; e += kThreads) {
            const int a = a0 + e / kDepth, r = r0 + e % kDepth;
            square[e / kDepth * kStride + e % kDepth] =
                a < p.rank && r < p.rank ? load_float<T>(p.core, (pair * p.rank + a) * p.rank + r, p.core_float) : 0.f;
        }
        __syncthreads();
        multiply<false, true>(acc, left + row_tile * Left::kStride, Left::kStride, square + half * (kDepth / 2),
                              kStride, kDepth, kDepth / 16);
    }
    __syncthreads();
    for_each_element(acc, kDepth / 16, [&](float v, int row, int col) {
        left[(row_tile + row) * Left::kStride + half * (kDepth / 2) + col] = v;
    });
}

// down = diag(c) down
template <typename T, typename Right>
__device__ __forceinline__ void scale_rows(Right& down, const Blocks& p, int64_t pair, int r0) {
#pragma unroll
    for (int i = 0; i < Right::kOcts; ++i) {
        const int r = r0 + down.row_of(i);
        const float c = r < p.rank ? load_float<T>(p.core, pair * p.rank + r, p.core_float) : 0.f;
#pragma unroll
        for (int j = 0; j < 8; ++j) down.octs[i].v[j] *= c;
    }
}

template <typename T, typename Operand, bool DENSE>
__global__ void __launch_bounds__(kThreads, DENSE ? 2 : 3) reconstruct_kernel(const Blocks p) {
    SHARED_MEMORY(memory);
    using Left = Tile<Operand, kRows, kDepth>;
    using Right = Tile<Operand, kDepth, kCols>;
    using Sums = Tile<float, kRows, kCols>;
    Operand* const left = reinterpret_cast<Operand*>(memory);
    Operand* const right = left + Left::kElements;
    float* const sums = reinterpret_cast<float*>(memory);  // once the operands are no longer needed

    const int col0 = blockIdx.x % p.col_tiles * kCols, above = blockIdx.x / p.col_tiles;
    const int row0 = above % p.row_tiles * kRows, pair = above / p.row_tiles;
    const int rows = p.rows - row0, cols = p.cols - col0;
    const int64_t stride = int64_t(p.in_blocks) * p.cols, global0 = int64_t(pair % p.in_blocks) * p.cols + col0;
    const int64_t out_block = pair / p.in_blocks;
    const int warp = threadIdx.x / 32, row_tile = warp % 4 * 16, half = warp / 4;
    const float scale = p.scale_ptr ? *p.scale_ptr : p.scale;

    float acc[kCols / 16][4] = {};
    for (int r0 = 0; r0 < p.rank; r0 += kDepth) {
        if constexpr (DENSE) {
            apply_dense_core<T, Left>(left, right, p, pair, row0, r0, row_tile, half);
        } else {
            Left up;
            up.template load<true, T>(p.up, row0, rows, r0, p.rank - r0);
            __syncthreads();
            up.store(left);
        }
        Right down;
        down.template load<true, T>(p.down, r0, p.rank - r0, col0, cols);
        if constexpr (!DENSE && std::is_same_v<Operand, float>)
            if (p.core) scale_rows<T>(down, p, pair, r0);
        down.store(right);
        __syncthreads();
        multiply<false, true>(acc, left + row_tile * Left::kStride, Left::kStride, right + half * (kCols / 2),
                              Right::kStride, min(kDepth, rank_pieces(p.rank - r0) * 8), kCols / 16);
    }
    __syncthreads();
    for_each_element(acc, kCols / 16, [&](float v, int row, int col) {
        sums[(row_tile + row) * Sums::kStride + half * (kCols / 2) + col] = v;
    });
    Tile<T, kRows, kCols> out;
    if (p.base)
        out.load({static_cast<const T*>(p.base) + out_block * p.base_block, stride, false, p.base_aligned}, row0, rows,
                 global0, cols);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < out.kOcts; ++i) {
        const Oct<float> sum = load_oct(sums + out.row_of(i) * Sums::kStride + out.col(), 8, true);
#pragma unroll
        for (int j = 0; j < 8; ++j)
            out.octs[i].v[j] = from_float<T>(scale * sum.v[j] + (p.base ? to_float(out.octs[i].v[j]) : 0.f));
    }
    out.write(static_cast<T*>(p.out) + out_block * p.rows * stride, stride, p.out_aligned, row0, rows, global0, cols);
}

template <typename T, typename Operand, bool DENSE = false> void reconstruct(const Reconstruct& p, void* stream) {
    const int64_t stride = p.in_blocks * p.block_cols, block_cols = p.in_blocks > 1 ? p.block_cols : 0;
    const int64_t row_tiles = ceil_div(p.block_rows, kRows), col_tiles = ceil_div(p.block_cols, kCols);
    const Blocks args{factor<T>(p.up, p.rank, p.up_float),
                      factor<T>(p.down, p.block_cols, p.down_float),
                      p.core,
                      p.core_float,
                      p.base,
                      p.base_shared ? 0 : p.block_rows * stride,
                      aligned16(p.base, stride, block_cols, sizeof(T)),
                      p.out,
                      aligned16(p.out, stride, block_cols, sizeof(T)),
                      int(p.block_rows),
                      int(p.block_cols),
                      int(p.rank),
                      int(p.in_blocks),
                      int(row_tiles),
                      int(col_tiles),
                      p.scale,
                      p.scale_ptr};
    LAUNCH((reconstruct_kernel<T, Operand, DENSE>), dim3(p.out_blocks * p.in_blocks * row_tiles * col_tiles), kThreads,
           reconstruct_bytes<Operand>(), stream, args);
}

}  // namespace
}  // namespace peft

using namespace peft;

void reconstruct_fwd(const Reconstruct& p, void* stream) {
    with_dtype(p.dtype, [&](auto type) {
        using T = decltype(type);
        if (p.core_kind == Core::none && !p.up_float && !p.down_float) reconstruct<T, T>(p, stream);
        else if (p.core_kind == Core::dense) reconstruct<T, float, true>(p, stream);
        else reconstruct<T, float>(p, stream);
    });
}

int64_t reconstruct_shared_bytes(DType dtype) {
    int64_t bytes = reconstruct_bytes<float>();
    with_dtype(dtype, [&](auto type) { bytes = std::max<int64_t>(bytes, reconstruct_bytes<decltype(type)>()); });
    return bytes;
}
