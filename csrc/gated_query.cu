// The gated mode: one block for each sequence, its warps walking through the rows. What it needs is read twice, the
// second time from the caches: 61 KB for each tensor at S = 40, d = 768 in bfloat16. Nothing is added atomically, so
// results repeat bit for bit.
#include <cmath>

#include "gated_query.cuh"

namespace peft {
namespace {

constexpr int kSequenceThreads = 512;

// A block is alone with the latency of its memory, so each thread asks for several octs before it uses the first.
template <typename T, int kAhead> struct Sequence {
    const GatedQuery& p;
    const int64_t row0 = int64_t(blockIdx.x) * p.positions;

    __device__ __forceinline__ bool kept(int64_t i) const { return !p.padding_mask || p.padding_mask[row0 + i]; }

    __device__ __forceinline__ Oct<T> fetch(const Matrix& m, int64_t i, int64_t col) const {
        const int count = i < p.positions ? int(min(p.columns - col, int64_t(8))) : 0;
        return load_oct(static_cast<const T*>(m.data) + (row0 + i) * m.stride + col, count, m.aligned);
    }
    __device__ __forceinline__ void fetch_rows(Oct<T> (&octs)[kAhead], const Matrix& m, int64_t i, int64_t col) const {
#pragma unroll
        for (int k = 0; k < kAhead; ++k) octs[k] = fetch(m, i + k * warps(), col);
    }
    __device__ __forceinline__ void fetch_cols(Oct<T> (&octs)[kAhead], const Matrix& m, int64_t i, int64_t col) const {
#pragma unroll
        for (int k = 0; k < kAhead; ++k) octs[k] = fetch(m, i, col + k * kWidth);
    }
    __device__ __forceinline__ Octet total(int64_t col) const {
        const Matrix m{p.total, p.columns, true, aligned16(p.total, p.columns, 0, sizeof(float))};
        return load<float>(m, blockIdx.x, col, p.columns);
    }

    // visit(this lane's first column) of every chunk; of the last one it may lie beyond the end.
    template <typename F> __device__ __forceinline__ void for_chunks(F&& visit) const {
        for (int64_t first = 0; first < p.columns; first += kWidth) visit(first + lane() * 8);
    }
    // prepare(i), then visit(i + k * warps(), k) for each k < kAhead that is a position; of this warp's positions.
    template <typename F, typename G> __device__ __forceinline__ void for_rows(F&& prepare, G&& visit) const {
        for (int64_t i = warp(); i < p.positions; i += kAhead * warps()) {
            prepare(i);
#pragma unroll
            for (int k = 0; k < kAhead; ++k)
                if (i + k * warps() < p.positions) visit(i + k * warps(), k);
        }
    }
    // into[i] = sum of prepare(i, col), visit(col + k * kWidth, k) over the row's columns, for this warp's positions.
    template <typename F, typename G>
    __device__ __forceinline__ void dot(float* into, F&& prepare, G&& visit) const {
        for (int64_t i = warp(); i < p.positions; i += warps()) {
            float sum = 0.f;
            for (int64_t col = lane() * 8; col < p.columns; col += kAhead * kWidth) {
                prepare(i, col);
#pragma unroll
                for (int k = 0; k < kAhead; ++k) sum += visit(col + k * kWidth, k);
            }
            sum = add_lanes(sum);
            if (lane() == 0) into[i] = sum;
        }
    }
};

template <typename T>
__global__ void __launch_bounds__(kSequenceThreads, 1) gated_query_fwd_kernel(const GatedQuery p, const Inputs in) {
    SHARED_MEMORY(shared);
    float* const memory = reinterpret_cast<float*>(shared);
    constexpr int kAhead = 8 / sizeof(T);
    const Sequence<T, kAhead> sequence{p};
    float* const gate = p.gate + sequence.row0;
    Oct<T> hidden[kAhead], text[kAhead];
    sequence.for_chunks([&](int64_t col) {
        const Octet gamma = load<T>(in.gamma, 0, col, p.columns), beta = load<T>(in.beta, 0, col, p.columns);
        Octet total{};
        sequence.for_rows([&](int64_t i) { sequence.fetch_rows(text, in.text, i, col); },
                          [&](int64_t i, int k) {
                              if (!sequence.kept(i)) return;
                              each([&](int j) { total.v[j] += to_float(text[k].v[j]) * gamma.v[j] + beta.v[j]; });
                          });
        add_rows(total, memory);
        if (warp() == 0) store<float>(p.total, total, blockIdx.x, col, p.columns);
    });
    __syncthreads();

    sequence.dot(
        gate, [&](int64_t i, int64_t col) { sequence.fetch_cols(hidden, in.hidden, i, col); },
        [&](int64_t col, int k) {
            const Octet total = sequence.total(col);
            float sum = 0.f;
            each([&](int j) { sum += to_float(hidden[k].v[j]) * total.v[j]; });
            return sum;
        });
    __syncthreads();

    float largest = -INFINITY, sum = 0.f;
    for (int64_t i = threadIdx.x; i < p.positions; i += blockDim.x)
        if (sequence.kept(i)) largest = max(largest, gate[i]);
    largest = combine(largest, memory, [](float a, float b) { return max(a, b); });
    for (int64_t i = threadIdx.x; i < p.positions; i += blockDim.x)
        sum += gate[i] = sequence.kept(i) ? expf(gate[i] - largest) : 0.f;
    sum = combine(sum, memory, [](float a, float b) { return a + b; });
    for (int64_t i = threadIdx.x; i < p.positions; i += blockDim.x)
        if (sequence.kept(i)) gate[i] /= sum;
    __syncthreads();

    sequence.for_chunks([&](int64_t col) {
        const Octet gamma = load<T>(in.gamma, 0, col, p.columns), beta = load<T>(in.beta, 0, col, p.columns);
        sequence.for_rows(
            [&](int64_t i) {
                sequence.fetch_rows(hidden, in.hidden, i, col);
                sequence.fetch_rows(text, in.text, i, col);
            },
            [&](int64_t i, int k) {
                const float g = gate[i];
                Octet out;
                each([&](int j) {
                    const float moved = to_float(text[k].v[j]) * gamma.v[j] + beta.v[j];
                    out.v[j] = g * to_float(hidden[k].v[j]) + (1.f - g) * moved;
                });
                store<T>(p.out, out, sequence.row0 + i, col, p.columns);
            });
    });
}

template <typename T>
__global__ void __launch_bounds__(kSequenceThreads, 1) gated_query_bwd_kernel(const GatedQuery p, const Inputs in) {
    SHARED_MEMORY(shared);
    float* const memory = reinterpret_cast<float*>(shared);
    constexpr int kAhead = 4 / sizeof(T);
    const Sequence<T, kAhead> sequence{p};
    const float* const gate = p.gate + sequence.row0;
    float* const ds = p.q + sequence.row0;  // holds q first
    Oct<T> dy[kAhead], hidden[kAhead], text[kAhead];
    sequence.dot(
        ds,
        [&](int64_t i, int64_t col) {
            sequence.fetch_cols(dy, in.dy, i, col);
            sequence.fetch_cols(hidden, in.hidden, i, col);
            sequence.fetch_cols(text, in.text, i, col);
        },
        [&](int64_t col, int k) {
            const Octet gamma = load<T>(in.gamma, 0, col, p.columns), beta = load<T>(in.beta, 0, col, p.columns);
            float q = 0.f;
            each([&](int j) {
                const float moved = to_float(text[k].v[j]) * gamma.v[j] + beta.v[j];
                q += to_float(dy[k].v[j]) * (to_float(hidden[k].v[j]) - moved);
            });
            return q;
        });
    __syncthreads();

    float mean = 0.f;
    for (int64_t i = threadIdx.x; i < p.positions; i += blockDim.x) mean += gate[i] * ds[i];
    mean = combine(mean, memory, [](float a, float b) { return a + b; });
    for (int64_t i = threadIdx.x; i < p.positions; i += blockDim.x) ds[i] = gate[i] * (ds[i] - mean);
    __syncthreads();

    sequence.for_chunks([&](int64_t col) {
        const Octet gamma = load<T>(in.gamma, 0, col, p.columns), total = sequence.total(col);
        Octet d_total{}, d_gamma{}, d_beta{};
        if (p.d_text || p.gamma_partial || p.beta_partial) {
            sequence.for_rows([&](int64_t i) { sequence.fetch_rows(hidden, in.hidden, i, col); },
                              [&](int64_t i, int k) {
                                  const float own = ds[i];
                                  each([&](int j) { d_total.v[j] += own * to_float(hidden[k].v[j]); });
                              });
            add_rows(d_total, memory);
        }
        sequence.for_rows(
            [&](int64_t i) {
                sequence.fetch_rows(dy, in.dy, i, col);
                if (p.gamma_partial) sequence.fetch_rows(text, in.text, i, col);
            },
            [&](int64_t i, int k) {
                const float g = gate[i], own = ds[i];
                const bool kept = sequence.kept(i);
                Octet part;
                if (p.d_hidden) {
                    each([&](int j) { part.v[j] = g * to_float(dy[k].v[j]) + own * total.v[j]; });
                    store<T>(p.d_hidden, part, sequence.row0 + i, col, p.columns);
                }
                each([&](int j) {
                    const float d_moved = (1.f - g) * to_float(dy[k].v[j]) + (kept ? d_total.v[j] : 0.f);
                    d_beta.v[j] += d_moved;
                    if (p.gamma_partial) d_gamma.v[j] += d_moved * to_float(text[k].v[j]);
                    part.v[j] = d_moved * gamma.v[j];
                });
                if (p.d_text) store<T>(p.d_text, part, sequence.row0 + i, col, p.columns);
            });
        if (p.gamma_partial) add_rows(d_gamma, memory);
        if (p.gamma_partial && warp() == 0) store<float>(p.gamma_partial, d_gamma, blockIdx.x, col, p.columns);
        if (p.beta_partial) add_rows(d_beta, memory);
        if (p.beta_partial && warp() == 0) store<float>(p.beta_partial, d_beta, blockIdx.x, col, p.columns);
    });
}

}  // namespace
}  // namespace peft

using namespace peft;

void gated_query_fwd(const GatedQuery& p, void* stream) {
    with_dtype(p.dtype, [&](auto type) {
        using T = decltype(type);
        LAUNCH(gated_query_fwd_kernel<T>, dim3(p.rows / p.positions), kSequenceThreads,
               kSequenceThreads * sizeof(Octet), stream, p, inputs<T>(p));
    });
}

void gated_query_bwd(const GatedQuery& p, void* stream) {
    with_dtype(p.dtype, [&](auto type) {
        using T = decltype(type);
        LAUNCH(gated_query_bwd_kernel<T>, dim3(p.strips), kSequenceThreads, kSequenceThreads * sizeof(Octet), stream, p,
               inputs<T>(p));
        finish_gated_query(p, stream);
    });
}
