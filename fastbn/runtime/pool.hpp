// The worker threads.
//
// One piece of work at a time, cut into chunks, which one counter hands out. The caller takes
// chunks as a worker does, so it never waits for a worker that has not begun. A worker that wakes
// late finds nothing to do. Which thread computes a chunk changes no bit of a result.
//
// A caller that finds the pool busy (with another thread's work, or with its own) does all chunks
// itself. Workers that find nothing yield for a moment, so that a loop of calls need not wake them,
// then sleep. They block signals, so Ctrl-C reaches Python's main thread. A child of a fork begins
// with a new pool, because the threads of the old one do not exist there.

#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>

#if !defined(_WIN32)
#include <pthread.h>
#include <signal.h>
#endif
#if defined(__linux__)
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastbn {

using Task = void (*)(void* work, std::ptrdiff_t chunk);

class Pool {
  public:
    // Call task(work, chunk) for each chunk from 0, on at most `threads` threads, this one included.
    void share_out(Task task, void* work, std::ptrdiff_t chunks, int threads) {
        if (threads < 2 || chunks < 2 || chunks > UINT32_MAX || busy_.exchange(true)) {
            for (std::ptrdiff_t chunk = 0; chunk < chunks; chunk++) task(work, chunk);
            return;
        }
        int helpers = (int)(chunks < threads ? chunks : threads) - 1;
        while (workers_ < helpers && start_worker()) {}
        task_ = task;
        work_ = work;
        chunks_ = (std::uint32_t)chunks;
        done_.store(0, std::memory_order_relaxed);
        helpers_.store(helpers);
#if defined(__linux__)
        caller_cpu_.store(sched_getcpu(), std::memory_order_relaxed);
#endif
        // The generation tells the chunks of this work from those that a late worker remembers.
        ticket_.store(++generation_ << 32 | chunks_);
        if (sleepers_.load() > 0) {
            { std::lock_guard<std::mutex> lock(mutex_); }
            wake_.notify_all();
        }
        take_chunks(-1);
        wait_for_workers();
        busy_.store(false, std::memory_order_release);
    }

  private:
    // How long an idle worker yields before it sleeps; see docs/decisions.
    static constexpr std::chrono::microseconds PATIENCE{100};
    static constexpr std::uint64_t SLICE = 100'000;  // nanoseconds

    bool take_chunks(int id) {
        bool took = false;
        std::uint64_t ticket = ticket_.load(std::memory_order_acquire);
        while (std::uint32_t left = (std::uint32_t)ticket) {
            if (id >= helpers_.load()) break;  // the next work may want fewer helpers
            if (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel,
                                               std::memory_order_acquire))
                continue;
            // The work cannot be replaced before this chunk is done.
            std::uint32_t all = chunks_;
            task_(work_, all - left);
            if (done_.fetch_add(1) + 1 == all && caller_waits_.load()) {
                { std::lock_guard<std::mutex> lock(mutex_); }
                finished_.notify_all();
            }
            took = true;
            ticket = ticket_.load(std::memory_order_acquire);
        }
        return took;
    }

    // Yield for a moment, then sleep: a caller of high priority could keep a worker from running.
    void wait_for_workers() {
        auto begin = std::chrono::steady_clock::now();
        while (done_.load(std::memory_order_acquire) < chunks_) {
            if (std::chrono::steady_clock::now() - begin < PATIENCE) {
                std::this_thread::yield();
            } else {
                std::unique_lock<std::mutex> lock(mutex_);
                caller_waits_.store(true);  // before the last look at done_: see take_chunks
                while (done_.load() < chunks_) finished_.wait(lock);
                caller_waits_.store(false);
            }
        }
    }

    bool wanted(int id) const { return id < helpers_.load() && (std::uint32_t)ticket_.load() > 0; }

    void work(int id) {
        using clock = std::chrono::steady_clock;
        ask_for_short_slices();
        for (clock::time_point idle = clock::now();;) {
            leave_callers_cpu();
            if (wanted(id) && take_chunks(id)) {
                idle = clock::now();
            } else if (clock::now() - idle < PATIENCE) {
                std::this_thread::yield();
            } else {
                std::unique_lock<std::mutex> lock(mutex_);
                sleepers_.fetch_add(1);  // before the last look at the ticket: see share_out
                // A worker that wakes too late for this work stays awake and helps with the next.
                // Else it would never help with calls that take no longer than waking.
                if (!wanted(id)) do wake_.wait(lock); while (id >= helpers_.load());
                sleepers_.fetch_sub(1);
                idle = clock::now();
            }
        }
    }

    // The scheduler may wake a worker on the CPU where the caller runs, although others are idle:
    // in a virtual machine a CPU that sleeps looks as if it was taken away. With a short slice of
    // time the worker soon runs there, and leaves. Linux 6.12 and later heed it.
    static void ask_for_short_slices() {
#if defined(__linux__) && defined(SYS_sched_setattr)
        struct {
            std::uint32_t size, policy;
            std::uint64_t flags;
            std::int32_t nice;
            std::uint32_t priority;
            std::uint64_t runtime, deadline, period;
        } attributes = {};
        if (syscall(SYS_sched_getattr, 0, &attributes, sizeof attributes, 0)) return;
        if (attributes.policy != SCHED_OTHER) return;
        attributes.runtime = SLICE;
        syscall(SYS_sched_setattr, 0, &attributes, 0);
#endif
    }

    // A change of the affinity, taken back at once, moves a worker away from the caller's CPU. If
    // somebody else has changed it meanwhile, that change stays.
    void leave_callers_cpu() {
#if defined(__linux__)
        int cpu = sched_getcpu();
        if (cpu < 0 || cpu != caller_cpu_.load(std::memory_order_relaxed)) return;
        cpu_set_t allowed, others, found;
        if (cpu >= CPU_SETSIZE || sched_getaffinity(0, sizeof allowed, &allowed)) return;
        others = allowed;
        CPU_CLR(cpu, &others);
        if (CPU_COUNT(&others) == 0 || sched_setaffinity(0, sizeof others, &others)) return;
        if (sched_getaffinity(0, sizeof found, &found) || !CPU_EQUAL(&found, &others)) return;
        sched_setaffinity(0, sizeof allowed, &allowed);
#endif
    }

    bool start_worker() {
#if !defined(_WIN32)
        sigset_t all, before;
        sigfillset(&all);
        for (int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) sigdelset(&all, fault);
        pthread_sigmask(SIG_SETMASK, &all, &before);
#endif
        bool started = true;
        try {
            std::thread(&Pool::work, this, workers_).detach();
            workers_++;
        } catch (...) {
            started = false;  // no more threads to be had: go on with those there are
        }
#if !defined(_WIN32)
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
#endif
        return started;
    }

    std::atomic<bool> busy_{false};  // whoever sets it owns what follows
    int workers_ = 0;
    std::uint64_t generation_ = 0;

    std::atomic<std::uint64_t> ticket_{0};  // generation, chunks left
    std::atomic<std::uint32_t> done_{0};
    std::atomic<int> helpers_{0};  // workers with a lower number help; the others wait
    Task task_ = nullptr;
    void* work_ = nullptr;
    std::uint32_t chunks_ = 0;

    std::atomic<int> caller_cpu_{-1};

    std::mutex mutex_;
    std::condition_variable wake_;      // of workers
    std::condition_variable finished_;  // of the caller
    std::atomic<bool> caller_waits_{false};
    std::atomic<int> sleepers_{0};
};

// Never destroyed: idle workers outlive the interpreter.
inline Pool*& the_pool() {
    static Pool* pool = [] {
#if !defined(_WIN32)
        pthread_atfork(nullptr, nullptr, [] { the_pool() = new Pool; });
#endif
        return new Pool;
    }();
    return pool;
}

}  // namespace fastbn
