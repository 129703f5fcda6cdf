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
#if defined(__GLIBC__)
#include <sched.h>
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
#if defined(__GLIBC__)
        caller_cpu_.store(sched_getcpu(), std::memory_order_relaxed);
#endif
        // The generation tells the chunks of this work from those that a late worker remembers.
        ticket_.store(++generation_ << 32 | chunks_);
        if (sleepers_.load() > 0) {
            { std::lock_guard<std::mutex> lock(mutex_); }
            wake_.notify_all();
        }
        take_chunks(-1);
        while (done_.load(std::memory_order_acquire) < chunks_) std::this_thread::yield();
        busy_.store(false, std::memory_order_release);
    }

  private:
    // How long an idle worker yields before it sleeps; see docs/decisions.
    static constexpr std::chrono::microseconds PATIENCE{100};

    bool take_chunks(int id) {
        bool took = false;
        std::uint64_t ticket = ticket_.load(std::memory_order_acquire);
        while (std::uint32_t left = (std::uint32_t)ticket) {
            if (id >= helpers_.load()) break;  // the next work may want fewer helpers
            if (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel,
                                               std::memory_order_acquire))
                continue;
            // The work cannot be replaced before this chunk is done.
            task_(work_, chunks_ - left);
            done_.fetch_add(1, std::memory_order_release);
            took = true;
            ticket = ticket_.load(std::memory_order_acquire);
        }
        return took;
    }

    bool wanted(int id) const { return id < helpers_.load() && (std::uint32_t)ticket_.load() > 0; }

    void work(int id) {
        using clock = std::chrono::steady_clock;
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

    // The scheduler may wake a worker where the caller runs, and leave it there for milliseconds:
    // then the two take turns. A change of the affinity, taken back at once, moves it away.
    void leave_callers_cpu() {
#if defined(__GLIBC__)
        int cpu = sched_getcpu();
        if (cpu < 0 || cpu != caller_cpu_.load(std::memory_order_relaxed)) return;
        cpu_set_t allowed, others;
        if (cpu >= CPU_SETSIZE || sched_getaffinity(0, sizeof allowed, &allowed)) return;
        others = allowed;
        CPU_CLR(cpu, &others);
        if (CPU_COUNT(&others) > 0 && !sched_setaffinity(0, sizeof others, &others))
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
    std::condition_variable wake_;
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
