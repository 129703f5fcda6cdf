// The inner loops that sum, as templates: runs, valid positions behind a mask, columns.
//
// T is the type of x. What else a loop does is a template argument as well, so that each loop is
// compiled for just that: `gradient` (x and dy, not x alone), `shifted` (sums of x - k, not of x),
// `fused` (dy is behind an activation).
//
// Positions count values from the beginning of the job's arrays. README.md tells how one of these
// loops comes about, step by step.

#pragma once

#include "job.hpp"
#include "packs.hpp"

namespace fastbn {

constexpr int LANES = 16;
constexpr std::ptrdiff_t MOST_RUNS = 64;      // that one call sums side by side
constexpr std::ptrdiff_t MOST_CHANNELS = 16;  // likewise, behind a mask
// Values of a float64 run that are summed before rounding errors are kept. Another one changes bits.
constexpr std::ptrdiff_t STEP = 512;

// `channels` runs of `length` values, one behind the other, in each of some rows.
struct Runs {
    std::ptrdiff_t start, channels, length, next_channel;
    std::ptrdiff_t rows, next_row;
    std::ptrdiff_t ahead;  // how many values ahead of the sum memory is prefetched
};

// `width` columns of some rows.
struct Columns {
    std::ptrdiff_t start, width;
    std::ptrdiff_t rows, next_row;
    // Rows added while the sums stay in registers. A variable, because a compiler that unrolls by a
    // constant made backward up to 1.6 times slower: loads of x and dy then got in each other's way
    // if the two lie at the same place in their pages.
    std::ptrdiff_t side;
    // How many values ahead of the sum memory is prefetched: in a straight line, where rows follow
    // each other, or in the same columns. 0 is not at all.
    std::ptrdiff_t ahead, ahead_in_columns;
    bool added;            // to what the sums are already
};

namespace {

using Wide = Pack<double>;

template <class T> constexpr bool exact_products = !std::is_same_v<T, double>;  // in float64


template <class T> INLINE void prefetch_pack(const T* p) {
    constexpr std::ptrdiff_t line = 64 / sizeof(T);
    for (std::ptrdiff_t t = 0; t < LANES; t += line) prefetch(p + t);
}

// Sums of d = x - k (or x) and of d * d; or of g (dy behind the activation) and of g * d.
template <class T, bool gradient, bool shifted, bool fused>
INLINE void add_packs(const Job& job, std::ptrdiff_t i, std::ptrdiff_t count,
                      std::ptrdiff_t stride, int lanes, Wide k, Wide& sum_a, Wide& sum_b,
                      std::ptrdiff_t ahead = 0) {
    const T* x = (const T*)job.x;
    const T* dy = (const T*)job.dy;
    const std::uint16_t* signs = job.signs;
    std::ptrdiff_t first_bit = job.first_bit;
    double slope = job.slope;
    Wide a = sum_a, b = sum_b;
    if (lanes < LANES) k = join(k, fill(0.0), lanes);
    for (; count > 0; count--, i += stride) {
        if (ahead) {
            prefetch_pack(x + i + ahead);
            if constexpr (gradient) prefetch_pack(dy + i + ahead);
        }
        Wide d = load_wide(x + i, lanes), g;
        if constexpr (shifted) d = d - k;
        if constexpr (!gradient) g = d;
        else if constexpr (!fused) g = load_wide(dy + i, lanes);
        else if constexpr (shifted)
            g = leaky_relu(get_bits(signs, first_bit + i), load_wide(dy + i, lanes), slope);
        else  // the slope is 0
            g = widen(leaky_relu(get_bits(signs, first_bit + i), load(dy + i, lanes), 0));
        a = a + g;
        if constexpr (shifted) b = b + g * d; else b = add_exact_product(b, g, d);
    }
    sum_a = a;
    sum_b = b;
}

// Call body(gradient, shifted, fused) with what holds for this job, as compile-time constants.
template <class T, class Body> INLINE void with_flags(const Job& job, bool shifted, Body body) {
    using Yes = std::true_type;
    using No = std::false_type;
    auto choose = [&](auto is_shifted) {
        if (!job.dy) body(No(), is_shifted, No());
        else if (!job.signs) body(Yes(), is_shifted, No());
        else body(Yes(), is_shifted, Yes());
    };
    // Products with a slope other than 0 are not exact, nor are those of two float64.
    if (job.dy && job.signs && job.slope != 0) shifted = true;
    if constexpr (exact_products<T>)
        if (!shifted) return choose(No());
    choose(Yes());
}

// Two sums of each lane, with what they lose in rounding (TwoSum, of Ogita, Rump and Oishi, 2005).
struct Careful {
    Wide a = fill(0.0), b = fill(0.0), low_a = fill(0.0), low_b = fill(0.0);
    static INLINE void add(Wide& sum, Wide& low, Wide term) {
        Wide high = sum + term, part = high - sum;
        low = low + ((sum - (high - part)) + (term - part));
        sum = high;
    }
    INLINE void add(Wide more_a, Wide more_b) {
        add(a, low_a, more_a);
        add(b, low_b, more_b);
    }
    INLINE void finish(double* sums) {
        sums[0] = sum_lanes(a + low_a);
        sums[1] = sum_lanes(b + low_b);
    }
};

template <class T, bool gradient, bool shifted, bool fused>
void sum_runs_as(const Job& job, const Runs& r, double shift, double* sums, std::ptrdiff_t next) {
    Wide a[MOST_RUNS], b[MOST_RUNS], k = fill(shift);
    std::ptrdiff_t whole = r.length / LANES, width = r.channels * r.next_channel;
    int tail = (int)(r.length % LANES);
    for (std::ptrdiff_t c = 0; c < r.channels; c++) a[c] = b[c] = fill(0.0);
    for (std::ptrdiff_t row = 0; row < r.rows; row++) {
        std::ptrdiff_t i = r.start + row * r.next_row;
        for (std::ptrdiff_t c = 0; c < r.channels; c++, i += r.next_channel) {
            // What is ahead of the end of a row is in the next one.
            bool next = c * r.next_channel + r.ahead >= width;
            add_packs<T, gradient, shifted, fused>(job, i, whole, LANES, LANES, k, a[c], b[c],
                                                   r.ahead + (next ? r.next_row - width : 0));
            if (tail)
                add_packs<T, gradient, shifted, fused>(job, i + whole * LANES, 1, LANES, tail, k,
                                                       a[c], b[c]);
        }
    }
    for (std::ptrdiff_t c = 0; c < r.channels; c++) {
        sums[c * next] = sum_lanes(a[c]);
        sums[c * next + 1] = sum_lanes(b[c]);
    }
}

// The same in steps of some whole runs, or of a piece of one.
template <class T, bool gradient, bool shifted, bool fused>
void sum_runs_carefully(const Job& job, const Runs& r, double shift, double* sums,
                        std::ptrdiff_t next) {
    Wide k = fill(shift);
    std::ptrdiff_t rows = r.length < STEP ? STEP / r.length : 1;  // of a step
    for (std::ptrdiff_t c = 0; c < r.channels; c++) {
        Careful total;
        Wide a = fill(0.0), b = fill(0.0);
        for (std::ptrdiff_t row = 0; row < r.rows; row++) {
            std::ptrdiff_t i = r.start + c * r.next_channel + row * r.next_row;
            for (std::ptrdiff_t rest = r.length; rest > 0; rest -= STEP, i += STEP) {
                std::ptrdiff_t length = rest < STEP ? rest : STEP, whole = length / LANES;
                int tail = (int)(length % LANES);
                bool next = rest <= r.ahead;
                add_packs<T, gradient, shifted, fused>(job, i, whole, LANES, LANES, k, a, b,
                                                       r.ahead + (next ? r.next_row - r.length : 0));
                if (tail)
                    add_packs<T, gradient, shifted, fused>(job, i + whole * LANES, 1, LANES, tail,
                                                           k, a, b);
                if (rest > STEP || (row + 1) % rows == 0 || row + 1 == r.rows) {
                    total.add(a, b);
                    a = b = fill(0.0);
                }
            }
        }
        total.finish(sums + c * next);
    }
}

// Sum the runs of each channel, shifted by k where asked: two sums a channel, `next` apart.
template <class T>
void sum_runs(const Job& job, const Runs& r, bool shifted, double k, double* sums,
              std::ptrdiff_t next) {
    with_flags<T>(job, shifted, [&](auto gradient, auto is_shifted, auto fused) {
        if constexpr (exact_products<T>)
            sum_runs_as<T, decltype(gradient)::value, decltype(is_shifted)::value,
                        decltype(fused)::value>(job, r, k, sums, next);
        else
            sum_runs_carefully<T, decltype(gradient)::value, decltype(is_shifted)::value,
                               decltype(fused)::value>(job, r, k, sums, next);
    });
}

// The sums of 16 lanes, each at several places, so that they can be read from any lane on.
struct Wheel {
    double sums[3 * LANES];
    INLINE double* from(int lane, int last) { return sums + lane + (lane < last ? LANES : 0); }
    INLINE void put(Wide a, int lane) {
        store(sums + lane, a, LANES);
        store(sums + lane + LANES, a, LANES);
    }
};

template <class T, bool gradient, bool shifted, bool fused>
void sum_valid_as(const Job& job, const Run* run, std::ptrdiff_t first, std::ptrdiff_t end,
                  std::ptrdiff_t channel, std::ptrdiff_t channels, double shift, double* sums,
                  std::ptrdiff_t next) {
    Wheel a[MOST_CHANNELS], b[MOST_CHANNELS];
    Careful total[exact_products<T> ? 1 : MOST_CHANNELS];
    Wide k = fill(shift);
    int lane = 0, last = 0;  // of the first value of this run, and of the run before
    std::ptrdiff_t upto = exact_products<T> ? end : first;  // of a step
    for (std::ptrdiff_t c = 0; c < channels; c++) {
        a[c].put(fill(0.0), 0);
        b[c].put(fill(0.0), 0);
    }
    for (; first < end; run += first == run[1].before) {
        if (!exact_products<T> && first == upto) upto = end - first < STEP ? end : first + STEP;
        std::ptrdiff_t position = run->position - job.first_position + (first - run->before);
        std::ptrdiff_t length = (run[1].before < upto ? run[1].before : upto) - first;
        std::ptrdiff_t whole = length / LANES, row = position / job.inner;
        int tail = (int)(length % LANES);
        std::ptrdiff_t i = (row * (job.channels - 1) + channel) * job.inner + position;
        for (std::ptrdiff_t c = 0; c < channels; c++, i += job.inner) {
            Wide sum_a = load((const double*)a[c].from(lane, last), LANES);
            Wide sum_b = load((const double*)b[c].from(lane, last), LANES);
            add_packs<T, gradient, shifted, fused>(job, i, whole, LANES, LANES, k, sum_a, sum_b);
            if (tail)
                add_packs<T, gradient, shifted, fused>(job, i + whole * LANES, 1, LANES, tail, k,
                                                       sum_a, sum_b);
            a[c].put(sum_a, lane);
            b[c].put(sum_b, lane);
        }
        first += length;
        last = lane;
        lane = (lane + tail) % LANES;
        if (exact_products<T> || first < upto) continue;
        for (std::ptrdiff_t c = 0; c < channels; c++) {
            total[c].add(load((const double*)a[c].from(0, last), LANES),
                         load((const double*)b[c].from(0, last), LANES));
            a[c].put(fill(0.0), 0);
            b[c].put(fill(0.0), 0);
        }
        lane = last = 0;
    }
    for (std::ptrdiff_t c = 0; c < channels; c++) {
        if constexpr (!exact_products<T>) {
            total[c].finish(sums + c * next);
            continue;
        }
        sums[c * next] = sum_lanes(load((const double*)a[c].from(0, last), LANES));
        sums[c * next + 1] = sum_lanes(load((const double*)b[c].from(0, last), LANES));
    }
}

// Sum the valid positions from `first` to `end`, counted among the valid ones, of some channels;
// `run` is the run of the first. The bits are those of a run that has these positions alone.
template <class T>
void sum_valid(const Job& job, const Run* run, std::ptrdiff_t first, std::ptrdiff_t end,
               std::ptrdiff_t channel, std::ptrdiff_t channels, bool shifted, double k,
               double* sums, std::ptrdiff_t next) {
    with_flags<T>(job, shifted, [&](auto gradient, auto is_shifted, auto fused) {
        sum_valid_as<T, decltype(gradient)::value, decltype(is_shifted)::value,
                     decltype(fused)::value>(job, run, first, end, channel, channels, k, sums,
                                             next);
    });
}

template <class T, bool gradient, bool shifted, bool fused>
void sum_columns_as(const Job& job, const Columns& given, const double* k, double* a, double* b) {
    const Columns c = given;
    const T* x = (const T*)job.x;
    const T* dy = (const T*)job.dy;
    Wide shift = fill(0.0);
    for (std::ptrdiff_t j = 0; j < c.width && !c.added; j += LANES) {
        store(a + j, shift, LANES);
        store(b + j, shift, LANES);
    }
    for (std::ptrdiff_t row = 0; row < c.rows; row += c.side) {
        std::ptrdiff_t count = c.rows - row < c.side ? c.rows - row : c.side;
        for (std::ptrdiff_t j = 0; j < c.width; j += LANES) {
            std::ptrdiff_t i = c.start + row * c.next_row + j;
            int lanes = (int)(c.width - j < LANES ? c.width - j : LANES);
            Wide sum_a = load((const double*)a + j, LANES);
            Wide sum_b = load((const double*)b + j, LANES);
            if constexpr (shifted)
                if (k) shift = load(k + j, LANES);
            if (lanes == LANES)
                add_packs<T, gradient, shifted, fused>(job, i, count, c.next_row, LANES, shift,
                                                       sum_a, sum_b, c.ahead_in_columns);
            else
                add_packs<T, gradient, shifted, fused>(job, i, count, c.next_row, lanes, shift,
                                                       sum_a, sum_b);
            store(a + j, sum_a, LANES);
            store(b + j, sum_b, LANES);
            if (c.ahead == 0) continue;
            i = c.start + row * c.next_row + j * c.side + c.ahead;
            for (std::ptrdiff_t t = 0; t < c.side; t++, i += LANES) {
                prefetch_pack(x + i);
                if constexpr (gradient) prefetch_pack(dy + i);
            }
        }
    }
}

// Sum columns into a and b. These, and k, have room for whole packs. k has a shift for each
// column, or is NULL.
template <class T>
void sum_columns(const Job& job, const Columns& c, const double* k, double* a, double* b) {
    with_flags<T>(job, k != nullptr, [&](auto gradient, auto shifted, auto fused) {
        sum_columns_as<T, decltype(gradient)::value, decltype(shifted)::value,
                       decltype(fused)::value>(job, c, k, a, b);
    });
}

}  // namespace
}  // namespace fastbn
