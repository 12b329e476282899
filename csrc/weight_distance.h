// The distance of W0 + F C from a target that follows live weights, and the products around it, for many matrices of
// any shapes at once (peft_kernels/records.py), all in float32:
//
//     distance   target = decay target + (1 - decay) live      error = sum_pairs left right + (base - target)
//     finish     sums of squares, losses, factors; the same for biases
//     product    result = sum_terms factor op(left) op(right), or +=
#pragma once
#include "lowrank_linear.h"  // DType

// Tables lie in device memory as rows of int64; peft_kernels/cuda_kernels/weight_distance.py writes them, field by
// field in the order below. Every field has 8 bytes.

// A matrix with unit column stride and this stride from row to row, or a vector with this stride; null data: none.
struct Strided {
    void* data;
    int64_t stride;
};

// A block's part of a matrix: from this row and column on.
struct TileRow {
    int64_t record, row, col;
};

struct FactorsRow {  // rank 0: none
    Strided left, right;
    int64_t rank;
};

struct DistanceRow {
    int64_t rows, cols, first_tile, tiles;
    Strided target, base, error, live;  // live: of any DType, the others float32
    int64_t live_dtype, live_bias_dtype;
    FactorsRow factors[2];
    Strided target_bias, base_bias, live_bias;  // no target_bias: no bias at all
    Strided shift, shift_vector, shift_last, bias_gradient;
    int64_t shift_cols;
};

enum class Form : int64_t { nn, nt, tn };  // nt: right lies as (cols, depth); tn: left lies as (depth, rows)

struct ProductRow {
    Form form;
    int64_t rows, cols, accumulate, first_term, terms;
    Strided result, result_last;  // result_last: where the product's column after those of `result` goes
};

struct TermRow {
    int64_t depth, right_cols;
    Strided left, right, right_last;  // right_last: form nn, the column after those of `right`
    const float* factor;              // null: 1
};

enum class Reduction : int { mean, sum, relative };

struct WeightDistance {
    const DistanceRow* records = nullptr;
    const TileRow* tiles = nullptr;  // those of one record next to each other
    int64_t record_count = 0, tile_count = 0;
    bool follow = false;  // do targets with a live matrix follow it?
    double decay = 1;
    Reduction reduction = Reduction::mean;
    float scale = 1.f;  // of factors and bias gradients
    const float* scale_ptr = nullptr;  // replaces `scale`
    float* partial = nullptr;          // (tiles, 3)
    float *sums = nullptr, *losses = nullptr, *factors = nullptr;  // (records, 6), (records,), (records,)
};

struct Products {
    const ProductRow* records = nullptr;
    const TermRow* terms = nullptr;
    const TileRow* tiles = nullptr;
    int64_t tile_count = 0;
};

constexpr int kWeightDistanceRows = 64, kWeightDistanceColumns = 128;  // of a tile

// `stream`: a cudaStream_t. Two kernels are launched on it, or one; nothing waits.
void weight_distance_fwd(const WeightDistance& p, void* stream);
void product_fwd(const Products& p, void* stream);
int64_t weight_distance_shared_bytes();  // the most shared memory a block takes
