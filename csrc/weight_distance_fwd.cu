// Targets, errors and sums of squares of a tile of one matrix; then what follows from each matrix's sums. Nothing is
// added atomically, so results repeat bit for bit. See weight_distance.h.
#include "weight_distance.cuh"

namespace peft {
namespace {

// decay target + (1 - decay) live; the weights are rounded once.
struct Follow {
    bool on;
    float decay, live_weight;
    __device__ __forceinline__ float operator()(float target, float live) const {
        return decay * target + live_weight * live;
    }
};

template <typename T>
__device__ __forceinline__ Oct<float> load_floats(const Strided& m, int64_t row, int64_t col, int count) {
    const Oct<T> oct = load_oct(static_cast<const T*>(global_memory(m.data)) + row * m.stride + col, count,
                                aligned16(m.data, m.stride, 0, sizeof(T)));
    Oct<float> floats;
#pragma unroll
    for (int j = 0; j < 8; ++j) floats.v[j] = to_float(oct.v[j]);
    return floats;
}

__device__ __forceinline__ void store_floats(const Strided& m, int64_t row, int64_t col, int count,
                                             const Oct<float>& oct) {
    store_oct(element(m, row) + col, oct, count, matrix(m).aligned);
}

__device__ __forceinline__ Oct<float> load_live(const Strided& m, DType dtype, int64_t row, int64_t col, int count) {
    if (dtype == DType::bfloat16) return load_floats<__nv_bfloat16>(m, row, col, count);
    if (dtype == DType::float16) return load_floats<__half>(m, row, col, count);
    return load_floats<float>(m, row, col, count);
}

// The block's sums of N numbers, for every thread; `memory` has N floats for each warp.
template <int N> __device__ __forceinline__ void add_up(float (&v)[N], float* memory) {
    const int warp = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
        for (int mask = 16; mask > 0; mask /= 2) v[i] += __shfl_xor_sync(~0u, v[i], mask);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; ++i)
        if (threadIdx.x % 32 == 0) memory[warp * N + i] = v[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; ++i) {
        v[i] = 0.f;
        for (int w = 0; w < int(blockDim.x) / 32; ++w) v[i] += memory[w * N + i];
    }
}

// ---- distance -------------------------------------------------------------------------------------------------------
__global__ void __launch_bounds__(kThreads, 2) distance_kernel(const WeightDistance p, const Follow follow) {
    SHARED_MEMORY(memory);
    float* const sums = reinterpret_cast<float*>(memory);
    const TileRow tile = p.tiles[blockIdx.x];
    const DistanceRow* const record = p.records + tile.record;
    const Place at{int(tile.row), int(tile.col), int(record->rows - tile.row), int(record->cols - tile.col)};

    float acc[kHalf / 8][4] = {};
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
        const FactorsRow pair = record->factors[i];
        if (pair.rank > 0)
            add_product<Form::nn>(acc, sums, at, {pair.rank, record->cols, pair.left, pair.right, {}, nullptr});
    }
    store_sums(sums, acc);

    const Strided target = record->target, base = record->base, error = record->error, live = record->live;
    const DType live_dtype = static_cast<DType>(record->live_dtype);
    const bool follows = follow.on && live.data;
    float squares[3] = {};  // of error, target - base, base
#pragma unroll 1  // two blocks ask for 48 KiB at once, and more: that keeps memory busy
    for (int i = 0; i < Sums::kOcts; ++i) {
        const int64_t row = at.row0 + Sums::row_of(i), col = at.col0 + Sums::col();
        const int count = Sums::row_of(i) < at.rows ? at.cols - Sums::col() : 0;
        Oct<float> now = load_floats<float>(target, row, col, count);
        const Oct<float> frozen = load_floats<float>(base, row, col, count);
        if (follows) {
            const Oct<float> own = load_live(live, live_dtype, row, col, count);
#pragma unroll
            for (int j = 0; j < 8; ++j) now.v[j] = follow(now.v[j], own.v[j]);
            store_floats(target, row, col, count, now);
        }
        Oct<float> e = load_oct(sums + Sums::row_of(i) * Sums::kStride + Sums::col(), 8, true);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float difference = frozen.v[j] - now.v[j];  // of two close numbers: exact
            e.v[j] += difference;
            if (j < count) {
                squares[0] += e.v[j] * e.v[j];
                squares[1] += difference * difference;
                squares[2] += frozen.v[j] * frozen.v[j];
            }
        }
        store_floats(error, row, col, count, e);
    }
    add_up(squares, sums);
    if (threadIdx.x < 3)
        p.partial[int64_t(blockIdx.x) * 3 + threadIdx.x] =
            threadIdx.x == 0 ? squares[0] : threadIdx.x == 1 ? squares[1] : squares[2];
}

