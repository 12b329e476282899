// Backward of the low-rank linear. One kernel passes over a wide matrix (dY, x, or dS for the core's gradient), tile by
// tile, each tile read once for both its products; hidden_bwd turns T into dz, unless the pass that needs dz makes it;
// reduce adds the partial sums of the gradients. Nothing is added atomically, so results repeat bit for bit.
#include "lowrank_passes.cuh"

namespace peft {
namespace {

// ---- a pass over a wide matrix: see WidePass ------------------------------------------------------------------------
// dz of the rows of a tile, where there is no core: s sum_chunks T through the mask of S or of z, one column block.
template <typename T, int RANK>
__device__ __forceinline__ void sum_chunks(Tile<T, kRows, RANK>& thin, const WidePass& p, int row0) {
    const int col = thin.col(), rank = p.rank;
    const WidePass::Projection& each = p.of[0];
    const float scale = each.scale_ptr ? *each.scale_ptr : p.scale;  // again for every tile: not held in a register
#pragma unroll
    for (int i = 0; i < thin.kOcts; ++i) {
        const int row = row0 + thin.row_of(i), count = row < p.rows ? rank - col : 0;
        const float* chunk = each.t + int64_t(row) * rank + col;
        float sum[8] = {};
#pragma unroll 4
        for (int n = 0; n < p.t_chunks; ++n, chunk += int64_t(p.rows) * rank) {
            const Oct<float> part = load_oct(chunk, count, p.t_aligned);
#pragma unroll
            for (int j = 0; j < 8; ++j) sum[j] += part.v[j];
        }
        const bool drops = p.thin_dropout.rng;
        const uint32_t keep = drops ? keep_oct(p.thin_dropout, row, col) : ~0u;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            float v = scale * sum[j];
            if (drops) v = keep >> j & 1 ? v * p.thin_dropout.inverse_keep : 0.f;
            thin.octs[i].v[j] = from_float<T>(v);
        }
    }
}

template <typename T, int RANK, Pass PASS>
using FactorTile = std::conditional_t<PASS == Pass::up, Tile<T, kCols, RANK>, Tile<T, RANK, kCols>>;

template <typename T, int RANK, Pass PASS> constexpr int wide_bytes() {
    return (Tile<T, kRows, kCols>::kElements + Tile<T, kRows, RANK>::kElements + FactorTile<T, RANK, PASS>::kElements) *
           int(sizeof(T));
}

template <typename T, int RANK, Pass PASS>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 && RANK <= 64 ? 2 : 1) wide_bwd_kernel(const WidePass p) {
    SHARED_MEMORY(memory);
    using Wide = Tile<T, kRows, kCols>;
    using Thin = Tile<T, kRows, RANK>;
    using Factor = FactorTile<T, RANK, PASS>;
    T* const wide = reinterpret_cast<T*>(memory);
    T* const thin = wide + Wide::kElements;
    T* const factor = thin + Thin::kElements;

    int tile = blockIdx.x;
    const int j = PASS == Pass::up ? projection_of(p.of, tile) : 0;
    const WidePass::Projection& each = p.of[j];
    const int chunks = ceil_div(each.cols, kCols), block = tile / chunks, chunk = tile % chunks;
    const int col0 = chunk * kCols, cols = each.cols - col0, pieces = rank_pieces(p.rank);
    const int64_t global0 = int64_t(block) * each.cols + col0;
    const int64_t thin0 = int64_t(block + j) * p.thin_step + int64_t(blockIdx.z) * p.thin_z;
    const int warp = threadIdx.x / 32, row_tile = warp % 4 * 16, half = warp / 4;
    if (each.factor.data) {
        if (PASS == Pass::up) Factor::template copy<true>(factor, each.factor, col0, cols, 0, p.rank);
        else Factor::template copy<true>(factor, each.factor, 0, p.rank, col0, cols);
    }

    const bool drops = PASS != Pass::up && p.dropout.rng;
    const bool has_thin = PASS == Pass::down_from_t || p.thin.data;
    const Strip strip(p.rows, blockIdx.y, gridDim.y);
    Wide w;
    Thin t;
    const auto load = [&](int row0) {
        if (row0 >= strip.last) return;
        if (each.wide.data) w.load(each.wide, row0, p.rows - row0, global0, cols);
        if (PASS != Pass::down_from_t && p.thin.data) t.load(p.thin, row0, p.rows - row0, thin0, p.rank);
    };
    float gram[RANK / 8][4] = {};
    load(strip.first);
    for (int row0 = strip.first; row0 < strip.last; row0 += kRows) {
        const int rows = p.rows - row0;
        uint32_t keep = ~0u;
        if (drops) keep = Wide::draw(p.dropout, row0, global0);
        if (PASS == Pass::up && p.thin_dropout.rng)
            t.drop(Thin::draw(dropout_of(p.thin_dropout, j), row0, 0), p.thin_dropout.inverse_keep);
        if constexpr (PASS == Pass::down_from_t) sum_chunks<T, RANK>(t, p, row0);
        __syncthreads();
        if (each.wide.data) {
            if (drops) w.drop(keep, p.dropout.inverse_keep);
            w.store(wide);
        }
        if (has_thin) t.store(thin);
        __syncthreads();
        load(row0 + kRows);
        if (each.partial && warp * 16 < cols)
            multiply<true, true>(gram, wide + warp * 16, Wide::kStride, thin, Thin::kStride, kRows, pieces);
        if (PASS == Pass::up && each.t) {
            const int larger = (pieces / 2 + 1) / 2 * 2, first = half * larger, count = half ? pieces - larger : larger;
            float acc[RANK / 16][4] = {};
            multiply<false, true>(acc, wide + row_tile * Wide::kStride, Wide::kStride, factor + first * 8,
                                  Factor::kStride, min(kCols, (cols + 15) / 16 * 16), count);
            for_each_element(acc, count, [&](float v, int row, int col) {
                const int r = first * 8 + col;
                if (row_tile + row < rows && r < p.rank)
                    each.t[((int64_t(chunk) * p.rows + row0 + row_tile + row) * p.blocks + block) * p.rank + r] = v;
            });
        }
        if (PASS != Pass::up && p.out) {
            float acc[kCols / 16][4] = {};
            multiply<false, true>(acc, thin + row_tile * Thin::kStride, Thin::kStride, factor + half * (kCols / 2),
                                  Factor::kStride, pieces * 8, kCols / 16);
            __syncthreads();
            for_each_element(acc, kCols / 16, [&](float v, int row, int col) {
                wide[(row_tile + row) * Wide::kStride + half * (kCols / 2) + col] = from_float<T>(v);
            });
            __syncthreads();
            Wide out;
            out.fetch(wide);
            if (drops) out.drop(keep, p.dropout.inverse_keep);
            out.write(static_cast<T*>(p.out), int64_t(p.blocks) * each.cols, p.out_aligned, row0, rows, global0, cols);
        }
    }
    if (!each.partial || warp * 16 >= cols) return;
    float* const partial = each.partial + blockIdx.y * p.partial_strip + block * p.partial_block +
                           blockIdx.z * p.partial_z;
    const float scale = PASS != Pass::up ? 1.f : each.scale_ptr ? *each.scale_ptr : p.scale;
    for_each_element(gram, pieces, [&](float v, int row, int r) {
        const int c = col0 + warp * 16 + row;
        if (c < each.cols && r < p.rank && (!p.diagonal || c == r))
            partial[c * p.partial_c + r * p.partial_r] = scale * v;
    });
}

