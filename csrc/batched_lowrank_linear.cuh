// What the forward and backward of the batched low-rank linear share: shrink (wide -> thin) and expand (thin -> wide),
// which gather rows by the list that sorts them by adapter. See batched_lowrank_linear.h.
#pragma once
#include "batched_lowrank_linear.h"
#include "lowrank_linear.cuh"

namespace peft {

static_assert(kSegmentRows == kRows, "a tile of places is a tile of rows");

struct Adapters {
    const int64_t *order, *offsets, *tile_adapter, *tile_first;
    float scale;
    const float* scale_ptr;  // null: `scale`

    __device__ __forceinline__ float scale_of(int64_t adapter) const { return scale_ptr ? scale_ptr[adapter] : scale; }
};

// Neighbouring places of one adapter, or of none (-1): part of a tile.
struct Places {
    int64_t adapter, first;
    int count;  // not positive where there is nothing to do
    __device__ __forceinline__ Places(const Adapters& p, int64_t tile, int part0, int part_rows) {
        adapter = p.tile_adapter[tile];
        first = p.tile_first[tile] + part0;
        count = int(min(p.offsets[adapter + 1] - first, int64_t(part_rows)));
    }
};

// One adapter's factor, `elements` from one to the next.
template <typename T> __device__ __forceinline__ Matrix factor_of(Matrix m, int64_t adapter, int64_t elements) {
    m.data = static_cast<const char*>(m.data) + adapter * elements * (m.is_float ? 4 : int(sizeof(T)));
    return m;
}

// A piece of a factor in shared memory. A lies as (R, wide columns), B as (wide columns, R).
enum class Factor { down, up };
template <typename T, int RANK, Factor FACTOR>
using FactorTile = std::conditional_t<FACTOR == Factor::up, Tile<T, kCols, RANK>, Tile<T, RANK, kCols>>;

// ---- shrink: thin[row] = s_l wide[row] F_l^T ------------------------------------------------------------------------
// A block owns 32 places. Its 8 warps are 2 row tiles x 4 quarters of every 128-column chunk; the four quarters' sums
// meet at the end.
constexpr int kShrinkRows = 32, kShrinkParts = kSegmentRows / kShrinkRows, kQuarter = kCols / 4;

struct Shrink {
    Adapters adapters;
    Matrix wide, factor;
    void* thin;
    int cols, rank;
};

template <typename T, int RANK, Factor FACTOR> constexpr int shrink_bytes() {
    const int tiles =
        (Tile<T, kShrinkRows, kCols>::kElements + FactorTile<T, RANK, FACTOR>::kElements) * int(sizeof(T));
    const int sums = 4 * kShrinkRows * RANK * int(sizeof(float));
    return tiles > sums ? tiles : sums;
}

template <typename T, int RANK, Factor FACTOR>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 && RANK <= 64 ? 2 : 1)
    batched_shrink_kernel(const Shrink p) {
    SHARED_MEMORY(memory);
    using Wide = Tile<T, kShrinkRows, kCols>;
    using FTile = FactorTile<T, RANK, FACTOR>;
    constexpr bool kUp = FACTOR == Factor::up;
    T* const wide = reinterpret_cast<T*>(memory);
    T* const factor = wide + Wide::kElements;
    float* const sums = reinterpret_cast<float*>(memory);  // (quarter, place, rank), once the tiles are not needed

    const Places places(p.adapters, blockIdx.x / kShrinkParts, blockIdx.x % kShrinkParts * kShrinkRows, kShrinkRows);
    if (places.adapter < 0 || places.count <= 0) return;
    const int warp = threadIdx.x / 32, row_tile = warp % 2 * 16, quarter = warp / 2, ranks = rank_pieces(p.rank);
    const Matrix source = factor_of<T>(p.factor, places.adapter, int64_t(p.rank) * p.cols);
    const int64_t* const order = p.adapters.order + places.first;
    typename Wide::Rows rows;
    rows.find(order, places.count);

    Wide w;
    FTile f;
    const auto load = [&](int col0) {
        w.gather(p.wide, rows, col0, p.cols - col0);
        if (kUp) f.template load<true>(source, col0, p.cols - col0, 0, p.rank);
        else f.template load<true>(source, 0, p.rank, col0, p.cols - col0);
    };
    float acc[RANK / 8][4] = {};
    load(0);
    for (int col0 = 0; col0 < p.cols; col0 += kCols) {
        __syncthreads();
        w.store(wide);
        f.store(factor);
        __syncthreads();
        if (col0 + kCols < p.cols) load(col0 + kCols);
        multiply<false, kUp>(acc, wide + row_tile * Wide::kStride + quarter * kQuarter, Wide::kStride,
                             factor + quarter * kQuarter * (kUp ? FTile::kStride : 1), FTile::kStride, kQuarter, ranks);
    }
    __syncthreads();
    for_each_element(acc, ranks, [&](float v, int row, int col) {
        sums[(quarter * kShrinkRows + row_tile + row) * RANK + col] = v;
    });
    __syncthreads();
    const float scale = p.adapters.scale_of(places.adapter);
    for (int e = threadIdx.x; e < places.count * p.rank; e += kThreads) {
        const int place = e / p.rank, r = e % p.rank;
        float sum = 0.f;
        for (int q = 0; q < 4; ++q) sum += sums[(q * kShrinkRows + place) * RANK + r];
        static_cast<T*>(p.thin)[order[place] * p.rank + r] = from_float<T>(scale * sum);
    }
}