// ---- finish ---------------------------------------------------------------------------------------------------------
constexpr int kFinishThreads = 512, kLanes = 8;  // kLanes share a row of `shift`
constexpr float kFloor = 1e-12f;                 // of a relative distance's denominator, relative to the base

// What a sum of squares is multiplied by.
__device__ __forceinline__ float coefficient(Reduction reduction, float count, float moved, float base) {
    if (reduction == Reduction::sum) return 1.f;
    if (reduction == Reduction::mean) return 1.f / count;
    const float denominator = moved < kFloor * base ? kFloor * base : moved;  // NaN stays NaN
    return denominator == 0.f ? 0.f : 1.f / denominator;                      // what never left zeros counts nothing
}

__global__ void __launch_bounds__(kFinishThreads) finish_kernel(const WeightDistance p, const Follow follow) {
    SHARED_MEMORY(memory);
    const DistanceRow record = p.records[blockIdx.x];
    const bool biased = record.target_bias.data, follows = follow.on && record.live_bias.data;
    float sums[6] = {};
    for (int64_t tile = threadIdx.x; tile < record.tiles; tile += kFinishThreads)
#pragma unroll
        for (int i = 0; i < 3; ++i) sums[i] += p.partial[(record.first_tile + tile) * 3 + i];
    const int lane = threadIdx.x % kLanes;
    for (int64_t row0 = 0; biased && row0 < record.rows; row0 += kFinishThreads / kLanes) {
        const int64_t row = row0 + threadIdx.x / kLanes;
        float e = 0.f;
        if (row < record.rows && record.shift.data)
#pragma unroll 4
            for (int64_t c = lane; c < record.shift_cols; c += kLanes)
                e += element(record.shift, row)[c] * *element(record.shift_vector, c);
#pragma unroll
        for (int mask = kLanes / 2; mask > 0; mask /= 2) e += __shfl_xor_sync(~0u, e, mask);
        if (lane != 0 || row >= record.rows) continue;
        float target = *element(record.target_bias, row);
        const float base = *element(record.base_bias, row);
        if (follows) {
            const Strided live{record.live_bias.data, 0};
            const int64_t at = row * record.live_bias.stride;
            target = follow(target, load_live(live, static_cast<DType>(record.live_bias_dtype), 0, at, 1).v[0]);
            *element(record.target_bias, row) = target;
        }
        e += base - target;
        if (record.shift_last.data) e += *element(record.shift_last, row);
        sums[3] += e * e;
        sums[4] += (base - target) * (base - target);
        sums[5] += base * base;
        if (record.bias_gradient.data) *element(record.bias_gradient, row) = e;
    }
    add_up(sums, reinterpret_cast<float*>(memory));

    const float scale = p.scale_ptr ? *p.scale_ptr : p.scale;
    const float weight = coefficient(p.reduction, float(record.rows) * float(record.cols), sums[1], sums[2]);
    const float bias = biased ? coefficient(p.reduction, float(record.rows), sums[4], sums[5]) : 0.f;
    if (threadIdx.x == 0) {
#pragma unroll
        for (int i = 0; i < 6; ++i) p.sums[int64_t(blockIdx.x) * 6 + i] = sums[i];
        p.losses[blockIdx.x] = weight * sums[0] + bias * sums[3];
        p.factors[blockIdx.x] = 2.f * weight * scale;
    }
    if (biased && record.bias_gradient.data)
        for (int64_t row = threadIdx.x; row < record.rows; row += kFinishThreads)
            *element(record.bias_gradient, row) *= 2.f * bias * scale;
}

}  // namespace
}  // namespace peft

using namespace peft;

void weight_distance_fwd(const WeightDistance& p, void* stream) {
    const Follow follow{p.follow, float(p.decay), float(1 - p.decay)};
    LAUNCH(distance_kernel, dim3(p.tile_count), kThreads, kSharedBytes, stream, p, follow);
    LAUNCH(finish_kernel, dim3(p.record_count), kFinishThreads, kFinishThreads / 32 * 6 * sizeof(float), stream, p,
           follow);
}

int64_t weight_distance_shared_bytes() { return kSharedBytes; }