// The chunks into which an output block of dY's columns is divided: as many as T has pieces.
__host__ __device__ inline int column_chunks(const LowRankKind& p) {
    return ceil_div(p.out_features / p.out_blocks, kCols);
}

int64_t tiles_of(WidePass& args, int64_t cols, int64_t blocks) {
    args.blocks = blocks, args.of[0].cols = cols;
    return args.of[0].tiles = blocks * ceil_div(cols, kCols);
}

// dY -> T per column chunk, dB per strip and output block
template <typename T> void up_bwd(const LowRankLinear& p, void* stream) {
    const int64_t cols = p.out_features / p.out_blocks, rank = p.rank;
    WidePass args{};
    WidePass::Projection& each = args.of[0];
    each.wide = activation<T>(p.dy, p.dy_stride, p.out_blocks > 1 ? cols : 0);
    args.rows = p.rows, args.rank = rank, args.thin_step = rank;
    if (p.d_up_partial)
        args.thin = p.mixed ? activation<T>(p.mixed, p.out_blocks * rank, p.out_blocks > 1 ? rank : 0)
                            : activation<T>(p.z, p.z_stride, 0);
    if (p.t_partial) each.factor = factor<T>(p.up, rank, p.up_float);
    each.partial = p.d_up_partial, each.t = p.t_partial, each.scale_ptr = p.scale_ptr, args.scale = p.scale;
    args.partial_strip = p.out_blocks * cols * rank, args.partial_block = cols * rank;
    args.partial_c = rank, args.partial_r = 1;
    wide_bwd(Pass::up, args, p.dtype, tiles_of(args, cols, p.out_blocks), p.up_strips, 1, stream);
}

