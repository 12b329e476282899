// J low-rank linears of one x. See lowrank_projections.h; the passes that a single one consists of take most of it.
// Nothing is added atomically, so results repeat bit for bit.
#include <algorithm>

#include "lowrank_passes.cuh"

namespace peft {
namespace {

// ---- hidden_bwd: dz_j = drop_j(s_j sum_chunks T_j), or the sum over all j if there is one product with A ------------
struct Hidden {
    struct Projection {
        const float* t;
        int chunks;
        const float* scale;
    } of[kMostProjections];
    void* dz;
    int rows, rank, products, count;
    Dropout dropout;
};

template <typename T> __global__ void __launch_bounds__(kThreads) projections_hidden_bwd_kernel(const Hidden p) {
    const int columns = p.products * p.rank;
    const int64_t e = int64_t(blockIdx.x) * kThreads + threadIdx.x, row = e / columns;
    if (row >= p.rows) return;
    const int column = int(e % columns), r = column % p.rank;
    const int first = column / p.rank, last = p.products == 1 ? p.count : first + 1;
    float dz = 0.f;
    for (int j = first; j < last; ++j) {
        float v = 0.f;
#pragma unroll 4
        for (int n = 0; n < p.of[j].chunks; ++n) v += p.of[j].t[(int64_t(n) * p.rows + row) * p.rank + r];
        v *= *p.of[j].scale;
        dz += p.dropout.rng ? dropped(dropout_of(p.dropout, j), v, row, r) : v;
    }
    static_cast<T*>(p.dz)[e] = from_float<T>(dz);
}

// ---- down_bwd: x -> dA_j; dx0 = sum_j mask_j o (dz_j A_j) -----------------------------------------------------------
// A block owns up to 128 columns of x, and a strip of rows. It reads each 64-row tile once, keeps it in registers, and
// goes through the projections. Each masks the tile on its way to shared memory, adds to its gradient, 16 columns to
// a warp, and to the sum in registers that becomes dx0, 4 row tiles x 2 halves of the columns. Registers hold gradients
// of SLOTS projections; those of the others have blocks of their own (blockIdx.z), which leave dx0 to the first.
struct Down {
    Matrix x, dz, downs[kMostProjections];  // a null x: no dA; no `out`: no dx0
    int rows, rank, cols, count;
    bool shared;     // all add to one gradient
    float* partial;  // (strips, gradients, rank, cols)
    int64_t partial_strip;
    void* out;
    bool out_aligned;
    Dropout dropout;
};

template <typename T, int RANK> constexpr int down_bytes() {
    return (Tile<T, kRows, kCols>::kElements + Tile<T, kRows, RANK>::kElements +
            kSlots<RANK> * Tile<T, RANK, kCols>::kElements) *
               int(sizeof(T)) +
           kRows * kCols / 8;
}

template <typename T, int RANK> __global__ void __launch_bounds__(kThreads) projections_down_bwd_kernel(const Down p) {
    SHARED_MEMORY(memory);
    using Wide = Tile<T, kRows, kCols>;
    using Thin = Tile<T, kRows, RANK>;
    using Factor = Tile<T, RANK, kCols>;
    constexpr int SLOTS = kSlots<RANK>;
    T* const wide = reinterpret_cast<T*>(memory);
    T* const thin = wide + Wide::kElements;
    T* const factors = thin + Thin::kElements;
    uint8_t* const kept = reinterpret_cast<uint8_t*>(factors + SLOTS * Factor::kElements);  // 8 columns of a row each

    const int col0 = blockIdx.x * kCols, cols = p.cols - col0, pieces = rank_pieces(p.rank);
    const int warp = threadIdx.x / 32, row_tile = warp % 4 * 16, half = warp / 4;
    const bool drops = p.dropout.rng, out = p.out && blockIdx.z == 0, held = p.count <= SLOTS;
    const int own = blockIdx.z * SLOTS;  // the first whose gradient is this block's
    const int last = out || p.shared ? p.count : min(own + SLOTS, p.count);
    if (out && held)
        for (int j = 0; j < p.count; ++j)
            Factor::template copy<true>(factors + j * Factor::kElements, p.downs[j], 0, p.rank, col0, cols);

    const Strip strip(p.rows, blockIdx.y, gridDim.y);
    Wide x;
    Thin t;
    const auto load = [&](int row0, int j) {
        if (row0 >= strip.last) return;
        if (j == own && p.x.data) x.load(p.x, row0, p.rows - row0, col0, cols);
        t.load(p.dz, row0, p.rows - row0, j * p.rank, p.rank);
    };
    float gram[SLOTS][RANK / 8][4] = {};
    load(strip.first, own);
    for (int row0 = strip.first; row0 < strip.last; row0 += kRows) {
        float sum[kCols / 16][4] = {};
        for (int j = own; j < last; ++j) {
            uint32_t keep = ~0u;
            if (drops) keep = Wide::draw(dropout_of(p.dropout, j), row0, col0);
            __syncthreads();
            if (p.x.data && (drops || j == own)) {
                Wide dropped = x;
                if (drops) dropped.drop(keep, p.dropout.inverse_keep);
                dropped.store(wide);
            }
            t.store(thin);
            if (out && drops)
#pragma unroll
                for (int i = 0; i < Wide::kOcts; ++i)
                    kept[Wide::row_of(i) * (kCols / 8) + Wide::col() / 8] = keep >> (8 * i) & 0xffu;
            if (out && !held) Factor::template copy<true>(factors, p.downs[j], 0, p.rank, col0, cols);
            __syncthreads();
            if (j + 1 < last) load(row0, j + 1);
            else load(row0 + kRows, own);
            const int slot = !p.x.data || warp * 16 >= cols ? SLOTS : p.shared ? 0 : j - own;
#pragma unroll
            for (int s = 0; s < SLOTS; ++s)
                multiply<true, true>(gram[s], wide + warp * 16, Wide::kStride, thin, Thin::kStride,
                                     s == slot ? kRows : 0, pieces);  // none, not skipped: s stays a constant
            if (!out) continue;
            float acc[kCols / 16][4] = {};
            multiply<false, true>(acc, thin + row_tile * Thin::kStride, Thin::kStride,
                                  factors + (held ? j : 0) * Factor::kElements + half * (kCols / 2), Factor::kStride,
                                  pieces * 8, kCols / 16);
#pragma unroll
            for (int n = 0; n < kCols / 16; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int row = row_tile + lane_row() + i / 2 * 8, group = half * (kCols / 16) + n;
                    if (!drops) sum[n][i] += acc[n][i];
                    else if (kept[row * (kCols / 8) + group] >> (lane_col() + i % 2) & 1)
                        sum[n][i] += acc[n][i] * p.dropout.inverse_keep;
                }
        }
        if (!out) continue;
        __syncthreads();
        for_each_element(sum, kCols / 16, [&](float v, int row, int col) {
            wide[(row_tile + row) * Wide::kStride + half * (kCols / 2) + col] = from_float<T>(v);
        });
        __syncthreads();
        Wide dx;
        dx.fetch(wide);
        dx.write(static_cast<T*>(p.out), p.cols, p.out_aligned, row0, p.rows - row0, col0, cols);
    }
    if (!p.partial || warp * 16 >= cols) return;
    const int gradients = p.shared ? 1 : p.count;
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
        if (own + s >= gradients) break;
        float* const partial = p.partial + blockIdx.y * p.partial_strip + int64_t(own + s) * p.rank * p.cols;
        for_each_element(gram[s], pieces, [&](float v, int row, int r) {
            const int c = col0 + warp * 16 + row;
            if (c < p.cols && r < p.rank) partial[int64_t(r) * p.cols + c] = v;
        });
    }
}

// ---- what a call consists of ----------------------------------------------------------------------------------------
int64_t chunks_of(const ProjectionsKind& p, int j) { return ceil_div(p.out_features[j], kCols); }

int64_t chunks_of(const ProjectionsKind& p) {
    int64_t chunks = 0;
    for (int j = 0; j < p.count; ++j) chunks += chunks_of(p, j);
    return chunks;
}

int64_t columns_of(const ProjectionsKind& p) {
    int64_t columns = 0;
    for (int j = 0; j < p.count; ++j) columns += p.out_features[j];
    return columns;
}

int64_t strips_of(const ProjectionsKind& p, int64_t rows) {  // of the passes over all y_j or dY_j
    return row_strips(p.dtype, p.rank, rows, kCols, chunks_of(p), p.processors);
}

// Rounds of projections whose gradients registers hold.
int64_t rounds_of(const ProjectionsKind& p) {
    int64_t rounds = 1;
    if (p.needs_down && !p.shared)
        with_dtype_and_rank(p.dtype, p.rank, [&](auto, auto rank) { rounds = ceil_div(p.count, kSlots<rank>); });
    return rounds;
}

template <typename T> void shrink_all(const LowRankProjections& p, void* stream) {
    ShrinkPass args{};
    args.x = activation<T>(p.x, p.x_stride, 0);
    for (int j = 0; j < p.count; ++j) args.downs[j] = factor<T>(p.of[j].down, p.in_features, p.down_float);
    args.projections = p.products(), args.rounds = 1;
    args.z = p.z, args.z_stride = p.z_stride;
    args.rows = p.rows, args.rank = p.rank, args.cols = p.in_features;
    args.dropout = make_dropout(p.drop_input ? p.rng : nullptr, p.dropout_p);
    shrink(args, p.dtype, stream);
}

template <typename T> Matrix hidden_of(const LowRankProjections& p) {
    return activation<T>(p.z, p.z_stride, p.products() > 1 ? p.rank : 0);
}

template <typename T> void expand_all(const LowRankProjections& p, void* stream) {
    ExpandPass args{};
    for (int j = 0; j < p.count; ++j) {
        const auto& each = p.of[j];
        args.of[j] = {factor<T>(each.up, p.rank, p.up_float), each.bias, each.y, each.stride,
                      aligned16(each.y, each.stride, 0, sizeof(T)), int(p.out_features[j]), int(chunks_of(p, j)),
                      each.scale};
    }
    args.s = hidden_of<T>(p), args.s_step = p.products() > 1 ? p.rank : 0;
    args.rows = p.rows, args.rank = p.rank;
    args.dropout = make_dropout(p.drop_rank ? p.rng : nullptr, p.dropout_p);
    expand(args, p.dtype, chunks_of(p), strips_of(p, p.rows), stream);
}

// All dY_j -> T_j per column chunk, dB_j per strip
template <typename T> void up_bwd(const LowRankProjections& p, void* stream) {
    WidePass args{};
    int64_t columns = 0;
    for (int j = 0; j < p.count; columns += p.out_features[j++]) {
        auto& each = args.of[j];
        each.wide = activation<T>(p.of[j].dy, p.of[j].stride, 0);
        if (p.t_partial[j]) each.factor = factor<T>(p.of[j].up, p.rank, p.up_float);
        each.cols = p.out_features[j], each.tiles = chunks_of(p, j), each.t = p.t_partial[j];
        each.scale_ptr = p.of[j].scale;
        if (p.d_up_partial) each.partial = p.d_up_partial + columns * p.rank;
    }
    if (p.d_up_partial) args.thin = hidden_of<T>(p);
    args.rows = p.rows, args.rank = p.rank, args.blocks = 1, args.thin_step = p.products() > 1 ? p.rank : 0;
    args.partial_strip = columns * p.rank, args.partial_c = p.rank, args.partial_r = 1;
    args.thin_dropout = make_dropout(p.drop_rank && p.d_up_partial ? p.rng : nullptr, p.dropout_p);
    wide_bwd(Pass::up, args, p.dtype, chunks_of(p), p.up_strips, 1, stream);
}

template <typename T> void hidden_bwd(const LowRankProjections& p, void* stream) {
    Hidden args{};
    for (int j = 0; j < p.count; ++j) args.of[j] = {p.t_partial[j], int(chunks_of(p, j)), p.of[j].scale};
    args.dz = p.dz, args.rows = p.rows, args.rank = p.rank, args.products = p.products(), args.count = p.count;
    args.dropout = make_dropout(p.drop_rank ? p.rng : nullptr, p.dropout_p);
    const int64_t elements = p.rows * args.products * p.rank;
    LAUNCH(projections_hidden_bwd_kernel<T>, dim3(ceil_div(elements, kThreads)), kThreads, 0, stream, args);
}

// x, dz_j -> dA_j per strip, dx0. One product is a low-rank linear's.
template <typename T> void down_bwd(const LowRankProjections& p, void* stream) {
    const int64_t columns = p.products() * p.rank, tiles = ceil_div(p.in_features, kCols);
    const Matrix x = p.d_down_partial ? activation<T>(p.x, p.x_stride, 0) : Matrix{};
    const Matrix dz = activation<T>(p.dz, columns, p.products() > 1 ? p.rank : 0);
    const bool out_aligned = aligned16(p.dx, p.in_features, 0, sizeof(T));
    if (p.products() == 1) {
        WidePass args{};
        auto& each = args.of[0];
        each.wide = x, each.cols = p.in_features, each.tiles = tiles, each.partial = p.d_down_partial;
        if (p.dx) each.factor = factor<T>(p.of[0].down, p.in_features, p.down_float);
        args.thin = dz, args.rows = p.rows, args.rank = p.rank, args.blocks = 1;
        args.partial_strip = p.rank * p.in_features, args.partial_c = 1, args.partial_r = p.in_features;
        args.out = p.dx, args.out_aligned = out_aligned;
        args.dropout = make_dropout(p.drop_input ? p.rng : nullptr, p.dropout_p);
        return wide_bwd(Pass::down, args, p.dtype, tiles, p.down_strips, 1, stream);
    }
    Down args{};
    args.x = x, args.dz = dz;
    for (int j = 0; j < p.count; ++j) args.downs[j] = factor<T>(p.of[j].down, p.in_features, p.down_float);
    args.rows = p.rows, args.rank = p.rank, args.cols = p.in_features, args.count = p.count, args.shared = p.shared;
    args.partial = p.d_down_partial, args.partial_strip = (p.shared ? p.rank : columns) * p.in_features;
    args.out = p.dx, args.out_aligned = out_aligned;
    args.dropout = make_dropout(p.drop_input ? p.rng : nullptr, p.dropout_p);
    with_dtype_and_rank(p.dtype, p.rank, [&](auto, auto rank) {
        LAUNCH((projections_down_bwd_kernel<T, rank>), dim3(tiles, p.down_strips, rounds_of(p)), kThreads,
               (down_bytes<T, rank>()), stream, args);
    });
}

// Sets the strips of a call, and where in the workspace is what lives between its kernels. Returns the floats it takes.
int64_t plan(LowRankProjections& p, float* workspace) {
    int64_t used = 0;
    const auto take = [&](auto*& pointer, int64_t count, int64_t bytes = 4) {
        pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(workspace + used);
        used += ceil_div(count * bytes, 16) * 4;
    };
    p.up_strips = strips_of(p, p.rows);
    const bool down = p.needs_x || p.needs_down;
    if (down || p.needs_z)
        for (int j = 0; j < p.count; ++j) take(p.t_partial[j], chunks_of(p, j) * p.rows * p.rank);
    if (down) {
        // Several projections' pass over x takes as many registers as a kernel for the largest rank.
        const int64_t most_rank = p.products() > 1 ? kLowRankLinearMaxRank : p.rank;
        p.down_strips = row_strips(p.dtype, most_rank, p.rows, p.in_features, rounds_of(p), p.processors);
        take(p.dz, p.rows * p.products() * p.rank, p.dtype == DType::float32 ? 4 : 2);
    }
    if (p.needs_up) take(p.d_up_partial, p.up_strips * columns_of(p) * p.rank);
    if (p.needs_down) take(p.d_down_partial, p.down_strips * (p.shared ? 1 : p.count) * p.rank * p.in_features);
    return used;
}

}  // namespace
}  // namespace peft

