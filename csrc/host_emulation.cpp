// The threads behind host_emulation.h: fibers of one process. Blocks run one after another; the warps of a block and the
// lanes of a warp take turns from one meeting to the next, all in random orders that a seed repeats. Lanes, or warps,
// that part ways at a meeting are an error.
//
// Where ThreadSanitizer's library is loaded, every thread is one of its fibers, and taking turns tells them nothing of
// each other's accesses: barriers do. So it reports what two threads of a block access without a barrier between, and
// two blocks of a launch at all, if they have different crews; there are two, which take turns. This file is compiled
// without it.
#include "host_emulation.h"

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <exception>
#include <memory>
#include <new>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

// ThreadSanitizer's; null where it is not loaded.
extern "C" {
[[gnu::weak]] void* __tsan_get_current_fiber();
[[gnu::weak]] void* __tsan_create_fiber(unsigned flags);
[[gnu::weak]] void __tsan_switch_to_fiber(void* fiber, unsigned flags);  // 1: synchronises nothing
[[gnu::weak]] void __tsan_acquire(void* meeting);
[[gnu::weak]] void __tsan_release(void* meeting);
}

namespace emulation {
namespace {

constexpr size_t kStackBytes = 64 * 1024 + 13 * 64, kPoolBytes = 256 * 1024;  // not all stacks in the same cache lines
constexpr unsigned kMostThreads = 1024, kMostPlaces = 256;
constexpr unsigned kCrews = 2;  // not new fibers for every block: each takes more than a megabyte of its memory
enum class State { at_exchange, at_warp, at_block, done };

struct Fiber {
    unsigned char* stack;
    void* resume[5];  // of __builtin_setjmp
    bool started = false;
    State state = State::done;
    unsigned block_barriers, warp_barriers, exchanges;  // so far in this block
    void* watched = nullptr;                            // ThreadSanitizer's fiber
};

// What ThreadSanitizer knows the meetings of a block by. Two take turns, as a thread may be at the next meeting before
// another has left this one.
struct Meetings {
    char block[2], warp[kMostThreads / 32][2];
};

struct Place {  // of a barrier
    const char* file;
    int line;
};

struct Machine {
    const bool watched = __tsan_create_fiber != nullptr;
    std::mt19937 random;
    std::vector<Fiber> crews[kCrews];
    Fiber* fibers;  // of the crew that runs the block
    void (*kernel)(void*);
    void* arguments;
    std::exception_ptr error;
    void* scheduler[5];
    void* scheduler_watched;
    unsigned current;
    unsigned char *pool = nullptr, *shared = nullptr;  // shared memory is the end of the pool
    Slot slots[2][kMostThreads];                       // with two sets one meeting per exchange is enough
    Meetings* meetings;
    char begin, end;  // what ThreadSanitizer knows a block's and a launch's by
    Place reached[kMostPlaces];
    unsigned reached_count = 0, launched = 0;
    std::string skipped_file;
    int skipped_line = 0;
};
Machine machine;

// ---- taking turns ---------------------------------------------------------------------------------------------------
[[gnu::noinline]] void jump(void** to) { __builtin_longjmp(to, 1); }

[[gnu::noinline]] void wait(State state) {
    Fiber& fiber = machine.fibers[machine.current];
    fiber.state = state;
    if (machine.watched) __tsan_switch_to_fiber(machine.scheduler_watched, 1);
    if (__builtin_setjmp(fiber.resume) == 0) jump(machine.scheduler);
}

void fiber_main() {
    for (;;) {
        if (machine.watched) __tsan_acquire(&machine.begin);
        try {
            machine.kernel(machine.arguments);
        } catch (...) { machine.error = std::current_exception(); }
        if (machine.watched) __tsan_release(&machine.end);
        wait(State::done);
    }
}

[[gnu::noinline]] void enter(unsigned char* stack) {
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStackBytes;
    makecontext(&context, fiber_main, 0);
    setcontext(&context);
}

// Runs thread t until its next meeting.
[[gnu::noinline]] void run(unsigned t) {
    Fiber& fiber = machine.fibers[t];
    machine.current = t;
    threadIdx = dim3(t, 0, 0);
    if (machine.watched) __tsan_switch_to_fiber(fiber.watched, 1);
    if (__builtin_setjmp(machine.scheduler) != 0) return;
    if (fiber.started) jump(fiber.resume);
    fiber.started = true;
    enter(fiber.stack);  // costs system calls, so a fiber that is done serves another block
}

unsigned random_below(size_t count) { return unsigned(machine.random() % count); }

// Runs the 32 lanes of a warp until they meet.
State run_warp(unsigned warp) {
    const unsigned first = random_below(32), step = random_below(16) * 2 + 1;
    for (unsigned i = 0; i < 32; ++i) run(warp * 32 + (first + i * step) % 32);
    if (machine.error) std::rethrow_exception(std::exchange(machine.error, nullptr));
    const Fiber* const lanes = &machine.fibers[warp * 32];
    for (unsigned i = 1; i < 32; ++i)
        if (lanes[i].state != lanes[0].state)
            throw std::runtime_error("emulation: the lanes of a warp part ways at a barrier");
    return lanes[0].state;
}

void run_warps(unsigned warps) {
    std::vector<State> at(warps);
    std::vector<unsigned> going;
    do {
        going.resize(warps);
        std::iota(going.begin(), going.end(), 0u);
        while (!going.empty()) {  // whichever warp, until all are at a barrier of the block
            unsigned& place = going[random_below(going.size())];
            const State reached = at[place] = run_warp(place);
            if (reached == State::at_block || reached == State::done) place = going.back(), going.pop_back();
        }
        for (State state : at)
            if (state != at[0]) throw std::runtime_error("emulation: the warps of a block part ways at a barrier");
    } while (at[0] != State::done);
}

// ---- blocks ---------------------------------------------------------------------------------------------------------
unsigned char* map(void* where, size_t bytes) {
    void* const memory = mmap(where, bytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (where ? MAP_FIXED : 0), -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    return static_cast<unsigned char*>(memory);
}

void hire(std::vector<Fiber>& crew, unsigned threads) {
    if (crew.size() >= threads) return;
    const unsigned missing = threads - unsigned(crew.size());
    unsigned char* stack = map(nullptr, missing * kStackBytes);  // never given back
    for (unsigned i = 0; i < missing; ++i, stack += kStackBytes) {
        crew.emplace_back();
        crew.back().stack = stack;
        if (machine.watched) crew.back().watched = __tsan_create_fiber(0);
    }
}

std::vector<unsigned> shuffled(unsigned count) {
    std::vector<unsigned> numbers(count);
    std::iota(numbers.begin(), numbers.end(), 0u);
    std::shuffle(numbers.begin(), numbers.end(), machine.random);
    return numbers;
}

void run_block(std::vector<Fiber>& crew, unsigned threads, size_t shared_bytes) {
    hire(crew, threads);
    machine.fibers = crew.data();
    for (Fiber& fiber : crew) fiber.block_barriers = fiber.warp_barriers = fiber.exchanges = 0;
    if (machine.watched) map(machine.pool, kPoolBytes);  // forgets who accessed it
    std::memset(machine.shared, 0xff, shared_bytes);
    const auto meetings = std::make_unique<Meetings>();  // so that what others knew is forgotten, too
    machine.meetings = meetings.get();
    if (machine.watched) __tsan_release(&machine.begin);
    try {
        run_warps(threads / 32);
    } catch (...) {
        for (Fiber& fiber : crew) fiber.started = false;  // they stopped halfway
        throw;
    }
}

// ---- barriers -------------------------------------------------------------------------------------------------------
// Called by threads: no function of the C library here, as ThreadSanitizer watches those wherever they are called.
bool skips(const char* path, int line) {
    unsigned i = machine.reached_count;
    while (i > 0 && (machine.reached[i - 1].file != path || machine.reached[i - 1].line != line)) --i;
    if (i == 0 && machine.reached_count < kMostPlaces) machine.reached[machine.reached_count++] = {path, line};
    if (line != machine.skipped_line) return false;
    const char *name = path, *skipped = machine.skipped_file.c_str();
    for (; *path; ++path)
        if (*path == '/') name = path + 1;
    while (*name && *name == *skipped) ++name, ++skipped;
    return *name == *skipped;
}

void synchronize(State state, void* meeting) {
    if (machine.watched) __tsan_release(meeting);
    wait(state);
    if (machine.watched) __tsan_acquire(meeting);
}

}  // namespace

void synchronize_block(const char* file, int line) {
    if (skips(file, line)) return;
    synchronize(State::at_block, &machine.meetings->block[machine.fibers[machine.current].block_barriers++ % 2]);
}

void synchronize_warp(const char* file, int line) {
    if (skips(file, line)) return;
    const unsigned t = machine.current;
    synchronize(State::at_warp, &machine.meetings->warp[t / 32][machine.fibers[t].warp_barriers++ % 2]);
}

Slot* next_slot() {
    const unsigned t = machine.current;
    return &machine.slots[machine.fibers[t].exchanges++ % 2][t];
}

const Slot* meet(const Slot* mine) {
    const unsigned lane = machine.current % 32;
    wait(State::at_exchange);
    return mine - lane;
}

unsigned char* shared_memory() { return machine.shared; }

void run_grid(dim3 grid, unsigned threads, size_t shared_bytes, void (*kernel)(void*), void* arguments) {
    if (threads % 32 != 0 || threads > kMostThreads)
        throw std::runtime_error("emulation: a block is 32 to 1024 threads in whole warps");
    if (shared_bytes > 227 * 1024) throw std::runtime_error("emulation: more shared memory than a GPU has");
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) throw std::runtime_error("emulation: an empty grid");
    if (machine.pool == nullptr) {  // with a page that faults behind it
        const size_t page = size_t(sysconf(_SC_PAGESIZE));
        machine.pool = map(nullptr, kPoolBytes + page);
        mprotect(machine.pool + kPoolBytes, page, PROT_NONE);
    }
    ++machine.launched;
    machine.shared = machine.pool + kPoolBytes - (shared_bytes + 15) / 16 * 16;
    machine.kernel = kernel;
    machine.arguments = arguments;
    gridDim = grid;
    blockDim = dim3(threads);
    if (machine.watched) machine.scheduler_watched = __tsan_get_current_fiber();
    unsigned crew = 0;
    for (unsigned b : shuffled(grid.x * grid.y * grid.z)) {
        blockIdx = dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
        run_block(machine.crews[crew], threads, shared_bytes);
        if (machine.watched) crew = (crew + 1) % kCrews;
    }
    if (machine.watched) __tsan_acquire(&machine.end);
}

}  // namespace emulation

// ---- what tests call, by ctypes -------------------------------------------------------------------------------------
extern "C" {
[[gnu::visibility("default")]] void emulation_seed(unsigned seed) { emulation::machine.random.seed(seed); }

// Kernels launched since the last call.
[[gnu::visibility("default")]] unsigned emulation_launched() { return std::exchange(emulation::machine.launched, 0u); }

// Leaves out the barrier at this line of this file of csrc/; line 0: none.
[[gnu::visibility("default")]] void emulation_skip(const char* file, int line) {
    emulation::machine.skipped_file = file;
    emulation::machine.skipped_line = line;
}

// The barriers reached since the last call: "path:line", each with a newline.
[[gnu::visibility("default")]] const char* emulation_reached() {
    static std::string places;
    places.clear();
    for (unsigned i = 0; i < emulation::machine.reached_count; ++i)
        places += std::string(emulation::machine.reached[i].file) + ":" +
                  std::to_string(emulation::machine.reached[i].line) + "\n";
    emulation::machine.reached_count = 0;
    return places.c_str();
}
}
