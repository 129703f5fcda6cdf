// The inner loops, as templates: sum runs, sum columns, write a segment of runs, write rows.
//
// T is the type of x. What else a loop does is a template argument as well, so that each loop is
// compiled for just that: `gradient` (x and dy, not x alone), `shifted` (sums of x - k, not of x),
// `fused` (an activation, a residual, or constant statistics). `Loops` has them for one type.
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

// The coefficients of each channel, in float64; normalisation needs the first three.
//     y = (x - center) * scale + shift
//     dx = ((g - level) - ((x - center) * slope + shift)) * scale
// In backward shift holds the residue: what center and level lose in rounding.
struct Table {
    double *center, *scale, *shift, *slope, *level;
};

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

// ------------------------------------------------------------------------------------------ sums

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

// -------------------------------------------------------------------------------------- elements

// The coefficients of the lanes of one pack, in the precision of the elements.
template <class T> struct Coefficients { Pack<T> center, scale, shift, slope, level; };

template <class T, bool gradient>
INLINE Coefficients<T> coefficients_of(const Table& table, std::ptrdiff_t channel) {
    using E = Element<T>;
    Coefficients<T> c;
    c.center = fill((E)table.center[channel]);
    c.scale = fill((E)table.scale[channel]);
    c.shift = fill((E)table.shift[channel]);
    if constexpr (gradient) {
        c.slope = fill((E)table.slope[channel]);
        c.level = fill((E)table.level[channel]);
    }
    return c;
}
// Read them from arrays of lanes that are `row` values apart.
template <class T, bool gradient>
INLINE Coefficients<T> coefficients_at(const Element<T>* lanes, std::ptrdiff_t row) {
    Coefficients<T> c;
    c.center = load(lanes, LANES);
    c.scale = load(lanes + row, LANES);
    c.shift = load(lanes + 2 * row, LANES);
    if constexpr (gradient) {
        c.slope = load(lanes + 3 * row, LANES);
        c.level = load(lanes + 4 * row, LANES);
    }
    return c;
}
// The first n lanes of a, the others of b.
template <class T, bool gradient>
INLINE Coefficients<T> combine(const Coefficients<T>& a, const Coefficients<T>& b, int n) {
    Coefficients<T> c;
    c.center = join(a.center, b.center, n);
    c.scale = join(a.scale, b.scale, n);
    c.shift = join(a.shift, b.shift, n);
    if constexpr (gradient) {
        c.slope = join(a.slope, b.slope, n);
        c.level = join(a.level, b.level, n);
    }
    return c;
}

template <class T> INLINE void write_pack(T* out, Pack<T> a, int lanes, bool past_cache) {
    if (past_cache && lanes == LANES) store_past_cache(out, a); else store(out, a, lanes);
}

// `valid` has a bit for each lane. The others become 0.
template <class T, bool fused>
INLINE Pack<T> normalized(const Job& job, std::ptrdiff_t i, int lanes, const Coefficients<T>& c,
                          unsigned valid) {
    Pack<T> a = (load((const T*)job.x + i, lanes) - c.center) * c.scale + c.shift;
    if constexpr (fused) {
        if (job.residual) a = a + load((const T*)job.residual + i, lanes);
        if (job.activated) {
            unsigned signs = above_zero(a);
            if (job.signs) put_bits(job.signs, job.first_bit + i, signs, lanes);
            a = leaky_relu(signs, a, job.slope);
        }
        if (job.valid) a = select(valid, a, fill((Element<T>)0));
    }
    return a;
}

template <class T> INLINE Pack<T> narrowed(Wide a) {
    if constexpr (sizeof(Element<T>) == 8) return a; else return narrow(a);
}

template <class T, bool fused>
INLINE Pack<T> gradient_of_x(const Job& job, std::ptrdiff_t i, int lanes,
                             const Coefficients<T>& c, unsigned valid) {
    Pack<T> g = load((const T*)job.dy + i, lanes), above;  // above the level
    bool sloped = fused && job.signs && job.slope != 0;
    if constexpr (fused) {
        if (sloped && sizeof(Element<T>) == 4) {
            // slope * dy is no float. Its digits count where it is almost the level.
            unsigned signs = get_bits(job.signs, job.first_bit + i);
            Wide exact = leaky_relu(signs, load_wide((const T*)job.dy + i, lanes), job.slope);
            g = narrowed<T>(exact);
            above = narrowed<T>(exact - widen(c.level));
        } else if (job.signs) {
            g = leaky_relu(get_bits(job.signs, job.first_bit + i), g, job.slope);
        }
        if (job.valid) g = select(valid, g, fill((Element<T>)0));
        if (job.dresidual) write_pack((T*)job.dresidual + i, g, lanes, job.residual_past_cache);
    }
    Pack<T> dx;
    if (fused && job.operation == BACKWARD_FIXED) {
        dx = g * c.scale;
    } else {
        Pack<T> x = load((const T*)job.x + i, lanes);
        // shift is the residue
        if (!sloped || sizeof(Element<T>) == 8) above = g - c.level;
        dx = (above - ((x - c.center) * c.slope + c.shift)) * c.scale;
    }
    if (fused && job.valid) dx = select(valid, dx, fill((Element<T>)0));
    return dx;
}