// ---- expand: wide[row] = s_l thin[row] F_l + bias -------------------------------------------------------------------
// A block owns a tile of 64 places and up to 128 columns; its warps are 4 row tiles x 2 column halves. Rows without an
// adapter get the bias, or 0.
struct Expand {
    Adapters adapters;
    Matrix thin, factor;
    const void* bias;
    void* wide;
    bool wide_aligned;
    int cols, rank;
};

template <typename T, int RANK, Factor FACTOR> constexpr int expand_bytes() {
    return (Tile<T, kRows, kCols>::kElements + Tile<T, kRows, RANK>::kElements +
            FactorTile<T, RANK, FACTOR>::kElements) *
               int(sizeof(T)) +
           kCols * int(sizeof(float));
}

template <typename T, int RANK, Factor FACTOR>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 ? 2 : 1) batched_expand_kernel(const Expand p) {
    SHARED_MEMORY(memory);
    using Wide = Tile<T, kRows, kCols>;
    using Thin = Tile<T, kRows, RANK>;
    using FTile = FactorTile<T, RANK, FACTOR>;
    constexpr bool kUp = FACTOR == Factor::up;
    T* const wide = reinterpret_cast<T*>(memory);
    T* const thin = wide + Wide::kElements;
    T* const factor = thin + Thin::kElements;
    float* const bias = reinterpret_cast<float*>(factor + FTile::kElements);

    const int chunks = ceil_div(p.cols, kCols), col0 = blockIdx.x % chunks * kCols, cols = p.cols - col0;
    const Places places(p.adapters, blockIdx.x / chunks, 0, kRows);
    if (places.count <= 0) return;
    const int warp = threadIdx.x / 32, row_tile = warp % 4 * 16, half = warp / 4 * (kCols / 2);
    const int64_t* const order = p.adapters.order + places.first;
    float acc[kCols / 16][4] = {}, scale = 0.f;
    for (int c = threadIdx.x; c < kCols; c += kThreads)
        bias[c] = p.bias && c < cols ? to_float(static_cast<const T*>(p.bias)[col0 + c]) : 0.f;
    if (places.adapter >= 0) {
        scale = p.adapters.scale_of(places.adapter);
        typename Thin::Rows rows;
        rows.find(order, places.count);
        Thin t;
        t.gather(p.thin, rows, 0, p.rank);
        const Matrix source = factor_of<T>(p.factor, places.adapter, int64_t(p.rank) * p.cols);
        if (kUp) FTile::template copy<true>(factor, source, col0, cols, 0, p.rank);
        else FTile::template copy<true>(factor, source, 0, p.rank, col0, cols);
        t.store(thin);
        __syncthreads();
        multiply<false, !kUp>(acc, thin + row_tile * Thin::kStride, Thin::kStride,
                              factor + half * (kUp ? FTile::kStride : 1), FTile::kStride, rank_pieces(p.rank) * 8,
                              kCols / 16);
    } else {
        __syncthreads();  // the bias
    }
    for_each_element(acc, kCols / 16, [&](float v, int row, int col) {
        wide[(row_tile + row) * Wide::kStride + half + col] = from_float<T>(scale * v + bias[half + col]);
    });
    __syncthreads();
    typename Wide::Rows rows;
    rows.find(order, places.count);
    Wide out;
    out.fetch(wide);
    out.scatter(static_cast<T*>(p.wide), p.cols, p.wide_aligned, rows, col0, cols);
}

// ---- launching ------------------------------------------------------------------------------------------------------
inline Adapters adapters(const BatchedLowRankLinear& p, bool scaled) {
    return {p.order, p.offsets, p.tile_adapter, p.tile_first, scaled ? p.scale : 1.f, scaled ? p.scale_ptr : nullptr};
}

template <typename T, int RANK, Factor FACTOR>
void shrink(const BatchedLowRankLinear& p, const Shrink& args, void* stream) {
    LAUNCH((batched_shrink_kernel<T, RANK, FACTOR>), dim3(p.tiles * kShrinkParts), kThreads,
           (shrink_bytes<T, RANK, FACTOR>()), stream, args);
}

template <typename T, int RANK, Factor FACTOR>
void expand(const BatchedLowRankLinear& p, const Expand& args, void* stream) {
    LAUNCH((batched_expand_kernel<T, RANK, FACTOR>), dim3(p.tiles * ceil_div(args.cols, kCols)), kThreads,
           (expand_bytes<T, RANK, FACTOR>()), stream, args);
}

}  // namespace peft
