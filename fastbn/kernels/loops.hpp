// The inner loops that write, as templates: a segment of runs, rows. And `Loops`, which has all
// loops of one type.
//
// T is the type of x. What else a loop does is a template argument as well: `gradient` (dx, not y),
// `fused` (an activation, a residual, a mask, or constant statistics). sums.hpp has the loops that
// sum.

#pragma once

#include "sums.hpp"

namespace fastbn {

// The coefficients of each channel, in float64; normalisation needs the first three.
//     y = (x - center) * scale + shift
//     dx = ((g - level) - ((x - center) * slope + shift)) * scale
// In backward shift holds the residue: what center and level lose in rounding.
struct Table {
    double *center, *scale, *shift, *slope, *level;
};

namespace {

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
