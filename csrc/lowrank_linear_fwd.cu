// Forward of the low-rank linear: shrink (x -> z), mix (z -> S), expand (S -> y0). See lowrank_linear.h.
#include <algorithm>

#include "lowrank_linear.cuh"

namespace peft {
namespace {

// ---- shrink: z_i = drop(x_i) A^T ------------------------------------------------------------------------------------
// A block owns kShrinkRows rows of z. Its 8 warps are 2 row tiles x 4 quarters of every 128-column chunk of x; the four
// quarters' sums meet at the end.
constexpr int kShrinkRows = 32, kQuarter = kCols / 4;

struct Shrink {
    Matrix x, down;
    void* z;
    int64_t z_stride;
    int rows, rank, block_cols, blocks;
    Dropout dropout;
};

template <typename T, int RANK> constexpr int shrink_bytes() {
    const int tiles = (Tile<T, kShrinkRows, kCols>::kElements + Tile<T, RANK, kCols>::kElements) * int(sizeof(T));
    const int sums = 4 * kShrinkRows * RANK * int(sizeof(float));
    return tiles > sums ? tiles : sums;
}

template <typename T, int RANK> __global__ void __launch_bounds__(kThreads, sizeof(T) == 2 && RANK <= 32 ? 2 : 1)
    shrink_kernel(const Shrink p) {
    SHARED_MEMORY(memory);
    using Wide = Tile<T, kShrinkRows, kCols>;
    using Factor = Tile<T, RANK, kCols>;
    T* const wide = reinterpret_cast<T*>(memory);
    T* const factor = wide + Wide::kElements;
    float* const sums = reinterpret_cast<float*>(memory);  // (quarter, row, rank), once the tiles are no longer needed
    const int warp = threadIdx.x / 32, row_tile = warp % 2 * 16, quarter = warp / 2;
    const int row0 = blockIdx.x * kShrinkRows, rows = p.rows - row0;
    const int ranks = rank_pieces(p.rank);

    for (int block = 0; block < p.blocks; ++block) {
        float acc[RANK / 8][4] = {};
        const int64_t block0 = int64_t(block) * p.block_cols;
        Wide x;
        Factor down;
        x.load(p.x, row0, rows, block0, p.block_cols);
        down.template load<true>(p.down, 0, p.rank, 0, p.block_cols);
        for (int col0 = 0; col0 < p.block_cols; col0 += kCols) {
            if (p.dropout.rng) x.drop(Wide::draw(p.dropout, row0, block0 + col0), p.dropout.inverse_keep);
            __syncthreads();
            x.store(wide);
            down.store(factor);
            __syncthreads();
            const int next = col0 + kCols;
            if (next < p.block_cols) {
                x.load(p.x, row0, rows, block0 + next, p.block_cols - next);
                down.template load<true>(p.down, 0, p.rank, next, p.block_cols - next);
            }
            multiply<false, false>(acc, wide + row_tile * Wide::kStride + quarter * kQuarter, Wide::kStride,
                                   factor + quarter * kQuarter, Factor::kStride, kQuarter, ranks);
        }
        __syncthreads();
        for_each_element(acc, ranks, [&](float v, int row, int col) {
            sums[(quarter * kShrinkRows + row_tile + row) * RANK + col] = v;
        });
        __syncthreads();
        for (int e = threadIdx.x; e < kShrinkRows * p.rank; e += kThreads) {
            const int row = e / p.rank, r = e % p.rank;
            float sum = 0.f;
            for (int q = 0; q < 4; ++q) sum += sums[(q * kShrinkRows + row) * RANK + r];
            if (row < rows)
                static_cast<T*>(p.z)[int64_t(row0 + row) * p.z_stride + block * p.rank + r] = from_float<T>(sum);
        }
    }
}

// ---- mix: S_o = drop(sum_i drop(z_i) core[o,i]) ---------------------------------------------------------------------
template <typename T> __global__ void __launch_bounds__(kThreads)
    mix_kernel(const LowRankLinear p, const Dropout dropout) {
    SHARED_MEMORY(memory);
    float* const z = reinterpret_cast<float*>(memory);  // (kMixRows, I R)
    const int rank = p.rank, in = p.in_blocks * rank, out = p.out_blocks * rank;
    const int64_t row0 = int64_t(blockIdx.x) * kMixRows;
    for (int e = threadIdx.x; e < kMixRows * in; e += kThreads) {
        const int64_t row = row0 + e / in;
        float v = row < p.rows ? to_float(static_cast<const T*>(p.z)[row * p.z_stride + e % in]) : 0.f;
        if (p.drop_rank) v = dropped(dropout, v, row, e % in);
        z[e] = v;
        if (p.dropped && row < p.rows) static_cast<T*>(p.dropped)[row * in + e % in] = from_float<T>(v);
    }
    __syncthreads();
    if (!p.mixed) return;
    for (int e = threadIdx.x; e < kMixRows / 4 * out; e += kThreads) {
        const int first = e / out * 4, col = e % out;
        float acc[4] = {};
        apply_core<T, false>(acc, z + first * in, in, p, col / rank, col % rank);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int64_t row = row0 + first + i;
            if (row >= p.rows) break;
            const float v = p.drop_core ? dropped(dropout, acc[i], row, col) : acc[i];
            static_cast<T*>(p.mixed)[row * out + col] = from_float<T>(v);
        }
    }
}

// ---- expand: y0_o = s S_o B^T + b_o ---------------------------------------------------------------------------------
// A block owns up to 128 columns of one output block and a strip of rows; its warps are 4 row tiles x 2 column halves
// of a 64 x 128 tile.
struct Expand {
    Matrix s, up;
    const void* bias;
    void* y;
    bool y_aligned;
    int rows, rank, block_cols, blocks;
    float scale;
    const float* scale_ptr;
};

template <typename T, int RANK> constexpr int expand_bytes() {
    return (Tile<T, kRows, kCols>::kElements + Tile<T, kRows, RANK>::kElements + Tile<T, kCols, RANK>::kElements) *
               int(sizeof(T)) +
           kCols * int(sizeof(float));
}

template <typename T, int RANK> __global__ void __launch_bounds__(kThreads, sizeof(T) == 2 ? 2 : 1)
    expand_kernel(const Expand p) {
    SHARED_MEMORY(memory);
    using Wide = Tile<T, kRows, kCols>;
    using Thin = Tile<T, kRows, RANK>;
    using Factor = Tile<T, kCols, RANK>;
    T* const wide = reinterpret_cast<T*>(memory);
    T* const thin = wide + Wide::kElements;
    T* const factor = thin + Thin::kElements;
    float* const bias = reinterpret_cast<float*>(factor + Factor::kElements);

    const int chunks = ceil_div(p.block_cols, kCols), block = blockIdx.x / chunks, col0 = blockIdx.x % chunks * kCols;
    const int cols = p.block_cols - col0;
    const int64_t global0 = int64_t(block) * p.block_cols + col0;
    const float scale = p.scale_ptr ? *p.scale_ptr : p.scale;
    const int warp = threadIdx.x / 32, row_tile = warp % 4 * 16, half = warp / 4 * (kCols / 2);
    Factor::template copy<true>(factor, p.up, col0, cols, 0, p.rank);
    for (int c = threadIdx.x; c < kCols; c += kThreads)
        bias[c] = p.bias && c < cols ? to_float(static_cast<const T*>(p.bias)[global0 + c]) : 0.f;

    const Strip strip(p.rows, blockIdx.y, gridDim.y);
    Thin s;
    if (strip.first < strip.last) s.load(p.s, strip.first, p.rows - strip.first, int64_t(block) * p.rank, p.rank);
    for (int row0 = strip.first; row0 < strip.last; row0 += kRows) {
        s.store(thin);
        __syncthreads();
        const int next = row0 + kRows;
        if (next < strip.last) s.load(p.s, next, p.rows - next, int64_t(block) * p.rank, p.rank);
        float acc[kCols / 16][4] = {};
        multiply<false, false>(acc, thin + row_tile * Thin::kStride, Thin::kStride, factor + half * Factor::kStride,
                               Factor::kStride, rank_pieces(p.rank) * 8, kCols / 16);
        for_each_element(acc, kCols / 16, [&](float v, int row, int col) {
            wide[(row_tile + row) * Wide::kStride + half + col] = from_float<T>(scale * v + bias[half + col]);
        });
        __syncthreads();
        Wide y;
        y.fetch(wide);
        y.write(static_cast<T*>(p.y), int64_t(p.blocks) * p.block_cols, p.y_aligned, row0, p.rows - row0, global0,
                cols);
    }
}

// ---- the mask, for tests --------------------------------------------------------------------------------------------
__global__ void __launch_bounds__(kThreads)
    philox_mask_kernel(const Dropout dropout, int64_t rows, int64_t columns, uint8_t* keep) {
    const int64_t e = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (e < rows * columns) keep[e] = dropped(dropout, 1.f, e / columns, e % columns) != 0.f;
}

template <typename T, int RANK> void shrink(const LowRankLinear& p, void* stream) {
    const int block_cols = p.in_features / p.in_blocks;
    const Shrink args{activation<T>(p.x, p.x_stride, p.in_blocks > 1 ? block_cols : 0),
                      factor<T>(p.down, block_cols, p.down_float),
                      p.z,
                      p.z_stride,
                      int(p.rows),
                      int(p.rank),
                      block_cols,
                      int(p.in_blocks),
                      make_dropout(p.drop_input ? p.rng : nullptr, p.dropout_p)};
    LAUNCH((shrink_kernel<T, RANK>), dim3(ceil_div(p.rows, kShrinkRows)), kThreads, (shrink_bytes<T, RANK>()), stream,
           args);
}

template <typename T, int RANK> void expand(const LowRankLinear& p, void* stream) {
    const int block_cols = p.out_features / p.out_blocks;
    const Matrix s = p.mixed ? activation<T>(p.mixed, p.out_blocks * p.rank, p.out_blocks > 1 ? p.rank : 0)
                             : activation<T>(p.z, p.z_stride, 0);
    const int64_t strips = row_strips(p.dtype, p.rank, p.rows, block_cols, p.out_blocks, p.processors);
    const Expand args{s,
                      factor<T>(p.up, p.rank, p.up_float),
                      p.bias,
                      p.y,
                      aligned16(p.y, p.out_features, p.out_blocks > 1 ? block_cols : 0, sizeof(T)),
                      int(p.rows),
                      int(p.rank),
                      block_cols,
                      int(p.out_blocks),
                      p.scale,
                      p.scale_ptr};
    LAUNCH((expand_kernel<T, RANK>), dim3(p.out_blocks * ceil_div(block_cols, kCols), strips), kThreads,
           (expand_bytes<T, RANK>()), stream, args);
}

}  // namespace

