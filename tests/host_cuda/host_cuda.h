// Kernel source executed on the host: a test aid that runs CUDA C++ kernels on the CPU.
//
// It is NOT a GPU run and NOT an emulator. The kernel source is compiled by the host's C++20
// compiler; each CUDA thread becomes a fiber that runs until it meets a barrier or a warp-wide
// call, where a scheduler chooses, by the seed, who runs next. It finds wrong indexing, missing
// barriers and barriers that not all threads reach. It says nothing about the code generated for a
// GPU, weak memory order, lockstep, FMA contraction, the accuracy of the device's math functions,
// or speed. Blocks run one after the other. Only what the kernels use is there: no static shared
// memory, no atomics, no partial warps.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "fibers.h"

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define HOST_CUDA_QUIET __attribute__((no_sanitize("thread"), noinline))
#else
#define HOST_CUDA_QUIET
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

namespace host_cuda {

constexpr unsigned kWarp = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr std::size_t kMaxSharedBytes = 227 * 1024;
// An odd number of cache lines: a round one would put the tops of all stacks into the same few sets.
constexpr std::size_t kStackStride = kStackBytes + 5 * 64;
constexpr std::size_t kCanaryBytes = 64;
constexpr std::uint64_t kMaxSwitches = 20'000'000;  // of a block: more is taken for a hang
constexpr unsigned char kPoison = 0xff;  // NaN as a float, -1 as an index

// ---- State of a block -------------------------------------------------------------------------

enum class State : std::uint8_t { kReady, kAtBarrier, kInWarpCall, kFinished };
enum class WarpCall : std::uint8_t { kSync, kShuffle, kBallot, kMatch };

struct Thread {
    dim3 index;
    unsigned number = 0;
    State state = State::kReady;
    int site = 0;  // which barrier of the source it waits at
    unsigned barriers = 0, warp_syncs = 0;
    Context context;
    char* stack = nullptr;
    void* sanitizer = nullptr;
};

// What the scheduler asks of 32 threads at every step, in one place: to read it from each of them
// was a third of a kernel's time.
struct Warp {
    std::uint32_t ready = 0, in_call = 0;  // one bit a lane
    WarpCall call{};                       // which warp-wide call they wait in
    bool differs = false;                  // some are in another one
    unsigned calls = 0;                    // answered so far
    // Given to a call; a lane is in the next one before another has read the last one's, never two.
    std::uint64_t values[2][kWarp] = {};
};

struct Schedule {
    std::uint64_t seed = 0;    // 0: in order
    int removed_barrier = -1;  // site of a barrier to leave out, a planted bug
};

struct Block {
    dim3 index, dimensions, grid;
    std::vector<Thread> threads;
    Warp warps[kMaxThreads / kWarp];
    unsigned at_barrier = 0, finished = 0;
    unsigned char* shared = nullptr;
    void (*kernel)(void*) = nullptr;
    void* kernel_arguments = nullptr;
    Thread* running = nullptr;
    std::uint64_t switches = 0;
    Schedule schedule;
    std::uint64_t random = 0;
    std::string error;
    Context scheduler;
    void* scheduler_sanitizer = nullptr;
    const void* scheduler_stack = nullptr;
    std::size_t scheduler_stack_bytes = 0;
    // Addresses that stand for "happens before" in the thread sanitizer's eyes.
    char launch_edge = 0, finish_edge = 0, barrier_edges[2] = {};
    char warp_edges[kMaxThreads / kWarp][2] = {};
};

inline Block* block = nullptr;

inline void release([[maybe_unused]] char* edge) {
#if defined(__SANITIZE_THREAD__)
    __tsan_release(edge);
#endif
}
inline void acquire([[maybe_unused]] char* edge) {
#if defined(__SANITIZE_THREAD__)
    __tsan_acquire(edge);
#endif
}

HOST_CUDA_QUIET inline void leave_to_scheduler() {
    Thread* const me = block->running;
#if defined(__SANITIZE_THREAD__)
    // 1: the switch itself orders nothing, only the edges above do
    __tsan_switch_to_fiber(block->scheduler_sanitizer, 1);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(me->state == State::kFinished ? nullptr : &me->sanitizer,
                                   block->scheduler_stack, block->scheduler_stack_bytes);
#endif
    Context::jump(me->context, block->scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(me->sanitizer, nullptr, nullptr);
#endif
}

HOST_CUDA_QUIET inline void run_until_it_waits(Thread& thread) {
    block->running = &thread;
    if (++block->switches > kMaxSwitches) block->error = "the block does not come to an end";
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(thread.sanitizer, 1);
#endif
#if defined(__SANITIZE_ADDRESS__)
    void* own = nullptr;
    __sanitizer_start_switch_fiber(&own, thread.stack, kStackBytes);
#endif
    Context::jump(block->scheduler, thread.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(own, nullptr, nullptr);
#endif
}

// The thread that runs cannot until something has happened, or never again.
HOST_CUDA_QUIET inline void wait_as(State state) {
    Thread* const me = block->running;
    Warp& warp = block->warps[me->number / kWarp];
    const std::uint32_t lane = 1u << me->number % kWarp;
    me->state = state;
    warp.ready &= ~lane;
    if (state == State::kInWarpCall) warp.in_call |= lane;
    block->at_barrier += state == State::kAtBarrier;
    block->finished += state == State::kFinished;
}

HOST_CUDA_QUIET inline void thread_main() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &block->scheduler_stack,
                                    &block->scheduler_stack_bytes);
#endif
    acquire(&block->launch_edge);
    block->kernel(block->kernel_arguments);
    release(&block->finish_edge);
    wait_as(State::kFinished);
    leave_to_scheduler();
    std::abort();  // a finished thread is never resumed
}

// ---- What a kernel calls ----------------------------------------------------------------------

HOST_CUDA_QUIET inline void barrier(int site) {
    if (site == block->schedule.removed_barrier) return;
    Thread* const me = block->running;
    char* const edge = &block->barrier_edges[me->barriers++ % 2];
    release(edge);
    me->site = site;
    wait_as(State::kAtBarrier);
    leave_to_scheduler();
    acquire(edge);
}

// What the 32 lanes gave to a call, once all of them have.
HOST_CUDA_QUIET inline const std::uint64_t* warp_call(unsigned mask, WarpCall call,
                                                      std::uint64_t value) {
    Thread* const me = block->running;
    Warp& warp = block->warps[me->number / kWarp];
    if (mask != 0xffffffffu) block->error = "a warp-wide call with a partial mask";
    if (warp.in_call == 0) warp.call = call;
    warp.differs |= warp.call != call;
    std::uint64_t* const values = warp.values[warp.calls % 2];
    values[me->number % kWarp] = value;
    wait_as(State::kInWarpCall);
    leave_to_scheduler();
    return values;
}

// A shuffle or a vote orders no memory; this does.
HOST_CUDA_QUIET inline void warp_barrier(int site, unsigned mask = 0xffffffffu) {
    if (site == block->schedule.removed_barrier) return;
    Thread* const me = block->running;
    char* const edge = &block->warp_edges[me->number / kWarp][me->warp_syncs++ % 2];
    release(edge);
    warp_call(mask, WarpCall::kSync, 0);
    acquire(edge);
}

template <class T>
HOST_CUDA_QUIET T shuffle(unsigned mask, T value, unsigned source) {
    static_assert(sizeof(T) <= sizeof(std::uint64_t) && std::is_trivially_copyable_v<T>);
    std::uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    bits = warp_call(mask, WarpCall::kShuffle, bits)[source % kWarp];
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}

// One bit for every lane that gave this value.
HOST_CUDA_QUIET inline unsigned lanes_with(std::uint64_t value, const std::uint64_t* values) {
    unsigned found = 0;
    for (unsigned i = 0; i < kWarp; ++i) found |= unsigned(values[i] == value) << i;
    return found;
}

HOST_CUDA_QUIET inline unsigned lane() { return block->running->number % kWarp; }
HOST_CUDA_QUIET inline dim3 thread_index() { return block->running->index; }
HOST_CUDA_QUIET inline dim3 block_index() { return block->index; }
HOST_CUDA_QUIET inline dim3 block_dimensions() { return block->dimensions; }
HOST_CUDA_QUIET inline dim3 grid_dimensions() { return block->grid; }
HOST_CUDA_QUIET inline unsigned char* shared_memory() { return block->shared; }

// ---- Scheduler --------------------------------------------------------------------------------

// SplitMix64 (Steele, Lea and Flood, 2014); a draw is the high half of a product, not a remainder.
HOST_CUDA_QUIET inline unsigned draw(unsigned below) {
    std::uint64_t bits = block->random += 0x9e3779b97f4a7c15;
    bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9;
    bits = (bits ^ bits >> 27) * 0x94d049bb133111eb;
    return unsigned((bits >> 32) * below >> 32);
}

HOST_CUDA_QUIET inline void shuffle_order(unsigned* order, unsigned count) {
    if (block->schedule.seed == 0) return;
    for (unsigned left = count; left > 1; --left) std::swap(order[left - 1], order[draw(left)]);
}

// Answers a warp-wide call once all 32 lanes are in it; true if it did.
HOST_CUDA_QUIET inline bool answer_warp_call(Warp& warp, Thread* lanes) {
    if (~warp.in_call != 0) return false;
    if (warp.differs) block->error = "lanes are in different warp-wide calls";
    for (unsigned i = 0; i < kWarp; ++i) lanes[i].state = State::kReady;
    warp.ready = warp.in_call;
    warp.in_call = 0;
    warp.differs = false;
    ++warp.calls;
    return true;
}

// Runs the lanes of a warp that can run, in random order; false if none could.
HOST_CUDA_QUIET inline bool advance_warp(Warp& warp, Thread* lanes) {
    const std::uint32_t ready = warp.ready;  // a lane that runs changes nothing for another
    if (block->schedule.seed == 0) {
        for (std::uint32_t left = ready; left != 0 && block->error.empty(); left &= left - 1)
            run_until_it_waits(lanes[__builtin_ctz(left)]);
    } else {
        unsigned order[kWarp], count = 0;
        for (std::uint32_t left = ready; left != 0; left &= left - 1)
            order[count++] = unsigned(__builtin_ctz(left));
        shuffle_order(order, count);
        for (unsigned i = 0; i < count && block->error.empty(); ++i)
            run_until_it_waits(lanes[order[i]]);
    }
    return answer_warp_call(warp, lanes) || ready != 0;
}

HOST_CUDA_QUIET inline std::string describe_deadlock() {
    std::string text = "divergent barrier:";
    const char* const names[] = {"ready", "at a barrier", "in a warp-wide call", "finished"};
    for (int state = 0; state < 4; ++state) {
        const auto count = std::count_if(
            block->threads.begin(), block->threads.end(),
            [&](const Thread& thread) { return thread.state == State(state); });
        if (count > 0) text += " " + std::to_string(count) + " threads " + names[state] + ";";
    }
    text.pop_back();
    return text;
}

HOST_CUDA_QUIET inline void make_ready(Thread& thread) {
    thread.state = State::kReady;
    block->warps[thread.number / kWarp].ready |= 1u << thread.number % kWarp;
}

// Opens the block's barrier if every thread is at it.
HOST_CUDA_QUIET inline bool open_barrier() {
    std::vector<Thread>& threads = block->threads;
    if (block->at_barrier != threads.size()) return false;
    for (Thread& thread : threads) {
        if (thread.site != threads[0].site)
            block->error = "divergent barrier: threads wait at different barriers of the source";
        make_ready(thread);
    }
    block->at_barrier = 0;
    return true;
}

// Random priorities that change at random moments let one warp run far ahead of another, where
// even odds would keep them abreast (Burckhardt et al., ASPLOS 2010).
HOST_CUDA_QUIET inline void run_block() {
    const unsigned count = unsigned(block->threads.size());
    const unsigned warps = (count + kWarp - 1) / kWarp;
    unsigned priority[kMaxThreads / kWarp];
    for (unsigned w = 0; w < warps; ++w) priority[w] = w;
    shuffle_order(priority, warps);
    while (block->error.empty()) {
        if (block->schedule.seed != 0 && draw(4 * warps) == 0) shuffle_order(priority, warps);
        bool moved = false;
        for (unsigned p = 0; p < warps && !moved; ++p) {
            const unsigned w = priority[p];
            moved = advance_warp(block->warps[w], &block->threads[w * kWarp]);
        }
        if (moved || !block->error.empty() || open_barrier()) continue;
        if (block->finished == count) return;
        block->error = describe_deadlock();
    }
}

// ---- Launch -----------------------------------------------------------------------------------

inline Schedule next_schedule;
inline std::string last_error;

HOST_CUDA_QUIET inline void start_threads(Block& b, char* stacks) {
    std::fill(std::begin(b.warps), std::end(b.warps), Warp{});
    b.at_barrier = b.finished = 0;
    for (unsigned i = 0; i < b.threads.size(); ++i) {
        Thread& thread = b.threads[i];
        thread = Thread{};
        thread.number = i;
        make_ready(thread);
        thread.index = {i % b.dimensions.x, i / b.dimensions.x % b.dimensions.y,
                        i / b.dimensions.x / b.dimensions.y};
        thread.stack = stacks + i * kStackStride;
        thread.context.prepare(thread.stack, thread_main);
#if defined(__SANITIZE_THREAD__)
        thread.sanitizer = __tsan_create_fiber(0);
#endif
    }
}

HOST_CUDA_QUIET inline void finish_threads([[maybe_unused]] Block& b) {
#if defined(__SANITIZE_THREAD__)
    for (Thread& thread : b.threads) __tsan_destroy_fiber(thread.sanitizer);
#endif
}

// Shared memory anew for every block, poisoned, with a canary behind it.
HOST_CUDA_QUIET inline void run_block_with_shared(Block& b, std::size_t shared_bytes) {
#if defined(__SANITIZE_ADDRESS__)
    const std::size_t canary = 0;  // the sanitizer watches the exact size
#else
    const std::size_t canary = kCanaryBytes;
#endif
    auto* const memory = static_cast<unsigned char*>(std::malloc(shared_bytes + canary));
    std::memset(memory, kPoison, shared_bytes + canary);
    b.shared = memory;
    b.switches = 0;
    release(&b.launch_edge);
    run_block();
    acquire(&b.finish_edge);
    for (std::size_t i = shared_bytes; i < shared_bytes + canary; ++i)
        if (memory[i] != kPoison && b.error.empty()) b.error = "a write past the shared memory";
    std::free(memory);
}

// The same in all launches: a page touched for the first time costs more than most kernels.
inline char* kept_stacks() {
    static void* const stacks = mmap(nullptr, kMaxThreads * kStackStride, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return stacks == MAP_FAILED ? nullptr : static_cast<char*>(stacks);
}

template <class... Parameters, std::size_t... I>
HOST_CUDA_QUIET int launch(void (*kernel)(Parameters...), const unsigned* shape,
                           std::size_t shared_bytes, void** values, std::index_sequence<I...>) {
    Block b;
    b.grid = {shape[0], shape[1], shape[2]};
    b.dimensions = {shape[3], shape[4], shape[5]};
    b.schedule = next_schedule;
    b.random = b.schedule.seed;
    const unsigned count = b.dimensions.x * b.dimensions.y * b.dimensions.z;
    const std::uint64_t blocks = std::uint64_t(b.grid.x) * b.grid.y * b.grid.z;
    if (count == 0 || count > kMaxThreads) b.error = "a block has 1 to 1024 threads";
    if (shared_bytes > kMaxSharedBytes) b.error = "more than 227 KiB of shared memory";
    auto call = [&] {
        std::apply(kernel, std::tuple<Parameters...>{*static_cast<Parameters*>(values[I])...});
    };
    b.kernel = [](void* arguments) { (*static_cast<decltype(call)*>(arguments))(); };
    b.kernel_arguments = &call;

    char* const stacks = kept_stacks();
    if (stacks == nullptr) b.error = "no memory for the stacks";
    block = &b;
#if defined(__SANITIZE_THREAD__)
    b.scheduler_sanitizer = __tsan_get_current_fiber();
#endif
    for (std::uint64_t i = 0; i < blocks && b.error.empty(); ++i) {
        b.index = {unsigned(i % b.grid.x), unsigned(i / b.grid.x % b.grid.y),
                   unsigned(i / b.grid.x / b.grid.y)};
        b.threads.resize(count);
        start_threads(b, stacks);
        run_block_with_shared(b, shared_bytes);  // after an error its threads are dropped as is
        finish_threads(b);
    }
    block = nullptr;
    last_error = b.error;
    return b.error.empty() ? 0 : 1;
}

}  // namespace host_cuda

extern "C" inline __attribute__((used)) void host_cuda_schedule(std::uint64_t seed, int removed) {
    host_cuda::next_schedule = {seed, removed};
}
extern "C" inline __attribute__((used)) const char* host_cuda_error() {
    return host_cuda::last_error.c_str();
}

#define HOST_CUDA_EXPORT(kernel)                                                              \
    template <class... Parameters>                                                            \
    static int launch_##kernel(void (*function)(Parameters...), const unsigned* shape,        \
                               std::size_t shared_bytes, void** values) {                     \
        return host_cuda::launch(function, shape, shared_bytes, values,                       \
                                 std::index_sequence_for<Parameters...>{});                   \
    }                                                                                         \
    extern "C" int kernel##_on_host(const unsigned* shape, std::size_t shared_bytes,          \
                                    void** values) {                                          \
        return launch_##kernel(kernel, shape, shared_bytes, values);                          \
    }
