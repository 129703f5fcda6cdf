// Vector primitives for the kernels, and nothing else.
//
// The kernels work on packs of 16 lanes, whatever the instruction set: Pack<float> holds 16
// floats, Pack<double> 16 doubles. A pack is a tree of native registers (Twice<Twice<F>> and so
// on), so it needs no array that the compiler might leave in memory, and every operation is one
// IEEE operation a lane: a program of packs gives the same bits in every instruction set. Only
// sum() mixes lanes, and it always folds the upper half onto the lower.
//
// To add an instruction set, write one more block of F (native floats) and D (native doubles).

#pragma once

#include <cmath>
#include <cstddef>

#if defined(__AVX512F__) || defined(__AVX2__) || defined(__SSE2__) || defined(_M_X64)
#include <immintrin.h>
#elif defined(__aarch64__) || defined(_M_ARM64)
#include <arm_neon.h>
#endif

namespace fastbn {
namespace {  // each variant keeps its own copy: the linker must never share one between two

#if defined(__AVX512F__)

struct F { static constexpr int lanes = 16; __m512 v; };
struct D { static constexpr int lanes = 8; __m512d v; };

inline __mmask16 first16(int n) { return (__mmask16)((1u << n) - 1); }
inline __mmask8 first8(int n) { return (__mmask8)((1u << n) - 1); }

inline F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline D operator+(D a, D b) { return {_mm512_add_pd(a.v, b.v)}; }
inline D operator-(D a, D b) { return {_mm512_sub_pd(a.v, b.v)}; }
inline D operator*(D a, D b) { return {_mm512_mul_pd(a.v, b.v)}; }
inline void set(F& a, float value) { a.v = _mm512_set1_ps(value); }
inline void set(D& a, double value) { a.v = _mm512_set1_pd(value); }

inline void get(F& a, const float* p) { a.v = _mm512_loadu_ps(p); }
inline void get(D& a, const double* p) { a.v = _mm512_loadu_pd(p); }
inline void get(D& a, const float* p) { a.v = _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
inline void get(F& a, const float* p, int n) { a.v = _mm512_maskz_loadu_ps(first16(n), p); }
inline void get(D& a, const double* p, int n) { a.v = _mm512_maskz_loadu_pd(first8(n), p); }
inline void get(D& a, const float* p, int n) {
    a.v = _mm512_cvtps_pd(_mm256_maskz_loadu_ps(first8(n), p));
}
inline void put(float* p, F a) { _mm512_storeu_ps(p, a.v); }
inline void put(double* p, D a) { _mm512_storeu_pd(p, a.v); }
inline void put(float* p, F a, int n) { _mm512_mask_storeu_ps(p, first16(n), a.v); }
inline void put(double* p, D a, int n) { _mm512_mask_storeu_pd(p, first8(n), a.v); }

inline D first(D a, int n) { return {_mm512_maskz_mov_pd(first8(n), a.v)}; }
inline double sum(D a) {
    __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(a.v), _mm512_extractf64x4_pd(a.v, 1));
    __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(two) + _mm_cvtsd_f64(_mm_unpackhi_pd(two, two));
}

#elif defined(__AVX2__)

struct F { static constexpr int lanes = 8; __m256 v; };
struct D { static constexpr int lanes = 4; __m256d v; };

// A window on these that starts n before the middle has n lanes set.
alignas(64) const int ONES_THEN_ZEROS[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
inline __m256i first8(int n) {
    return _mm256_loadu_si256((const __m256i*)(ONES_THEN_ZEROS + 8 - n));
}
inline __m128i first4(int n) {
    return _mm_loadu_si128((const __m128i*)(ONES_THEN_ZEROS + 8 - n));
}

inline F operator+(F a, F b) { return {_mm256_add_ps(a.v, b.v)}; }
inline F operator-(F a, F b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline F operator*(F a, F b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline D operator+(D a, D b) { return {_mm256_add_pd(a.v, b.v)}; }
inline D operator-(D a, D b) { return {_mm256_sub_pd(a.v, b.v)}; }
inline D operator*(D a, D b) { return {_mm256_mul_pd(a.v, b.v)}; }
inline void set(F& a, float value) { a.v = _mm256_set1_ps(value); }
inline void set(D& a, double value) { a.v = _mm256_set1_pd(value); }

inline void get(F& a, const float* p) { a.v = _mm256_loadu_ps(p); }
inline void get(D& a, const double* p) { a.v = _mm256_loadu_pd(p); }
inline void get(D& a, const float* p) { a.v = _mm256_cvtps_pd(_mm_loadu_ps(p)); }
inline void get(F& a, const float* p, int n) { a.v = _mm256_maskload_ps(p, first8(n)); }
inline void get(D& a, const double* p, int n) {
    a.v = _mm256_maskload_pd(p, _mm256_cvtepi32_epi64(first4(n)));
}
inline void get(D& a, const float* p, int n) {
    a.v = _mm256_cvtps_pd(_mm_maskload_ps(p, first4(n)));
}
inline void put(float* p, F a) { _mm256_storeu_ps(p, a.v); }
inline void put(double* p, D a) { _mm256_storeu_pd(p, a.v); }
inline void put(float* p, F a, int n) { _mm256_maskstore_ps(p, first8(n), a.v); }
inline void put(double* p, D a, int n) {
    _mm256_maskstore_pd(p, _mm256_cvtepi32_epi64(first4(n)), a.v);
}

inline D first(D a, int n) {
    return {_mm256_and_pd(a.v, _mm256_castsi256_pd(_mm256_cvtepi32_epi64(first4(n))))};
}
inline double sum(D a) {
    __m128d two = _mm_add_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
    return _mm_cvtsd_f64(two) + _mm_cvtsd_f64(_mm_unpackhi_pd(two, two));
}

#elif defined(__SSE2__) || defined(_M_X64)

struct F { static constexpr int lanes = 4; __m128 v; };
struct D { static constexpr int lanes = 2; __m128d v; };

inline F operator+(F a, F b) { return {_mm_add_ps(a.v, b.v)}; }
inline F operator-(F a, F b) { return {_mm_sub_ps(a.v, b.v)}; }
inline F operator*(F a, F b) { return {_mm_mul_ps(a.v, b.v)}; }
inline D operator+(D a, D b) { return {_mm_add_pd(a.v, b.v)}; }
inline D operator-(D a, D b) { return {_mm_sub_pd(a.v, b.v)}; }
inline D operator*(D a, D b) { return {_mm_mul_pd(a.v, b.v)}; }
inline void set(F& a, float value) { a.v = _mm_set1_ps(value); }
inline void set(D& a, double value) { a.v = _mm_set1_pd(value); }

inline __m128 two_floats(const float* p) {
    return _mm_loadl_pi(_mm_setzero_ps(), (const __m64*)p);
}
inline void get(F& a, const float* p) { a.v = _mm_loadu_ps(p); }
inline void get(D& a, const double* p) { a.v = _mm_loadu_pd(p); }
inline void get(D& a, const float* p) { a.v = _mm_cvtps_pd(two_floats(p)); }
inline void get(F& a, const float* p, int n) {
    a.v = n == 0 ? _mm_setzero_ps()
        : n == 1 ? _mm_load_ss(p)
        : n == 2 ? two_floats(p)
        : n == 3 ? _mm_movelh_ps(two_floats(p), _mm_load_ss(p + 2))
                 : _mm_loadu_ps(p);
}
inline void get(D& a, const double* p, int n) {
    a.v = n == 0 ? _mm_setzero_pd() : n == 1 ? _mm_load_sd(p) : _mm_loadu_pd(p);
}
inline void get(D& a, const float* p, int n) {
    a.v = n == 0 ? _mm_setzero_pd() : _mm_cvtps_pd(n == 1 ? _mm_load_ss(p) : two_floats(p));
}
inline void put(float* p, F a) { _mm_storeu_ps(p, a.v); }
inline void put(double* p, D a) { _mm_storeu_pd(p, a.v); }
inline void put(float* p, F a, int n) {
    if (n >= 4) { _mm_storeu_ps(p, a.v); return; }
    if (n >= 2) _mm_storel_pi((__m64*)p, a.v);
    if (n == 1) _mm_store_ss(p, a.v);
    if (n == 3) _mm_store_ss(p + 2, _mm_movehl_ps(a.v, a.v));
}
inline void put(double* p, D a, int n) {
    if (n >= 2) _mm_storeu_pd(p, a.v);
    else if (n == 1) _mm_store_sd(p, a.v);
}

inline D first(D a, int n) {
    return {n == 0 ? _mm_setzero_pd() : n == 1 ? _mm_move_sd(_mm_setzero_pd(), a.v) : a.v};
}
inline double sum(D a) { return _mm_cvtsd_f64(a.v) + _mm_cvtsd_f64(_mm_unpackhi_pd(a.v, a.v)); }

#else

#if defined(__aarch64__) || defined(_M_ARM64)

struct F { static constexpr int lanes = 4; float32x4_t v; };
struct D { static constexpr int lanes = 2; float64x2_t v; };

inline F operator+(F a, F b) { return {vaddq_f32(a.v, b.v)}; }
inline F operator-(F a, F b) { return {vsubq_f32(a.v, b.v)}; }
inline F operator*(F a, F b) { return {vmulq_f32(a.v, b.v)}; }
inline D operator+(D a, D b) { return {vaddq_f64(a.v, b.v)}; }
inline D operator-(D a, D b) { return {vsubq_f64(a.v, b.v)}; }
inline D operator*(D a, D b) { return {vmulq_f64(a.v, b.v)}; }
inline void set(F& a, float value) { a.v = vdupq_n_f32(value); }
inline void set(D& a, double value) { a.v = vdupq_n_f64(value); }
inline void get(F& a, const float* p) { a.v = vld1q_f32(p); }
inline void get(D& a, const double* p) { a.v = vld1q_f64(p); }
inline void get(D& a, const float* p) { a.v = vcvt_f64_f32(vld1_f32(p)); }
inline void put(float* p, F a) { vst1q_f32(p, a.v); }
inline void put(double* p, D a) { vst1q_f64(p, a.v); }
inline double sum(D a) { return vgetq_lane_f64(a.v, 0) + vgetq_lane_f64(a.v, 1); }

#else  // any other machine: one lane at a time, for the compiler to vectorise as it can

struct F { static constexpr int lanes = 1; float v; };
struct D { static constexpr int lanes = 1; double v; };

inline F operator+(F a, F b) { return {a.v + b.v}; }
inline F operator-(F a, F b) { return {a.v - b.v}; }
inline F operator*(F a, F b) { return {a.v * b.v}; }
inline D operator+(D a, D b) { return {a.v + b.v}; }
inline D operator-(D a, D b) { return {a.v - b.v}; }
inline D operator*(D a, D b) { return {a.v * b.v}; }
inline void set(F& a, float value) { a.v = value; }
inline void set(D& a, double value) { a.v = value; }
inline void get(F& a, const float* p) { a.v = *p; }
inline void get(D& a, const double* p) { a.v = *p; }
inline void get(D& a, const float* p) { a.v = *p; }
inline void put(float* p, F a) { *p = a.v; }
inline void put(double* p, D a) { *p = a.v; }
inline double sum(D a) { return a.v; }

#endif

// Partial registers by way of memory, where the machine has no masks.
template <class V, class T> inline void get(V& a, const T* p, int n) {
    T buffer[V::lanes] = {};
    for (int i = 0; i < n; i++) buffer[i] = p[i];
    get(a, (const T*)buffer);
}
template <class V, class T> inline void put(T* p, V a, int n) {
    T buffer[V::lanes];
    put(buffer, a);
    for (int i = 0; i < n; i++) p[i] = buffer[i];
}
inline D first(D a, int n) {
    double buffer[D::lanes];
    put(buffer, a, D::lanes);
    get(a, (const double*)buffer, n);
    return a;
}

#endif

// A pack: native registers, doubled until 16 lanes are together.
template <class H> struct Twice { static constexpr int lanes = 2 * H::lanes; H lo, hi; };

template <class V, bool enough = (V::lanes >= 16)> struct Doubled {
    using type = typename Doubled<Twice<V>>::type;
};
template <class V> struct Doubled<V, true> { using type = V; };

template <class T> struct PackOf;
template <> struct PackOf<float> { using type = Doubled<F>::type; };
template <> struct PackOf<double> { using type = Doubled<D>::type; };
template <class T> using Pack = typename PackOf<T>::type;

inline int lower(int n, int half) { return n < half ? n : half; }
inline int upper(int n, int half) { return n < half ? 0 : n - half; }

template <class H> inline Twice<H> operator+(Twice<H> a, Twice<H> b) {
    return {a.lo + b.lo, a.hi + b.hi};
}
template <class H> inline Twice<H> operator-(Twice<H> a, Twice<H> b) {
    return {a.lo - b.lo, a.hi - b.hi};
}
template <class H> inline Twice<H> operator*(Twice<H> a, Twice<H> b) {
    return {a.lo * b.lo, a.hi * b.hi};
}
template <class H, class T> inline void set(Twice<H>& a, T value) {
    set(a.lo, value);
    set(a.hi, value);
}
template <class H, class T> inline void get(Twice<H>& a, const T* p) {
    get(a.lo, p);
    get(a.hi, p + H::lanes);
}
template <class H, class T> inline void get(Twice<H>& a, const T* p, int n) {
    get(a.lo, p, lower(n, H::lanes));
    get(a.hi, p + H::lanes, upper(n, H::lanes));
}
template <class H, class T> inline void put(T* p, Twice<H> a) {
    put(p, a.lo);
    put(p + H::lanes, a.hi);
}
template <class H, class T> inline void put(T* p, Twice<H> a, int n) {
    put(p, a.lo, lower(n, H::lanes));
    put(p + H::lanes, a.hi, upper(n, H::lanes));
}
template <class H> inline Twice<H> first(Twice<H> a, int n) {
    return {first(a.lo, lower(n, H::lanes)), first(a.hi, upper(n, H::lanes))};
}
template <class H> inline double sum(Twice<H> a) { return sum(a.lo + a.hi); }

// What the kernels call. `lanes` counts the lanes that exist: the others read as zero and are
// never written. load_wide reads either type as doubles.
template <class T> inline Pack<T> fill(T value) { Pack<T> a; set(a, value); return a; }
template <class T> inline Pack<T> load(const T* p, int lanes) {
    Pack<T> a;
    if (lanes == 16) get(a, p); else get(a, p, lanes);
    return a;
}
template <class T> inline Pack<double> load_wide(const T* p, int lanes) {
    Pack<double> a;
    if (lanes == 16) get(a, p); else get(a, p, lanes);
    return a;
}
template <class T> inline void store(T* p, Pack<T> a, int lanes) {
    if (lanes == 16) put(p, a); else put(p, a, lanes);
}
inline Pack<double> keep_first(Pack<double> a, int lanes) { return first(a, lanes); }
inline double sum_lanes(Pack<double> a) { return sum(a); }

}  // namespace
}  // namespace fastbn