void mix(const LowRankLinear& p, void* stream) {
    const size_t shared_bytes = kMixRows * p.in_blocks * p.rank * sizeof(float);
    with_dtype(p.dtype, [&](auto type) {
        LAUNCH(mix_kernel<decltype(type)>, dim3(ceil_div(p.rows, kMixRows)), kThreads, shared_bytes, stream, p,
               make_dropout(p.rng, p.dropout_p));
    });
}

}  // namespace peft

using namespace peft;

void lowrank_linear_fwd(const LowRankLinear& p, void* stream) {
    with_dtype_and_rank(p.dtype, p.rank, [&](auto type, auto rank) {
        if (p.in_features) shrink<decltype(type), rank>(p, stream);
        if (p.mixed) mix(p, stream);
        if (p.out_features) expand<decltype(type), rank>(p, stream);
    });
}

int64_t lowrank_linear_resident(DType dtype, int64_t rank) { return dtype != DType::float32 && rank <= 64 ? 2 : 1; }

int64_t row_strips(DType dtype, int64_t rank, int64_t rows, int64_t block_columns, int64_t blocks, int64_t processors) {
    const int64_t together = processors * lowrank_linear_resident(dtype, rank);
    return std::max<int64_t>(
        1, std::min(ceil_div(rows, kRows), together / (ceil_div(block_columns, kCols) * blocks)));
}

int64_t lowrank_linear_fwd_shared_bytes(DType dtype, int64_t rank) {
    int64_t bytes = 0;
    with_dtype_and_rank(dtype, rank, [&](auto type, auto bucket) {
        bytes = std::max(shrink_bytes<decltype(type), bucket>(), expand_bytes<decltype(type), bucket>());
    });
    return bytes;
}

void philox_mask(const int64_t* rng, float p, int64_t rows, int64_t columns, uint8_t* keep, void* stream) {
    if (rows * columns == 0) return;
    LAUNCH(philox_mask_kernel, dim3(ceil_div(rows * columns, kThreads)), kThreads, 0, stream, make_dropout(rng, p),
           rows, columns, keep);
}
