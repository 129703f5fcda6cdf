// What `functional` asks of a kernel: the description of one call.
//
// Both sides are compiled from this file, and each tells the size of a Job: a module that was
// compiled from another version of it is refused.

#pragma once

#include <cstddef>
#include <cstdint>

namespace fastbn {

enum Type { FLOAT32, FLOAT64, FLOAT16, BFLOAT16 };

enum Operation {
    FORWARD,         // by the minibatch's own statistics; without out: the statistics alone
    INFERENCE,       // by given statistics
    BACKWARD,        // gradients of FORWARD; without out: dgamma and dbeta alone
    BACKWARD_FIXED,  // gradients of INFERENCE: the statistics are constants
    APPLY            // dx of FORWARD by given dgamma and dbeta
};

// Neighbouring positions that a mask leaves. A position is one of outer * inner. A run does not go
// beyond a row of inner positions, unless channels or inner is 1, nor beyond a group.
struct Run {
    std::ptrdiff_t position;  // of the first
    std::ptrdiff_t before;    // how many valid positions there are before it
};

// IN is read, OUT is written. Arrays lie in memory as (outer, channels, inner), without gaps.
struct Job {
    Operation operation;
    Type type;                // of x, dy, residual and the results
    std::ptrdiff_t itemsize;  // of that type, in bytes

    std::ptrdiff_t examples;  // outer size of all groups together
    // Outer size of one group, which has statistics of its own. The last may be smaller.
    std::ptrdiff_t outer;
    std::ptrdiff_t channels;
    std::ptrdiff_t inner;
    double count;             // how many values of a channel the statistics cover

    const void* x;            // IN
    const void* dy;           // IN, backward; NULL in a forward pass
    void* out;                // OUT: y or dx; may be x, dy or residual itself
    const void* residual;     // IN, may be NULL
    void* dresidual;          // OUT, backward, may be NULL

    bool activated;           // whether y = (a > 0 ? a : slope * a) follows
    double slope;
    std::uint16_t* signs;     // OUT (may be NULL), IN backward: whether a > 0, a bit for each value
    std::ptrdiff_t first_bit; // of the first value; a full pack of out has its bits in one word

    // Of a mask, both NULL without one. Behind the last run there is one more, which ends it.
    const Run* runs;          // IN
    const std::uint16_t* valid;  // IN, a bit for each position; needed where inner is above 1
    std::ptrdiff_t run_count;
    std::ptrdiff_t valid_count;     // of this group, as are the next two; functional leaves those 0
    std::ptrdiff_t first_position;
    std::ptrdiff_t valid_before;

    const double* gamma;      // IN, one value per parameter
    const double* beta;       // IN, one value per parameter; not in backward
    double eps;

    // mean to dbeta have one value per statistic. The first three are OUT of FORWARD, IN otherwise.
    double* mean;
    double* mean_low;         // what rounding took from mean
    double* var;
    // OUT of backward; IN of APPLY, as the sum over all parts of the minibatch.
    double* dgamma;
    double* dbeta;

    std::ptrdiff_t first_statistic;  // of this group; functional leaves it 0
    bool past_cache;                 // whether out is written past the cache; set by the kernel
    bool residual_past_cache;        // likewise dresidual
};

}  // namespace fastbn
