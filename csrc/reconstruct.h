// The weight that a low-rank path stands for (peft_kernels/ops/reconstruct.py), in one launch:
//
//     out[o,i] = base[o,i] + s B core[o,i] A        summed in float32, rounded once
#pragma once
#include "lowrank_linear.h"  // DType, Core

// Row-major device memory without gaps. R rank; O x I blocks of NB x KB elements make the result (O NB, I KB).
struct Reconstruct {
    int64_t block_rows = 0, block_cols = 0, rank = 0, in_blocks = 1, out_blocks = 1;
    DType dtype = DType::float32;  // of the base and the result; factors are that, or float32:
    bool down_float = false, up_float = false, core_float = false;
    Core core_kind = Core::none;

    float scale = 1.f;
    const float* scale_ptr = nullptr;  // replaces `scale`

    const void *down = nullptr, *up = nullptr, *core = nullptr;
    const void* base = nullptr;  // null: 0
    bool base_shared = false;    // base is (NB, KB), the same under every block; only where I = 1
    void* out = nullptr;
};

constexpr int kReconstructRows = 64, kReconstructColumns = 128;  // of the result, in one thread block

// `stream`: a cudaStream_t. One kernel is launched on it; nothing waits.
void reconstruct_fwd(const Reconstruct& p, void* stream);
int64_t reconstruct_shared_bytes(DType dtype);  // the most shared memory a block takes
