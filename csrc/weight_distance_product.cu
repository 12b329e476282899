// Products of many small and large matrices in one launch; a block owns a tile of one product and goes through its
// terms in order. See weight_distance.h.
#include "weight_distance.cuh"

namespace peft {
namespace {

__global__ void __launch_bounds__(kThreads, 2) product_kernel(const Products p) {
    SHARED_MEMORY(memory);
    float* const sums = reinterpret_cast<float*>(memory);
    const TileRow tile = p.tiles[blockIdx.x];
    const ProductRow record = p.records[tile.record];
    const int rows = int(record.rows - tile.row), cols = int(record.cols - tile.col);  // of `result`
    const Place at{int(tile.row), int(tile.col), rows, cols + (record.result_last.data ? 1 : 0)};

    float acc[kHalf / 8][4] = {};
#pragma unroll 1
    for (int64_t i = 0; i < record.terms; ++i) {
        const TermRow term = p.terms[record.first_term + i];
        if (record.form == Form::nn) add_product<Form::nn>(acc, sums, at, term);
        else if (record.form == Form::nt) add_product<Form::nt>(acc, sums, at, term);
        else add_product<Form::tn>(acc, sums, at, term);
    }
    store_sums(sums, acc);

    const Matrix result = matrix(record.result);
    Sums out;
    out.fetch(sums);
    if (record.accumulate) {
        Sums before;
        before.load(result, at.row0, rows, at.col0, cols);
#pragma unroll
        for (int i = 0; i < Sums::kOcts; ++i)
#pragma unroll
            for (int j = 0; j < 8; ++j) out.octs[i].v[j] += before.octs[i].v[j];
    }
    out.write(element(record.result, 0), result.stride, result.aligned, at.row0, rows, at.col0, cols);
    if (record.result_last.data && cols < kCols && int(threadIdx.x) < min(rows, kRows)) {
        float* const last = element(record.result_last, tile.row + threadIdx.x);
        *last = sums[threadIdx.x * Sums::kStride + cols] + (record.accumulate ? *last : 0.f);
    }
}

}  // namespace
}  // namespace peft

using namespace peft;

void product_fwd(const Products& p, void* stream) {
    LAUNCH(product_kernel, dim3(p.tile_count), kThreads, kSharedBytes, stream, p);
}
