// Small kernels for tests/test_races_cuda.py. As they are, nothing is wrong with them; the test leaves out each barrier
// in turn, and asks for the faults between blocks.
#include <cstring>

#include "multiply.cuh"

using namespace peft;

namespace {

// Whatever the fault, the results are right: only who accessed what, when, is wrong.
__global__ void two_blocks_write(int* out, bool fault) {
    const int own = blockIdx.x * 32 + threadIdx.x;
    out[own] = 1;
    if (fault) out[(own + 32) % 64] = 1;
}
__global__ void one_block_reads_what_another_writes(int* out, bool fault) {
    out[blockIdx.x * 32 + threadIdx.x] = 1;
    out[64 + blockIdx.x * 32 + threadIdx.x] = out[(fault ? 0 : blockIdx.x * 32) + threadIdx.x];
}

__global__ void warps_exchange(int* out, bool) {
    SHARED_MEMORY(memory);
    int* const shared = reinterpret_cast<int*>(memory);
    for (int round = 0; round < 2; ++round) {
        shared[threadIdx.x] = round;
        __syncthreads();
        out[threadIdx.x] = shared[(threadIdx.x + 32) % 64];
        __syncthreads();
    }
}

// What lanes exchange in registers orders nothing in memory.
__global__ void shuffle(int* out, bool) {
    SHARED_MEMORY(memory);
    int* const shared = reinterpret_cast<int*>(memory);
    shared[threadIdx.x] = 1;
    __syncwarp();
    const int other = __shfl_xor_sync(~0u, 1, 1);
    out[threadIdx.x] = shared[threadIdx.x ^ 1] + other;
}
__global__ void multiply_matrices(int* out, bool) {
    SHARED_MEMORY(memory);
    int* const shared = reinterpret_cast<int*>(memory);
    shared[threadIdx.x] = 1;
    __syncwarp();
    float c[4] = {};
    const uint32_t a[4] = {};
    Mma<__half>::multiply(c, a, 0, 0);
    out[threadIdx.x] = shared[threadIdx.x ^ 1] + int(c[0]);
}
__global__ void load_matrices(int* out, bool) {
    SHARED_MEMORY(memory);
    __half* const rows = reinterpret_cast<__half*>(memory) + threadIdx.x * 8;
    for (int i = 0; i < 8; ++i) rows[i] = __half{};
    __syncwarp();
    uint32_t r[4];
    Mma<__half>::load<false>(r, rows);
    out[threadIdx.x] = int(r[0]);
}

const struct {
    const char* name;
    void (*kernel)(int*, bool);
    unsigned blocks, threads;
} kKernels[] = {{"two blocks write", two_blocks_write, 2, 32},
                {"one block reads what another writes", one_block_reads_what_another_writes, 2, 32},
                {"warps exchange", warps_exchange, 1, 64},
                {"shuffle", shuffle, 1, 32},
                {"multiply matrices", multiply_matrices, 1, 32},
                {"load matrices", load_matrices, 1, 32}};

}  // namespace

// Launches the kernel of that name; `out` has room for 128 numbers.
extern "C" [[gnu::visibility("default")]] void launch(const char* name, int* out, bool fault) {
    for (const auto& each : kKernels)
        if (!std::strcmp(each.name, name)) LAUNCH(each.kernel, dim3(each.blocks), each.threads, 512, nullptr, out, fault);
}