// x -> dA per strip and input block; dz, or the chunks that it is the sum of -> dx0
template <typename T> void down_bwd(const LowRankLinear& p, void* stream) {
    const int64_t cols = p.in_features / p.in_blocks, rank = p.rank, block_cols = p.in_blocks > 1 ? cols : 0;
    WidePass args{};
    WidePass::Projection& each = args.of[0];
    if (p.d_down_partial) each.wide = activation<T>(p.x, p.x_stride, block_cols);
    if (p.dz) {
        args.thin = activation<T>(p.dz, p.dz_stride, p.in_blocks > 1 ? rank : 0);
    } else {
        each.t = p.t_partial, args.t_aligned = aligned16(p.t_partial, rank, 0, sizeof(float));
        args.t_chunks = column_chunks(p), args.scale = p.scale, each.scale_ptr = p.scale_ptr;
        args.thin_dropout = make_dropout(p.drop_input ? nullptr : p.rng, p.dropout_p);
    }
    args.rows = p.rows, args.rank = rank, args.thin_step = rank;
    if (p.dx) each.factor = factor<T>(p.down, cols, p.down_float);
    args.out = p.dx, args.out_aligned = aligned16(p.dx, p.in_features, block_cols, sizeof(T));
    each.partial = p.d_down_partial;
    args.partial_strip = p.in_blocks * cols * rank, args.partial_block = cols * rank;
    args.partial_c = 1, args.partial_r = cols;
    args.dropout = make_dropout(p.drop_input ? p.rng : nullptr, p.dropout_p);
    wide_bwd(p.dz ? Pass::down : Pass::down_from_t, args, p.dtype, tiles_of(args, cols, p.in_blocks), p.down_strips, 1,
             stream);
}

// dS, z -> dcore per strip: dK[o,i] = dS_o^T z_i, of which a diagonal core needs the diagonal
template <typename T> void core_bwd(const LowRankLinear& p, void* stream) {
    const int64_t rank = p.rank, per_pair = p.core_kind == Core::dense ? rank * rank : rank;
    WidePass args{};
    args.of[0].wide = activation<T>(p.ds, p.out_blocks * rank, p.out_blocks > 1 ? rank : 0);
    args.thin = p.dropped ? activation<T>(p.dropped, p.in_blocks * rank, p.in_blocks > 1 ? rank : 0)
                          : activation<T>(p.z, p.z_stride, p.in_blocks > 1 ? rank : 0);
    args.rows = p.rows, args.rank = rank, args.thin_z = rank;
    args.of[0].partial = p.d_core_partial, args.diagonal = p.core_kind == Core::diagonal;
    args.partial_strip = p.out_blocks * p.in_blocks * per_pair;
    args.partial_block = p.in_blocks * per_pair, args.partial_z = per_pair;
    args.partial_c = args.diagonal ? 0 : rank, args.partial_r = 1;
    wide_bwd(Pass::up, args, p.dtype, tiles_of(args, rank, p.out_blocks), p.core_strips, p.in_blocks, stream);
}

