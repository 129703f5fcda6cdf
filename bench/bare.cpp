// Bare loops over floats: what one thread of this machine pays at least. `python bench/bare.py`
// prints them; the ceiling of the benchmarks uses those that store past the cache.
//
// norm() and norm_back() do what batch norm has to do to a contiguous channel and nothing else:
// sum in float64, then read again and write. They know no shapes, merges or rounding errors, so
// fastbn cannot be faster than the best of them on the same machine.

#include <algorithm>
#include <cstddef>
#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

constexpr std::ptrdiff_t LANES = 16;

#if defined(__AVX512F__)
void store_past_cache(float* p, const float* v) { _mm512_stream_ps(p, _mm512_loadu_ps(v)); }
#elif defined(__AVX__)
void store_past_cache(float* p, const float* v) {
    for (int i = 0; i < LANES; i += 8) _mm256_stream_ps(p + i, _mm256_loadu_ps(v + i));
}
#elif defined(__SSE2__)
void store_past_cache(float* p, const float* v) {
    for (int i = 0; i < LANES; i += 4) _mm_stream_ps(p + i, _mm_loadu_ps(v + i));
}
#else
void store_past_cache(float* p, const float* v) { std::copy(v, v + LANES, p); }
#endif

void finish() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

// Write value(i) for each i: past the cache in whole lines, if asked.
template <class Value>
void write(float* out, std::ptrdiff_t n, bool past_cache, Value value) {
    std::ptrdiff_t i = 0;
    if (past_cache) {
        for (; i < n && (std::uintptr_t)(out + i) % (4 * LANES); i++) out[i] = value(i);
        for (; i + LANES <= n; i += LANES) {
            float line[LANES];
            for (std::ptrdiff_t j = 0; j < LANES; j++) line[j] = value(i + j);
            store_past_cache(out + i, line);
        }
    }
    for (; i < n; i++) out[i] = value(i);
}

struct Sums { double a[LANES] = {}, b[LANES] = {}; };

void sum(const float* x, const float* g, std::ptrdiff_t n, Sums& s) {
    for (std::ptrdiff_t i = 0; i + LANES <= n; i += LANES)
        for (std::ptrdiff_t j = 0; j < LANES; j++) {
            double value = g[i + j];
            s.a[j] += value;
            s.b[j] += value * x[i + j];
        }
}

float part(const Sums& s, double n) {  // some number that depends on all sums
    double a = 0, b = 0;
    for (std::ptrdiff_t j = 0; j < LANES; j++) a += s.a[j], b += s.b[j];
    return (float)(a / n + b / n);
}

}  // namespace

extern "C" {

void copy_past_cache(float* out, const float* x, std::ptrdiff_t n) {
    write(out, n, true, [=](std::ptrdiff_t i) { return x[i]; });
    finish();
}
void add_past_cache(float* out, const float* x, const float* dy, std::ptrdiff_t n) {
    write(out, n, true, [=](std::ptrdiff_t i) { return x[i] + dy[i]; });
    finish();
}
double sums(const float* x, const float* g, std::ptrdiff_t n) {
    Sums s;
    sum(x, g, n, s);
    return part(s, (double)n);
}
// Tile by tile of so many values: sum, then write.
void norm(float* out, const float* x, std::ptrdiff_t n, std::ptrdiff_t tile, bool past_cache) {
    for (std::ptrdiff_t t = 0; t < n; t += tile) {
        std::ptrdiff_t count = std::min(tile, n - t);
        Sums s;
        sum(x + t, x + t, count, s);
        float shift = part(s, (double)count);
        const float* from = x + t;
        write(out + t, count, past_cache,
              [=](std::ptrdiff_t i) { return (from[i] - shift) * 1.5f + shift; });
    }
    finish();
}
void norm_back(float* out, const float* x, const float* dy, std::ptrdiff_t n, std::ptrdiff_t tile,
               bool past_cache) {
    for (std::ptrdiff_t t = 0; t < n; t += tile) {
        std::ptrdiff_t count = std::min(tile, n - t);
        Sums s;
        sum(x + t, dy + t, count, s);
        float level = part(s, (double)count);
        const float *x_from = x + t, *dy_from = dy + t;
        write(out + t, count, past_cache, [=](std::ptrdiff_t i) {
            return ((dy_from[i] - level) - ((x_from[i] - level) * 0.5f + level)) * 1.5f;
        });
    }
    finish();
}
}
