// Runs the kernels of this folder on a CPU, for tests: LAUNCH walks the grid, one block after another. The threads of a
// block are fibers that take turns at every barrier, in alternating order, so that a missing barrier shows. A warp
// meets at every __syncwarp, shuffle, ldmatrix and mma; lanes that part ways there are an error. Shared memory is
// filled with NaN bytes before each block and ends at an unmapped page.
#pragma once
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

using std::max, std::min;
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

// ---- half-precision types: round to nearest, ties to even -----------------------------------------------------------
namespace emulation {
template <typename To, typename From> To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
}  // namespace emulation

struct __nv_bfloat16 {
    uint16_t bits;
};
struct __half {
    uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 v) { return emulation::bits<float>(uint32_t(v.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
    const uint32_t u = emulation::bits<uint32_t>(v);
    return {v != v ? uint16_t(0x7fff) : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
inline float __half2float(__half v) {
    const uint32_t magnitude = v.bits & 0x7fff, sign = uint32_t(v.bits & 0x8000) << 16;
    if (magnitude >= 0x7c00) return emulation::bits<float>(sign | 0x7f800000 | magnitude << 13);
    return emulation::bits<float>(sign | emulation::bits<uint32_t>(emulation::bits<float>(magnitude << 13) * 0x1p112f));
}
inline __half __float2half_rn(float v) {
    const uint32_t u = emulation::bits<uint32_t>(v), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
    if (magnitude > 0x7f800000) return {0x7fff};
    if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds beyond 65504
    if (magnitude < 0x38800000)  // subnormal: adding 0.5 puts the last half-precision bit at float's last
        return {uint16_t(sign | (emulation::bits<uint32_t>(emulation::bits<float>(magnitude) + 0.5f) - 0x3f000000))};
    return {uint16_t(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13)};
}

// ---- fibers ---------------------------------------------------------------------------------------------------------
namespace emulation {
constexpr size_t kStackBytes = 64 * 1024;
enum class State { running, at_warp, at_block, done };

struct Fiber {
    ucontext_t context;
    jmp_buf resume;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    State state = State::done;
    bool started = false;
};

struct Machine {
    std::vector<Fiber> fibers;  // one for each thread of a block, reused for every block
    std::function<void()> kernel;
    std::exception_ptr error;
    jmp_buf scheduler;
    ucontext_t scheduler_context;
    unsigned char *pool = nullptr, *shared = nullptr;
    size_t pool_bytes = 0;
    unsigned current = 0, turn = 0;
    unsigned char exchanged[2][1024][32];  // shown to the warp; with two sets one meeting per exchange is enough
    unsigned parity[1024];
};
inline Machine machine;

inline void yield(State state) {
    Fiber& fiber = machine.fibers[machine.current];
    fiber.state = state;
    if (_setjmp(fiber.resume) == 0) _longjmp(machine.scheduler, 1);
}

inline void fiber_main() {
    for (;;) {
        try {
            machine.kernel();
        } catch (...) { machine.error = std::current_exception(); }
        yield(State::done);
    }
}

// Runs thread t until its next meeting point.
inline void run(unsigned t) {
    Fiber& fiber = machine.fibers[t];
    machine.current = t;
    threadIdx = dim3(t, 0, 0);
    fiber.state = State::running;
    if (_setjmp(machine.scheduler) != 0) return;
    if (fiber.started) _longjmp(fiber.resume, 1);
    fiber.started = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.context, fiber_main, 0);
    swapcontext(&machine.scheduler_context, &fiber.context);  // only this first entry costs a system call
}

// Runs the 32 lanes of a warp until they meet.
inline State run_warp(unsigned warp, bool backwards) {
    for (unsigned i = 0; i < 32; ++i) run(warp * 32 + (backwards ? 31 - i : i));
    if (machine.error) std::rethrow_exception(std::exchange(machine.error, nullptr));
    const Fiber* lanes = &machine.fibers[warp * 32];
    for (unsigned i = 1; i < 32; ++i)
        if (lanes[i].state != lanes[0].state)
            throw std::runtime_error("emulation: the lanes of a warp part ways at a barrier");
    return lanes[0].state;
}

inline void run_block(unsigned warps, size_t shared_bytes) {
    std::memset(machine.shared, 0xff, shared_bytes);
    std::memset(machine.parity, 0, sizeof machine.parity);
    for (State state = State::running; state != State::done;) {
        const bool backwards = machine.turn++ & 1;
        for (unsigned i = 0; i < warps; ++i) {
            State reached;
            do reached = run_warp(backwards ? warps - 1 - i : i, backwards);
            while (reached == State::at_warp);
            if (i == 0) state = reached;
            if (reached != state) throw std::runtime_error("emulation: the warps of a block part ways at a barrier");
        }
    }
}

template <typename Kernel> void launch(dim3 grid, unsigned threads, size_t shared_bytes, Kernel kernel) {
    if (threads % 32 != 0 || threads > 1024)
        throw std::runtime_error("emulation: a block is 32 to 1024 threads in whole warps");
    if (shared_bytes > 227 * 1024) throw std::runtime_error("emulation: more shared memory than a GPU has");
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) throw std::runtime_error("emulation: an empty grid");
    if (machine.pool == nullptr) {  // 256 KiB of shared memory, then a page that faults
        const size_t page = size_t(sysconf(_SC_PAGESIZE));
        machine.pool_bytes = 256 * 1024;
        machine.pool = static_cast<unsigned char*>(
            mmap(nullptr, machine.pool_bytes + page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        mprotect(machine.pool, machine.pool_bytes, PROT_READ | PROT_WRITE);
    }
    machine.shared = machine.pool + machine.pool_bytes - (shared_bytes + 15) / 16 * 16;
    machine.kernel = kernel;
    if (machine.fibers.size() != threads) machine.fibers = std::vector<Fiber>(threads);
    gridDim = grid;
    blockDim = dim3(threads);
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                blockIdx = dim3(x, y, z);
                try {
                    run_block(threads / 32, shared_bytes);
                } catch (...) {
                    machine.fibers.clear();  // they stopped halfway
                    throw;
                }
            }
}

inline unsigned char* shared_memory() { return machine.shared; }

// Shows `mine` to the warp and returns where lane 0's lies; lane i's is 32 * i bytes further.
template <typename V> const unsigned char* exchange(const V& mine) {
    static_assert(sizeof(V) <= 32, "");
    const unsigned t = machine.current, set = machine.parity[t]++ & 1;
    std::memcpy(machine.exchanged[set][t], &mine, sizeof mine);
    yield(State::at_warp);
    return machine.exchanged[set][t / 32 * 32];
}
template <typename V> V shown(const unsigned char* set, unsigned lane) {
    V v;
    std::memcpy(&v, set + 32 * lane, sizeof v);
    return v;
}

// ---- warp instructions ----------------------------------------------------------------------------------------------
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, bool transposed) {
    const auto* rows = exchange(row);
    const unsigned lane = machine.current % 32;
    for (unsigned i = 0; i < 4; ++i) {
        uint16_t pair[2];
        for (unsigned j = 0; j < 2; ++j) {
            const unsigned from = transposed ? lane % 4 * 2 + j : lane / 4,
                           at = transposed ? lane / 4 : lane % 4 * 2 + j;
            const auto* source = shown<const uint16_t*>(rows, 8 * i + from);
            if (bits<uintptr_t>(source) % 16 != 0)
                throw std::runtime_error("emulation: ldmatrix needs 16-byte alignment");
            pair[j] = source[at];
        }
        r[i] = uint32_t(pair[1]) << 16 | pair[0];
    }
}

inline float widened(uint16_t v, __half) { return __half2float({v}); }
inline float widened(uint16_t v, __nv_bfloat16) { return __bfloat162float({v}); }

template <typename T> void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct Fragments {
        uint32_t a[4], b[2];
    };
    const auto* set = exchange(Fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}});
    const unsigned lane = machine.current % 32, row = lane / 4, col = lane % 4 * 2;
    // Element i is at (row + 8 * (i / 2), col + i % 2); four lanes hold a row of A or a column of B between them.
    for (unsigned i = 0; i < 4; ++i)
        for (unsigned k = 0; k < 16; ++k) {
            const auto from_a = shown<Fragments>(set, row * 4 + k % 8 / 2);
            const auto from_b = shown<Fragments>(set, (col + i % 2) * 4 + k % 8 / 2);
            const uint32_t pair_a = from_a.a[i / 2 + k / 8 * 2], pair_b = from_b.b[k / 8];
            c[i] += widened(uint16_t(pair_a >> k % 2 * 16), T{}) * widened(uint16_t(pair_b >> k % 2 * 16), T{});
        }
}
}  // namespace emulation

inline void __syncthreads() { emulation::yield(emulation::State::at_block); }
inline void __syncwarp(unsigned = ~0u) { emulation::yield(emulation::State::at_warp); }
template <typename V> V __shfl_sync(unsigned, V v, int lane) {
    return emulation::shown<V>(emulation::exchange(v), lane & 31);
}
template <typename V> V __shfl_xor_sync(unsigned, V v, int mask) {
    return emulation::shown<V>(emulation::exchange(v), (threadIdx.x & 31) ^ mask);
}