// ---- hidden_bwd: dS = drop(s sum_chunks T), dz_i = drop(sum_o dS_o core[o,i]) ---------------------------------------
template <typename T> __global__ void __launch_bounds__(kThreads)
    hidden_bwd_kernel(const LowRankLinear p, const Dropout dropout) {
    SHARED_MEMORY(memory);
    float* const ds = reinterpret_cast<float*>(memory);  // (kMixRows, O R)
    const int rank = p.rank, in = p.in_blocks * rank, out = p.out_blocks * rank;
    const int chunks = column_chunks(p);
    const int64_t row0 = int64_t(blockIdx.x) * kMixRows;
    const float scale = p.scale_ptr ? *p.scale_ptr : p.scale;
    for (int e = threadIdx.x; e < kMixRows * out; e += kThreads) {
        const int64_t row = row0 + e / out;
        float v = 0.f;
        if (row < p.rows) {
#pragma unroll 4
            for (int chunk = 0; chunk < chunks; ++chunk) v += p.t_partial[(chunk * p.rows + row) * out + e % out];
            v *= scale;
            if (p.drop_core) v = dropped(dropout, v, row, e % out);
            if (p.ds) static_cast<T*>(p.ds)[row * out + e % out] = from_float<T>(v);
        }
        ds[e] = v;
    }
    __syncthreads();
    if (!p.dz) return;
    for (int e = threadIdx.x; e < kMixRows / 4 * in; e += kThreads) {
        const int first = e / in * 4, col = e % in;
        float acc[4] = {};
        apply_core<T, true>(acc, ds + first * out, out, p, col / rank, col % rank);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int64_t row = row0 + first + i;
            if (row >= p.rows) break;
            const float v = p.drop_rank ? dropped(dropout, acc[i], row, col) : acc[i];
            static_cast<T*>(p.dz)[row * p.dz_stride + col] = from_float<T>(v);
        }
    }
}

// ---- reduce ---------------------------------------------------------------------------------------------------------
constexpr int kReduceThreads = 128;

template <typename T> __global__ void __launch_bounds__(kReduceThreads) reduce_kernel(const Reduce p) {
    const Sum sum = blockIdx.y == 0 ? p.up : blockIdx.y == 1 ? p.down : p.core;
    const int64_t e = int64_t(blockIdx.x) * kReduceThreads + threadIdx.x;
    if (!sum.partial || e >= sum.elements) return;
    float v = 0.f;
#pragma unroll 8
    for (int64_t i = 0; i < sum.count; ++i) v += sum.partial[i * sum.elements + e];
    if (sum.is_float) static_cast<float*>(sum.total)[e] = v;
    else static_cast<T*>(sum.total)[e] = from_float<T>(v);
}

// ---- what a call consists of ----------------------------------------------------------------------------------------
struct Stages {
    bool mixed, dropped, up, t, hidden, core, down;
    explicit Stages(const LowRankKind& p) {
        down = p.needs_down || (p.needs_x && p.in_features > 0);
        t = p.needs_core || (p.out_features > 0 && (down || p.needs_z));
        up = t || p.needs_up;
        core = p.needs_core;
        mixed = p.needs_up && (p.core_kind != Core::none || p.drop_rank || p.drop_core);
        dropped = p.needs_core && p.drop_rank;
        const int64_t reads = column_chunks(p) * ceil_div(p.in_features / p.in_blocks, kCols);
        const bool from_t = down && !p.needs_z && p.core_kind == Core::none && reads <= kMostChunkReads;
        hidden = t && !from_t;
    }
};

// Sets the strips of a call, and where in the workspace is what lives between its kernels. Returns the floats it takes.
int64_t plan(LowRankLinear& p, float* workspace) {
    const Stages stages(p);
    const int64_t rows = p.rows, rank = p.rank, in = p.in_blocks * rank, out = p.out_blocks * rank;
    const int64_t element = p.dtype == DType::float32 ? 4 : 2, pairs = p.out_blocks * p.in_blocks;
    const auto strips = [&](int64_t cols, int64_t blocks) {
        return row_strips(p.dtype, rank, rows, cols, blocks, p.processors);
    };
    int64_t used = 0;
    const auto take = [&](auto*& pointer, int64_t count, int64_t bytes = 4) {
        pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(workspace + used);
        used += ceil_div(count * bytes, 16) * 4;
    };
    if (stages.up) p.up_strips = strips(p.out_features / p.out_blocks, p.out_blocks);
    if (stages.down) p.down_strips = strips(p.in_features / p.in_blocks, p.in_blocks);
    if (stages.core) p.core_strips = strips(rank, pairs);
    if (stages.mixed) take(p.mixed, rows * out, element);
    if (stages.dropped) take(p.dropped, rows * in, element);
    if (stages.t) take(p.t_partial, column_chunks(p) * rows * out);
    if (stages.core) take(p.ds, rows * out, element);
    if (stages.hidden && stages.down && !p.needs_z) {
        take(p.dz, rows * in, element);
        p.dz_stride = in;
    }
    if (p.needs_up) take(p.d_up_partial, p.up_strips * p.out_features * rank);
    if (p.needs_down) take(p.d_down_partial, p.down_strips * p.in_features * rank);
    if (stages.core) take(p.d_core_partial, p.core_strips * pairs * rank * (p.core_kind == Core::dense ? rank : 1));
    return used;
}

