// Forward of the low-rank linear: shrink (x -> z), mix (z -> S), expand (S -> y0). See lowrank_linear.h.
#include <algorithm>

#include "lowrank_passes.cuh"

namespace peft {
namespace {

// ---- shrink: z_j = drop_j(x) A_j^T ----------------------------------------------------------------------------------
// A block owns kShrinkRows rows of z. Its 8 warps are 2 row tiles x 4 groups, which share out up to SLOTS projections.
// The groups of one projection share out every 128-column chunk of x; their sums meet at the end.
constexpr int kShrinkRows = 32, kGroups = 4;

template <typename T, int RANK, int SLOTS> constexpr int shrink_bytes() {
    const int tiles = (Tile<T, kShrinkRows, kCols>::kElements + Tile<T, RANK, kCols>::kElements) * int(sizeof(T));
    const int sums = kGroups * kShrinkRows * RANK * int(sizeof(float));
    return SLOTS * tiles > sums ? SLOTS * tiles : sums;
}

template <typename T, int RANK, int SLOTS>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 && RANK <= 32 ? 2 : 1) shrink_kernel(const ShrinkPass p) {
    SHARED_MEMORY(memory);
    using Wide = Tile<T, kShrinkRows, kCols>;
    using Factor = Tile<T, RANK, kCols>;
    constexpr int kParts = kGroups / SLOTS, kPart = kCols / kParts;
    T* const wide = reinterpret_cast<T*>(memory);  // of each projection, or of all where nothing is dropped
    T* const factor = wide + SLOTS * Wide::kElements;
    float* const sums = reinterpret_cast<float*>(memory);  // (group, row, rank), once the tiles are no longer needed
    const int warp = threadIdx.x / 32, row_tile = warp % 2 * 16, group = warp / 2;
    const int slot = group / kParts, part = group % kParts * kPart;
    const int row0 = blockIdx.x * kShrinkRows, rows = p.rows - row0;
    const int ranks = rank_pieces(p.rank);
    const bool drops = p.dropout.rng;

    for (int round = 0; round < p.rounds; ++round) {
        float acc[RANK / 8][4] = {};
        const int64_t block0 = int64_t(round) * p.x_step;
        const int first = p.projections > 1 ? round * SLOTS : 0, count = min(p.projections - first, SLOTS);
        Wide x;
        Factor downs[SLOTS];
        const auto load = [&](int col0) {
            x.load(p.x, row0, rows, block0 + col0, p.cols - col0);
#pragma unroll
            for (int s = 0; s < SLOTS; ++s)
                if (s < count) downs[s].template load<true>(p.downs[first + s], 0, p.rank, col0, p.cols - col0);
        };
        load(0);
        for (int col0 = 0; col0 < p.cols; col0 += kCols) {
            uint32_t keep[SLOTS];
#pragma unroll
            for (int s = 0; s < SLOTS; ++s)
                if (drops && s < count) keep[s] = Wide::draw(dropout_of(p.dropout, first + s), row0, block0 + col0);
            __syncthreads();
#pragma unroll
            for (int s = 0; s < SLOTS; ++s) {
                if (s >= count) break;
                Wide dropped = x;
                if (drops) dropped.drop(keep[s], p.dropout.inverse_keep);
                if (drops || s == 0) dropped.store(wide + s * Wide::kElements);
                downs[s].store(factor + s * Factor::kElements);
            }
            __syncthreads();
            if (col0 + kCols < p.cols) load(col0 + kCols);
            if (slot < count)
                multiply<false, false>(
                    acc, wide + (drops ? slot * Wide::kElements : 0) + row_tile * Wide::kStride + part, Wide::kStride,
                    factor + slot * Factor::kElements + part, Factor::kStride, kPart, ranks);
        }
        __syncthreads();
        for_each_element(acc, ranks, [&](float v, int row, int col) {
            sums[(group * kShrinkRows + row_tile + row) * RANK + col] = v;
        });
        __syncthreads();
        const int width = count * p.rank;
        for (int e = threadIdx.x; e < kShrinkRows * width; e += kThreads) {
            const int row = e / width, column = e % width, s = column / p.rank, r = column % p.rank;
            float sum = 0.f;
            for (int q = s * kParts; q < (s + 1) * kParts; ++q) sum += sums[(q * kShrinkRows + row) * RANK + r];
            if (row < rows)
                static_cast<T*>(p.z)[int64_t(row0 + row) * p.z_stride + round * SLOTS * p.rank + column] =
                    from_float<T>(sum);
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
// A block owns up to 128 columns of one output block, or projection, and a strip of rows; its warps are 4 row tiles x 2
// column halves of a 64 x 128 tile.
template <typename T, int RANK> constexpr int expand_bytes() {
    return (Tile<T, kRows, kCols>::kElements + Tile<T, kRows, RANK>::kElements + Tile<T, kCols, RANK>::kElements) *
               int(sizeof(T)) +
           kCols * int(sizeof(float));
}

template <typename T, int RANK> __global__ void __launch_bounds__(kThreads, sizeof(T) == 2 ? 2 : 1)
    expand_kernel(const ExpandPass p) {
    SHARED_MEMORY(memory);
    using Wide = Tile<T, kRows, kCols>;
    using Thin = Tile<T, kRows, RANK>;
    using Factor = Tile<T, kCols, RANK>;
    T* const wide = reinterpret_cast<T*>(memory);
    T* const thin = wide + Wide::kElements;
    T* const factor = thin + Thin::kElements;
    float* const bias = reinterpret_cast<float*>(factor + Factor::kElements);

    int tile = blockIdx.x;
    const int j = projection_of(p.of, tile);
    const ExpandPass::Projection& each = p.of[j];
    const int chunks = ceil_div(each.cols, kCols), block = tile / chunks, col0 = tile % chunks * kCols;
    const int cols = each.cols - col0;
    const int64_t global0 = int64_t(block) * each.cols + col0, s0 = int64_t(block + j) * p.s_step;
    const float scale = each.scale_ptr ? *each.scale_ptr : p.scale;
    const Dropout dropout = dropout_of(p.dropout, j);
    const int warp = threadIdx.x / 32, row_tile = warp % 4 * 16, half = warp / 4 * (kCols / 2);
    Factor::template copy<true>(factor, each.up, col0, cols, 0, p.rank);
    for (int c = threadIdx.x; c < kCols; c += kThreads)
        bias[c] = each.bias && c < cols ? to_float(static_cast<const T*>(each.bias)[global0 + c]) : 0.f;

    const Strip strip(p.rows, blockIdx.y, gridDim.y);
    Thin s;
    if (strip.first < strip.last) s.load(p.s, strip.first, p.rows - strip.first, s0, p.rank);
    for (int row0 = strip.first; row0 < strip.last; row0 += kRows) {
        if (dropout.rng) s.drop(Thin::draw(dropout, row0, 0), dropout.inverse_keep);
        s.store(thin);
        __syncthreads();
        const int next = row0 + kRows;
        if (next < strip.last) s.load(p.s, next, p.rows - next, s0, p.rank);
        float acc[kCols / 16][4] = {};
        multiply<false, false>(acc, thin + row_tile * Thin::kStride, Thin::kStride, factor + half * Factor::kStride,
                               Factor::kStride, rank_pieces(p.rank) * 8, kCols / 16);
        for_each_element(acc, kCols / 16, [&](float v, int row, int col) {
            wide[(row_tile + row) * Wide::kStride + half + col] = from_float<T>(scale * v + bias[half + col]);
        });
        __syncthreads();
        Wide y;
        y.fetch(wide);
        y.write(static_cast<T*>(each.y), each.y_stride, each.y_aligned, row0, p.rows - row0, global0, cols);
    }
}

// ---- the mask, for tests --------------------------------------------------------------------------------------------
__global__ void __launch_bounds__(kThreads)
    philox_mask_kernel(const Dropout dropout, int64_t rows, int64_t columns, uint8_t* keep) {
    const int64_t e = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (e < rows * columns) keep[e] = dropped(dropout, 1.f, e / columns, e % columns) != 0.f;
}

template <typename T> void shrink(const LowRankLinear& p, void* stream) {
    const int block_cols = p.in_features / p.in_blocks;
    ShrinkPass args{};
    args.x = activation<T>(p.x, p.x_stride, p.in_blocks > 1 ? block_cols : 0);
    args.downs[0] = factor<T>(p.down, block_cols, p.down_float);
    args.z = p.z, args.z_stride = p.z_stride;
    args.rows = p.rows, args.rank = p.rank, args.cols = block_cols;
    args.projections = 1, args.rounds = p.in_blocks, args.x_step = block_cols;
    args.dropout = make_dropout(p.drop_input ? p.rng : nullptr, p.dropout_p);
    shrink(args, p.dtype, stream);
}

template <typename T> void expand(const LowRankLinear& p, void* stream) {
    const int block_cols = p.out_features / p.out_blocks, tiles = p.out_blocks * ceil_div(block_cols, kCols);
    ExpandPass args{};
    args.of[0] = {factor<T>(p.up, p.rank, p.up_float),
                  p.bias,
                  p.y,
                  p.out_features,
                  aligned16(p.y, p.out_features, p.out_blocks > 1 ? block_cols : 0, sizeof(T)),
                  block_cols,
                  tiles,
                  p.scale_ptr};
    args.s = p.mixed ? activation<T>(p.mixed, p.out_blocks * p.rank, p.out_blocks > 1 ? p.rank : 0)
                     : activation<T>(p.z, p.z_stride, 0);
    args.s_step = p.rank, args.rows = p.rows, args.rank = p.rank, args.scale = p.scale;
    expand(args, p.dtype, tiles, row_strips(p.dtype, p.rank, p.rows, block_cols, p.out_blocks, p.processors), stream);
}

}  // namespace

void shrink(ShrinkPass p, DType dtype, void* stream) {
    with_dtype_and_rank(dtype, p.rank, [&](auto type, auto rank) {
        using T = decltype(type);
        const dim3 grid(ceil_div(p.rows, kShrinkRows));
        if (p.projections > 1) {
            p.rounds = ceil_div(p.projections, kSlots<rank>);
            LAUNCH((shrink_kernel<T, rank, kSlots<rank>>), grid, kThreads, (shrink_bytes<T, rank, kSlots<rank>>()),
                   stream, p);
        } else {
            LAUNCH((shrink_kernel<T, rank, 1>), grid, kThreads, (shrink_bytes<T, rank, 1>()), stream, p);
        }
    });
}

int64_t shrink_shared_bytes(DType dtype, int64_t rank, int64_t projections) {
    int64_t bytes = 0;
    with_dtype_and_rank(dtype, rank, [&](auto type, auto bucket) {
        using T = decltype(type);
        bytes = projections > 1 ? shrink_bytes<T, bucket, kSlots<bucket>>() : shrink_bytes<T, bucket, 1>();
    });
    return bytes;
}

void expand(const ExpandPass& p, DType dtype, int64_t tiles, int64_t strips, void* stream) {
    with_dtype_and_rank(dtype, p.rank, [&](auto type, auto rank) {
        LAUNCH((expand_kernel<decltype(type), rank>), dim3(tiles, strips), kThreads,
               (expand_bytes<decltype(type), rank>()), stream, p);
    });
}

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
    with_dtype(p.dtype, [&](auto type) {
        if (p.in_features) shrink<decltype(type)>(p, stream);
        if (p.mixed) mix(p, stream);
        if (p.out_features) expand<decltype(type)>(p, stream);
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
        bytes = std::max(shrink_bytes<decltype(type), bucket, 1>(), expand_bytes<decltype(type), bucket>());
    });
    return bytes;
}

void philox_mask(const int64_t* rng, float p, int64_t rows, int64_t columns, uint8_t* keep, void* stream) {
    if (rows * columns == 0) return;
    LAUNCH(philox_mask_kernel, dim3(ceil_div(rows * columns, kThreads)), kThreads, 0, stream, make_dropout(rng, p),
           rows, columns, keep);
}
