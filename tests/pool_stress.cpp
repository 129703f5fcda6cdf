// Run jobs on the pool from several threads at once; built with a sanitizer by `nox -s tsan`.

#include <cstdio>
#include <vector>

#include "pool.hpp"

struct Job {
    std::vector<long> results;  // plain: a chunk that two threads compute is a race
    long factor;
};

static void compute(void* pointer, std::ptrdiff_t chunk) {
    Job* job = static_cast<Job*>(pointer);
    for (int i = 0; i < 50; i++) job->results[chunk] += job->factor * (chunk + 1);
}

static void run_inner(void* pointer, std::ptrdiff_t chunk) {  // a job within a job
    Job inner{std::vector<long>(5), 3};
    fastbn::the_pool()->share_out(compute, &inner, 5, 4);
    for (int i = 0; i < 5; i++) static_cast<Job*>(pointer)->results[chunk] += inner.results[i];
}

static std::atomic<long> wrong{0};

static void call(unsigned seed, int rounds) {
    auto next = [&] { return (seed = seed * 1664525u + 1013904223u) >> 16; };
    for (int round = 0; round < rounds; round++) {
        Job job{std::vector<long>(next() % 40), (long)(next() % 9)};
        const long chunks = (long)job.results.size();
        const bool nested = next() % 8 == 0;
        fastbn::the_pool()->share_out(nested ? run_inner : compute, &job, chunks, 1 + next() % 8);
        for (long chunk = 0; chunk < chunks; chunk++) {
            const long wanted = 50 * (nested ? 3 * 15 : job.factor * (chunk + 1));
            if (job.results[chunk] != wanted) wrong++;
        }
        // Long enough for the workers to fall asleep, or nearly.
        if (next() % 16 == 0) std::this_thread::sleep_for(std::chrono::microseconds(next() % 400));
    }
}

int main() {
    call(1, 2000);  // alone: each job has the pool
    std::vector<std::thread> callers;
    for (unsigned seed = 2; seed < 8; seed++) callers.emplace_back(call, seed, 2000);
    for (std::thread& caller : callers) caller.join();
    call(9, 200);
    std::printf("%ld wrong\n", wrong.load());
    return wrong.load() != 0;
}