template <class T, bool gradient, bool fused>
INLINE void write_result(const Job& job, std::ptrdiff_t i, int lanes, bool past_cache,
                         const Coefficients<T>& c, unsigned valid = ~0u) {
    Pack<T> a;
    if constexpr (gradient) a = gradient_of_x<T, fused>(job, i, lanes, c, valid);
    else a = normalized<T, fused>(job, i, lanes, c, valid);
    write_pack((T*)job.out + i, a, lanes, past_cache);
}

// Whether anything but a plain normalisation or gradient is written.
INLINE bool is_fused(const Job& job) {
    return job.activated || job.residual || job.dresidual || job.valid ||
           job.operation == BACKWARD_FIXED;
}

// Write the positions from begin to end, whose runs may be of several channels, from the end; a
// pack may lie across two channels. Packs begin on lines of out.
template <class T, bool gradient, bool fused>
void write_runs(const Job& given, const Table& coefficients, std::ptrdiff_t begin,
                std::ptrdiff_t end) {
    const Job job = given;  // a copy: the compiler then knows that no store to out changes it
    const Table table = coefficients;
    std::ptrdiff_t start = (end - 1) / job.inner * job.inner;  // of the last run
    std::ptrdiff_t channel = start / job.inner % job.channels;
    // The position of value p of this run is `position` + p.
    std::ptrdiff_t position = job.first_position
                              + start / job.inner / job.channels * job.inner - start;
    auto valid_from = [&](std::ptrdiff_t i) {
        return fused && job.valid ? get_bits(job.valid, i) : ~0u;
    };
    std::ptrdiff_t bottom = begin + lanes_to_line((const T*)job.out + begin), p = end;
    if (bottom > end) bottom = end;
    int lanes = (int)((end - bottom) % LANES);
    Coefficients<T> c = coefficients_of<T, gradient>(table, channel), below = c;
    while (p > begin) {
        if (lanes == 0 && p > bottom) {  // whole packs of one channel
            std::ptrdiff_t packs = (p - (start > bottom ? start : bottom)) / LANES;
            for (; packs > 0; packs--) {
                p -= LANES;
                write_result<T, gradient, fused>(job, p, LANES, job.past_cache, c,
                                                 valid_from(position + p));
            }
            if (p == begin) return;
        }
        if (p == bottom) lanes = (int)(bottom - begin);
        else if (lanes == 0) lanes = LANES;
        p -= lanes;
        unsigned valid = valid_from(position + (p < start ? start : p));
        if (p < start) {  // the lower part of the pack is of the channel before
            int lower = (int)(start - p);
            if (channel) position += job.inner;  // else of the row before, whose positions follow
            channel = channel ? channel - 1 : job.channels - 1;
            below = coefficients_of<T, gradient>(table, channel);
            c = combine<T, gradient>(below, c, lower);
            valid = valid << lower | (valid_from(position + p) & ((1u << lower) - 1));
            start -= job.inner;
        }
        if (lanes == LANES)
            write_result<T, gradient, fused>(job, p, LANES, job.past_cache, c, valid);
        else write_result<T, gradient, fused>(job, p, lanes, false, c, valid);
        c = below;
        lanes = 0;
    }
}

// Write `length` positions from `begin` on, from the end. Position `begin` has the coefficients of
// `lane`. There are `width` lanes; then they begin again, for a pack more (see spread).
template <class T, bool gradient, bool fused>
void write_rows(const Job& given, const void* coefficients, std::ptrdiff_t row,
                std::ptrdiff_t width, std::ptrdiff_t begin, std::ptrdiff_t length,
                std::ptrdiff_t lane) {
    const Job job = given;
    const Element<T>* lanes = (const Element<T>*)coefficients;
    std::ptrdiff_t head = lanes_to_line((const T*)job.out + begin);
    if (head > length) head = length;
    int tail = (int)((length - head) % LANES);
    std::ptrdiff_t i = length - tail, at = (lane + i) % width;
    if (tail)
        write_result<T, gradient, fused>(job, begin + i, tail, false,
                                         coefficients_at<T, gradient>(lanes + at, row));
    for (std::ptrdiff_t packs = (i - head) / LANES; packs > 0; packs--) {
        i -= LANES;
        at -= LANES;
        while (at < 0) at += width;
        write_result<T, gradient, fused>(job, begin + i, LANES, job.past_cache,
                                         coefficients_at<T, gradient>(lanes + at, row));
    }
    if (head)
        write_result<T, gradient, fused>(job, begin, (int)head, false,
                                         coefficients_at<T, gradient>(lanes + lane % width, row));
}