using namespace peft;

void lowrank_projections_fwd(const LowRankProjections& p, void* stream) {
    with_dtype(p.dtype, [&](auto type) {
        if (p.in_features) shrink_all<decltype(type)>(p, stream);
        expand_all<decltype(type)>(p, stream);
    });
}

int64_t lowrank_projections_bwd_floats(const ProjectionsKind& kind, int64_t rows) {
    LowRankProjections p{kind};
    p.rows = rows;
    return plan(p, nullptr);
}

void lowrank_projections_bwd(LowRankProjections p, float* workspace, void* stream) {
    plan(p, workspace);
    with_dtype(p.dtype, [&](auto type) {
        using T = decltype(type);
        up_bwd<T>(p, stream);
        if (p.dz) hidden_bwd<T>(p, stream);
        if (p.needs_x || p.needs_down) down_bwd<T>(p, stream);
    });
    const int64_t down_elements = (p.shared ? 1 : p.count) * p.rank * p.in_features;
    reduce({{p.d_up_partial, p.up_strips, columns_of(p) * p.rank, p.d_up, p.up_float},
            {p.d_down_partial, p.down_strips, down_elements, p.d_down, p.down_float},
            {}},
           p.dtype, stream);
}

int64_t lowrank_projections_shared_bytes(DType dtype, int64_t rank) {
    int64_t bytes = 0;
    with_dtype_and_rank(dtype, rank, [&](auto type, auto bucket) { bytes = down_bytes<decltype(type), bucket>(); });
    return std::max({bytes, shrink_shared_bytes(dtype, rank, kMostProjections),
                     lowrank_linear_fwd_shared_bytes(dtype, rank), lowrank_linear_bwd_shared_bytes(dtype, rank)});
}
