// Forward of the batched low-rank linear: shrink (x -> z), expand (z -> y0). See batched_lowrank_linear.h.
#include <algorithm>

#include "batched_lowrank_linear.cuh"

using namespace peft;

void batched_lowrank_linear_fwd(const BatchedLowRankLinear& p, void* stream) {
    const int in = p.in_features, out = p.out_features, R = p.rank;
    with_dtype_and_rank(p.dtype, R, [&](auto type, auto rank) {
        using T = decltype(type);
        const Matrix down = factor<T>(p.down, in, p.down_float), up = factor<T>(p.up, R, p.up_float);
        shrink<T, rank, Factor::down>(p, {adapters(p, false), activation<T>(p.x, p.x_stride, 0), down, p.z, in, R},
                                      stream);
        expand<T, rank, Factor::up>(p,
                                    {adapters(p, true), activation<T>(p.z, R, 0), up, p.bias, p.y,
                                     aligned16(p.y, out, 0, sizeof(T)), out, R},
                                    stream);
    });
}

int64_t batched_lowrank_linear_fwd_shared_bytes(DType dtype, int64_t rank) {
    int64_t bytes = 0;
    with_dtype_and_rank(dtype, rank, [&](auto type, auto bucket) {
        using T = decltype(type);
        bytes = std::max(shrink_bytes<T, bucket, Factor::down>(), expand_bytes<T, bucket, Factor::up>());
    });
    return bytes;
}
