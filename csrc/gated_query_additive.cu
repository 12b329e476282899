// The additive mode: every row by itself, and sums over strips of rows; then the launch that adds the partial sums of
// both modes. Nothing is added atomically, so results repeat bit for bit.
#include "gated_query.cuh"

namespace peft {
namespace {

constexpr int kFinishThreads = 128;

template <typename T>
__global__ void __launch_bounds__(kThreads) additive_query_fwd_kernel(const GatedQuery p, const Inputs in) {
    const int64_t chunks = ceil_div(p.columns, kWidth), row = blockIdx.x / chunks * kGatedQueryRows + warp();
    const int64_t col = blockIdx.x % chunks * kWidth + lane() * 8;
    if (row >= p.rows || col >= p.columns) return;
    const float scale = p.scale_ptr ? *p.scale_ptr : p.scale;
    Octet out = load<T>(in.hidden, row, col, p.columns);
    const Octet text = load<T>(in.text, row, col, p.columns), cross = load<T>(in.cross, row, col, p.columns);
    const Octet gamma = load<T>(in.gamma, 0, col, p.columns), cross_gamma = load<T>(in.cross_gamma, 0, col, p.columns);
    const Octet beta = load<T>(in.beta, 0, col, p.columns), cross_beta = load<T>(in.cross_beta, 0, col, p.columns);
    each([&](int j) {
        out.v[j] += scale * (text.v[j] * gamma.v[j] + beta.v[j] + cross.v[j] * cross_gamma.v[j] + cross_beta.v[j]);
    });
    store<T>(p.out, out, row, col, p.columns);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) additive_query_bwd_kernel(const GatedQuery p, const Inputs in) {
    SHARED_MEMORY(memory);
    const int64_t col = int64_t(blockIdx.x) * kWidth + lane() * 8;
    const int64_t first = p.rows * blockIdx.y / gridDim.y, last = p.rows * (blockIdx.y + 1) / gridDim.y;
    const float scale = p.scale_ptr ? *p.scale_ptr : p.scale;
    Octet gamma{}, cross_gamma{}, d_gamma{}, d_beta{}, d_cross_gamma{};
    if (col < p.columns && p.d_text) gamma = load<T>(in.gamma, 0, col, p.columns);
    if (col < p.columns && p.d_cross) cross_gamma = load<T>(in.cross_gamma, 0, col, p.columns);
    for (int64_t row = first + warp(); row < last && col < p.columns; row += warps()) {
        Octet dy = load<T>(in.dy, row, col, p.columns), part;
        each([&](int j) { dy.v[j] *= scale, d_beta.v[j] += dy.v[j]; });
        if (p.d_text) {
            each([&](int j) { part.v[j] = dy.v[j] * gamma.v[j]; });
            store<T>(p.d_text, part, row, col, p.columns);
        }
        if (p.d_cross) {
            each([&](int j) { part.v[j] = dy.v[j] * cross_gamma.v[j]; });
            store<T>(p.d_cross, part, row, col, p.columns);
        }
        if (p.gamma_partial) {
            part = load<T>(in.text, row, col, p.columns);
            each([&](int j) { d_gamma.v[j] += dy.v[j] * part.v[j]; });
        }
        if (p.cross_gamma_partial) {
            part = load<T>(in.cross, row, col, p.columns);
            each([&](int j) { d_cross_gamma.v[j] += dy.v[j] * part.v[j]; });
        }
    }
    const auto finish = [&](Octet& sum, float* partial) {
        if (!partial) return;
        add_rows(sum, reinterpret_cast<float*>(memory));
        if (warp() == 0 && col < p.columns) store<float>(partial, sum, blockIdx.y, col, p.columns);
    };
    finish(d_gamma, p.gamma_partial);
    finish(d_beta, p.beta_partial);
    finish(d_cross_gamma, p.cross_gamma_partial);
}

// ---- the vectors' gradients -----------------------------------------------------------------------------------------
template <typename T> __device__ __forceinline__ void put(void* data, bool is_float, int64_t col, float v) {
    if (!data) return;
    if (is_float) static_cast<float*>(data)[col] = v;
    else static_cast<T*>(data)[col] = from_float<T>(v);
}

template <typename T> __global__ void __launch_bounds__(kFinishThreads) gated_query_finish_kernel(const GatedQuery p) {
    const float* const partial = blockIdx.y == 0   ? p.gamma_partial
                                 : blockIdx.y == 1 ? p.beta_partial
                                                   : p.cross_gamma_partial;
    const int64_t col = int64_t(blockIdx.x) * kFinishThreads + threadIdx.x;
    if (!partial || col >= p.columns) return;
    float sum = 0.f;
#pragma unroll 8
    for (int64_t strip = 0; strip < p.strips; ++strip) sum += partial[strip * p.columns + col];
    if (blockIdx.y == 0) put<T>(p.d_gamma, p.gamma_float, col, sum);
    if (blockIdx.y == 1) put<T>(p.d_beta, p.beta_float, col, sum);
    if (blockIdx.y == 1) put<T>(p.d_cross_beta, p.cross_beta_float, col, sum);
    if (blockIdx.y == 2) put<T>(p.d_cross_gamma, p.cross_gamma_float, col, sum);
}

}  // namespace

void finish_gated_query(const GatedQuery& p, void* stream) {
    if (!p.gamma_partial && !p.beta_partial && !p.cross_gamma_partial) return;
    with_dtype(p.dtype, [&](auto type) {
        const dim3 grid(ceil_div(p.columns, kFinishThreads), 3);
        LAUNCH(gated_query_finish_kernel<decltype(type)>, grid, kFinishThreads, 0, stream, p);
    });
}

}  // namespace peft

using namespace peft;

void additive_query_fwd(const GatedQuery& p, void* stream) {
    with_dtype(p.dtype, [&](auto type) {
        using T = decltype(type);
        const dim3 grid(ceil_div(p.rows, kGatedQueryRows) * ceil_div(p.columns, kWidth));
        LAUNCH(additive_query_fwd_kernel<T>, grid, kThreads, 0, stream, p, inputs<T>(p));
    });
}

void additive_query_bwd(const GatedQuery& p, void* stream) {
    with_dtype(p.dtype, [&](auto type) {
        using T = decltype(type);
        const dim3 grid(ceil_div(p.columns, kWidth), p.strips);
        LAUNCH(additive_query_bwd_kernel<T>, grid, kThreads, kThreads * sizeof(Octet), stream, p, inputs<T>(p));
        finish_gated_query(p, stream);
    });
}
