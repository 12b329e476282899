// Backward of the batched low-rank linear: shrink (dY -> dz), gram (an adapter's rows of dY and z -> dB, of x and dz ->
// dA), expand (dz -> dx0). Nothing is added atomically, so results repeat bit for bit. See batched_lowrank_linear.h.
#include <algorithm>

#include "batched_lowrank_linear.cuh"

namespace peft {
namespace {

// ---- gram: out_l = s_l sum_rows wide[row]^T thin[row] ---------------------------------------------------------------
// A block owns up to 128 columns of one adapter's gradient, 16 to a warp, and a strip of the adapter's rows.
struct Gram {
    Adapters adapters;
    Matrix wide, thin;
    int cols, rank, count;  // count: adapters
    int by_col, by_rank;    // strides of the gradient
    float* partial;         // (strips, count, cols * rank), or null:
    void* out;
    bool out_float;
};

template <typename T, int RANK> constexpr int gram_bytes() {
    return (Tile<T, kRows, kCols>::kElements + Tile<T, kRows, RANK>::kElements) * int(sizeof(T));
}

template <typename T, int RANK> __global__ void __launch_bounds__(kThreads, sizeof(T) == 2 && RANK <= 64 ? 2 : 1)
    gram_kernel(const Gram p) {
    SHARED_MEMORY(memory);
    using Wide = Tile<T, kRows, kCols>;
    using Thin = Tile<T, kRows, RANK>;
    T* const wide = reinterpret_cast<T*>(memory);
    T* const thin = wide + Wide::kElements;

    const int chunks = ceil_div(p.cols, kCols), adapter = blockIdx.x / chunks;
    const int col0 = blockIdx.x % chunks * kCols, cols = p.cols - col0, pieces = rank_pieces(p.rank);
    const int64_t first = p.adapters.offsets[adapter];
    const int rows = p.adapters.offsets[adapter + 1] - first, warp_col = threadIdx.x / 32 * 16;
    const int64_t* const order = p.adapters.order + first;
    const Strip strip(rows, blockIdx.y, gridDim.y);

    Wide w;
    Thin t;
    typename Wide::Rows wide_rows;
    typename Thin::Rows thin_rows;
    const auto find = [&](int row0) {  // a tile ahead of the loads that need it
        if (row0 >= strip.last) return;
        wide_rows.find(order + row0, rows - row0);
        thin_rows.find(order + row0, rows - row0);
    };
    const auto load = [&](int row0) {
        if (row0 >= strip.last) return;
        w.gather(p.wide, wide_rows, col0, cols);
        t.gather(p.thin, thin_rows, 0, p.rank);
    };
    float acc[RANK / 8][4] = {};
    find(strip.first);
    load(strip.first);
    find(strip.first + kRows);
    for (int row0 = strip.first; row0 < strip.last; row0 += kRows) {
        __syncthreads();
        w.store(wide);
        t.store(thin);
        __syncthreads();
        load(row0 + kRows);
        find(row0 + 2 * kRows);
        if (warp_col < cols)
            multiply<true, true>(acc, wide + warp_col, Wide::kStride, thin, Thin::kStride, kRows, pieces);
    }
    const float scale = p.adapters.scale_of(adapter);
    const int64_t elements = int64_t(p.cols) * p.rank;
    const int64_t partial0 = (int64_t(blockIdx.y) * p.count + adapter) * elements, out0 = adapter * elements;
    for_each_element(acc, pieces, [&](float v, int row, int r) {
        const int c = col0 + warp_col + row;
        if (c >= p.cols || r >= p.rank) return;
        const int64_t e = int64_t(c) * p.by_col + int64_t(r) * p.by_rank;
        v *= scale;
        if (p.partial) p.partial[partial0 + e] = v;
        else if (p.out_float) static_cast<float*>(p.out)[out0 + e] = v;
        else static_cast<T*>(p.out)[out0 + e] = from_float<T>(v);
    });
}

template <typename T, int RANK> void gram(const Gram& args, int64_t strips, void* stream) {
    LAUNCH((gram_kernel<T, RANK>), dim3(args.count * ceil_div(args.cols, kCols), strips), kThreads,
           (gram_bytes<T, RANK>()), stream, args);
}

}  // namespace
}  // namespace peft

using namespace peft;

void batched_lowrank_linear_bwd(const BatchedLowRankLinear& p, void* stream) {
    const int in = p.in_features, out = p.out_features, R = p.rank, count = p.adapters;
    with_dtype_and_rank(p.dtype, R, [&](auto type, auto rank) {
        using T = decltype(type);
        const Matrix dy = activation<T>(p.dy, p.dy_stride, 0), dz = activation<T>(p.dz, R, 0);
        if (p.dz)
            shrink<T, rank, Factor::up>(p, {adapters(p, true), dy, factor<T>(p.up, R, p.up_float), p.dz, out, R},
                                        stream);
        if (p.d_up)
            gram<T, rank>({adapters(p, true), dy, activation<T>(p.z, R, 0), out, R, count, R, 1, p.d_up_partial, p.d_up,
                           p.up_float},
                          p.up_strips, stream);
        if (p.d_down)
            gram<T, rank>({adapters(p, false), activation<T>(p.x, p.x_stride, 0), dz, in, R, count, 1, in,
                           p.d_down_partial, p.d_down, p.down_float},
                          p.down_strips, stream);
        if (p.dx)
            expand<T, rank, Factor::down>(p,
                                          {adapters(p, false), dz, factor<T>(p.down, in, p.down_float), nullptr, p.dx,
                                           aligned16(p.dx, in, 0, sizeof(T)), in, R},
                                          stream);
    });
    const int64_t elements = p.adapters * p.rank;
    reduce({{p.d_up_partial, p.up_strips, elements * p.out_features, p.d_up, p.up_float},
            {p.d_down_partial, p.down_strips, elements * p.in_features, p.d_down, p.down_float},
            {}},
           p.dtype, stream);
}

int64_t batched_lowrank_linear_bwd_shared_bytes(DType dtype, int64_t rank) {
    int64_t bytes = 0;
    with_dtype_and_rank(dtype, rank, [&](auto type, auto bucket) {
        using T = decltype(type);
        bytes = std::max({shrink_bytes<T, bucket, Factor::up>(), expand_bytes<T, bucket, Factor::down>(),
                          gram_bytes<T, bucket>()});
    });
    return bytes;
}