void reduce_gradients(const LowRankLinear& p, void* stream) {
    const int64_t rank = p.rank, core = p.out_blocks * p.in_blocks * (p.core_kind == Core::dense ? rank * rank : rank);
    reduce({{p.d_up_partial, p.up_strips * p.out_blocks, p.out_features / p.out_blocks * rank, p.d_up, p.up_float},
            {p.d_down_partial, p.down_strips * p.in_blocks, p.in_features / p.in_blocks * rank, p.d_down, p.down_float},
            {p.d_core_partial, p.core_strips, core, p.d_core, p.core_float}},
           p.dtype, stream);
}

}  // namespace

void wide_bwd(Pass pass, const WidePass& p, DType dtype, int64_t tiles, int64_t strips, int64_t z, void* stream) {
    with_dtype_and_rank(dtype, p.rank, [&](auto type, auto rank) {
        const auto run = [&](auto chosen) {
            LAUNCH((wide_bwd_kernel<decltype(type), rank, chosen>), dim3(tiles, strips, z), kThreads,
                   (wide_bytes<decltype(type), rank, chosen>()), stream, p);
        };
        if (pass == Pass::up) run(std::integral_constant<Pass, Pass::up>{});
        else if (pass == Pass::down) run(std::integral_constant<Pass, Pass::down>{});
        else run(std::integral_constant<Pass, Pass::down_from_t>{});
    });
}

void reduce(const Reduce& sums, DType dtype, void* stream) {
    int64_t most = 0;
    for (const Sum& sum : {sums.up, sums.down, sums.core})
        if (sum.partial && sum.elements > most) most = sum.elements;
    if (most == 0) return;
    with_dtype(dtype, [&](auto type) {
        LAUNCH(reduce_kernel<decltype(type)>, dim3(ceil_div(most, kReduceThreads), 3), kReduceThreads, 0, stream, sums);
    });
}

}  // namespace peft

using namespace peft;

int64_t lowrank_linear_bwd_floats(const LowRankKind& kind, int64_t rows) {
    LowRankLinear p{kind};
    p.rows = rows;
    return plan(p, nullptr);
}

void lowrank_linear_bwd(LowRankLinear p, float* workspace, void* stream) {
    plan(p, workspace);
    const Stages stages(p);
    with_dtype(p.dtype, [&](auto type) {
        using T = decltype(type);
        if (stages.mixed || stages.dropped) mix(p, stream);
        if (stages.up) up_bwd<T>(p, stream);
        if (stages.hidden) {
            const size_t shared_bytes = kMixRows * p.out_blocks * p.rank * sizeof(float);
            LAUNCH(hidden_bwd_kernel<T>, dim3(ceil_div(p.rows, kMixRows)), kThreads, shared_bytes, stream, p,
                   make_dropout(p.rng, p.dropout_p));
        }
        if (stages.core) core_bwd<T>(p, stream);
        if (stages.down) down_bwd<T>(p, stream);
        reduce_gradients(p, stream);
    });
}

int64_t lowrank_linear_bwd_shared_bytes(DType dtype, int64_t rank) {
    int64_t bytes = 0;
    with_dtype_and_rank(dtype, rank,
                        [&](auto type, auto bucket) { bytes = wide_bytes<decltype(type), bucket, Pass::up>(); });
    return bytes;
}