// ---------------------------------------------------------------------------------- single values

template <class T> double value_at(const void* values, std::ptrdiff_t i) {
    return value_of(((const T*)values)[i]);
}
// Into an array with room for whole packs.
template <class T>
void widen_into(double* into, const void* values, std::ptrdiff_t i, std::ptrdiff_t count) {
    for (; count > 0; count -= LANES, i += LANES, into += LANES)
        store(into, load_wide((const T*)values + i, (int)(count < LANES ? count : LANES)), LANES);
}
// Coefficients as the precision of the elements has them.
INLINE double rounded(double value, bool wide) { return wide ? value : (double)(float)value; }
INLINE Wide rounded(Wide value, bool wide) {
    if (wide) return value;
    return widen(narrow(value));
}
// dy behind the activation.
template <class T> double gradient_at(const Job& job, std::ptrdiff_t i) {
    double g = value_at<T>(job.dy, i);
    if (!job.signs || get_bits(job.signs, job.first_bit + i) & 1) return g;
    return job.slope == 0 ? 0 : g * job.slope;
}
// Put each channel's value into its `inner` lanes, and repeat them all up to `length`.
template <class E>
void spread(const double* __restrict values, E* __restrict lanes, std::ptrdiff_t channels,
            std::ptrdiff_t inner, std::ptrdiff_t length) {
    std::ptrdiff_t width = channels * inner, i = 0;
    if (inner == 1)  // a loop that compilers vectorise
        for (std::ptrdiff_t c = 0; c < channels; c++) lanes[c] = (E)values[c];
    else
        for (std::ptrdiff_t c = 0; c < channels; c++)
            for (std::ptrdiff_t end = i + inner; i < end; i++) lanes[i] = (E)values[c];
    for (std::ptrdiff_t done = width; done < length; done += width)
        std::memcpy(lanes + done, lanes,
                    sizeof(E) * (std::size_t)(length - done < width ? length - done : width));
}
template <class T, bool gradient>
void spread_table(const Table& table, void* lanes, std::ptrdiff_t channels, std::ptrdiff_t inner,
                  std::ptrdiff_t length) {
    const double* rows[] = {table.center, table.scale, table.shift, table.slope, table.level};
    for (int i = 0; i < (gradient ? 5 : 3); i++)
        spread(rows[i], (Element<T>*)lanes + i * length, channels, inner, length);
}

// ------------------------------------------------------------------------------------- one type

struct Loops {
    bool wide;            // whether elements are computed in float64; in float32 otherwise
    bool exact_products;  // whether those of two values are exact in float64
    decltype(&fastbn::sum_runs<float>) sum_runs;
    decltype(&fastbn::sum_valid<float>) sum_valid;
    decltype(&fastbn::sum_columns<float>) sum_columns;
    decltype(&fastbn::write_runs<float, true, true>) write_runs;
    decltype(&fastbn::write_rows<float, true, true>) write_rows;
    decltype(&fastbn::spread_table<float, true>) spread_table;
    decltype(&fastbn::widen_into<float>) widen_into;
    decltype(&fastbn::value_at<float>) value_at;
    decltype(&fastbn::gradient_at<float>) gradient_at;
};

template <class T, bool gradient, bool fused> Loops loops_of() {
    return {sizeof(Element<T>) == 8, exact_products<T>, sum_runs<T>, sum_valid<T>,
            sum_columns<T>, write_runs<T, gradient, fused>, write_rows<T, gradient, fused>,
            spread_table<T, gradient>, widen_into<T>, value_at<T>, gradient_at<T>};
}
template <class T> Loops loops_of(const Job& job) {
    if (job.dy) return is_fused(job) ? loops_of<T, true, true>() : loops_of<T, true, false>();
    return is_fused(job) ? loops_of<T, false, true>() : loops_of<T, false, false>();
}

// The one place that goes from a type as a number to one as a template argument.
Loops loops_for(const Job& job) {
    switch (job.type) {
        case FLOAT64: return loops_of<double>(job);
        case FLOAT16: return loops_of<Half>(job);
        case BFLOAT16: return loops_of<Bfloat>(job);
        default: return loops_of<float>(job);
    }
}

}  // namespace
}  // namespace fastbn
