// Native registers, one block for each instruction set: F of floats, D of doubles.
//
// To add an instruction set, write one more block. Operations that a block leaves out use the
// templates at the end.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(_MSC_VER)
#include <intrin.h>
#pragma fp_contract(off)  // before 2022 /fp:precise contracts a * b + c, which changes bits
#endif
#if defined(__AVX512F__) || defined(__AVX2__) || defined(__SSE2__) || defined(_M_X64)
#include <immintrin.h>
#elif defined(__aarch64__) || defined(_M_ARM64)
#include <arm_neon.h>
#endif

// Every function on packs must be inlined: a call would move packs to memory.
#if defined(_MSC_VER)
#define INLINE __forceinline
#else
#define INLINE inline __attribute__((always_inline))
#endif

namespace fastbn {

// The 16-bit types, which are only stored: they are computed in float.
struct Half { std::uint16_t bits; };    // IEEE binary16
struct Bfloat { std::uint16_t bits; };  // the upper half of a float

namespace {  // each variant keeps its own copy: the linker must never share one between two

INLINE std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
INLINE float float_of(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
INLINE float widened(Half h) {
    std::uint32_t sign = (h.bits & 0x8000u) << 16, rest = h.bits & 0x7fffu;
    // Shifted into a float, the value is too small by a factor of 2^112, whether normal or not. Inf
    // and NaN are special.
    std::uint32_t bits = rest < 0x7c00u ? bits_of(float_of(rest << 13) * 0x1p112f)
                                        : rest << 13 | 0x7f800000u;
    return float_of(bits | sign);
}
INLINE float widened(Bfloat b) { return float_of((std::uint32_t)b.bits << 16); }
// To the nearest, ties to even.
INLINE void narrow(Half& h, float value) {
    std::uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) rest = 0x7e00u | (rest >> 13 & 0x3ffu);
    else if (rest >= 0x477ff000u) rest = 0x7c00u;  // 65520 and above
    else if (rest < 0x38800000u)  // subnormal: next to 0.5 floats are 2^-24 apart, as these are
        rest = bits_of(float_of(rest) + 0.5f) - 0x3f000000u;
    else rest = (rest + 0xfffu + (rest >> 13 & 1u) - 0x38000000u) >> 13;
    h.bits = (std::uint16_t)(sign | rest);
}
INLINE void narrow(Bfloat& b, float value) {
    std::uint32_t bits = bits_of(value);
    bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    b.bits = (std::uint16_t)(nan ? bits >> 16 | 0x40u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// A pack: native registers, doubled until 16 lanes are together.
template <class H> struct Twice { static constexpr int lanes = 2 * H::lanes; H lo, hi; };

// x86 intrinsics whose names differ only in the prefix.
#define X86_REGISTERS(mm)                                                        \
    INLINE F operator+(F a, F b) { return {mm##_add_ps(a.v, b.v)}; }             \
    INLINE F operator-(F a, F b) { return {mm##_sub_ps(a.v, b.v)}; }             \
    INLINE F operator*(F a, F b) { return {mm##_mul_ps(a.v, b.v)}; }             \
    INLINE D operator+(D a, D b) { return {mm##_add_pd(a.v, b.v)}; }             \
    INLINE D operator-(D a, D b) { return {mm##_sub_pd(a.v, b.v)}; }             \
    INLINE D operator*(D a, D b) { return {mm##_mul_pd(a.v, b.v)}; }             \
    INLINE D operator/(D a, D b) { return {mm##_div_pd(a.v, b.v)}; }             \
    INLINE D root(D a) { return {mm##_sqrt_pd(a.v)}; }                           \
    INLINE void set(F& a, float value) { a.v = mm##_set1_ps(value); }            \
    INLINE void set(D& a, double value) { a.v = mm##_set1_pd(value); }           \
    INLINE void get(F& a, const float* p) { a.v = mm##_loadu_ps(p); }            \
    INLINE void get(D& a, const double* p) { a.v = mm##_loadu_pd(p); }           \
    INLINE void put(float* p, F a) { mm##_storeu_ps(p, a.v); }                   \
    INLINE void put(double* p, D a) { mm##_storeu_pd(p, a.v); }                  \
    INLINE void put_past_cache(float* p, F a) { mm##_stream_ps(p, a.v); }        \
    INLINE void put_past_cache(double* p, D a) { mm##_stream_pd(p, a.v); }

#if defined(__AVX512F__)

struct F { static constexpr int lanes = 16; __m512 v; };
struct D { static constexpr int lanes = 8; __m512d v; };
X86_REGISTERS(_mm512)

INLINE __mmask16 first16(int n) { return (__mmask16)((1u << n) - 1); }
INLINE __mmask8 first8(int n) { return (__mmask8)((1u << n) - 1); }

INLINE D multiply_add(D a, D b, D c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
// Bit i belongs to lane i. NaN counts as above 0.
INLINE unsigned above_zero(F a) {
    return _mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_NLE_UQ);
}
INLINE unsigned above_zero(D a) {
    return _mm512_cmp_pd_mask(a.v, _mm512_setzero_pd(), _CMP_NLE_UQ);
}
INLINE F select(unsigned bits, F a, F b) {
    return {_mm512_mask_blend_ps((__mmask16)bits, b.v, a.v)};
}
INLINE D select(unsigned bits, D a, D b) {
    return {_mm512_mask_blend_pd((__mmask8)bits, b.v, a.v)};
}
INLINE Twice<D> widen(F a) {
    return {{_mm512_cvtps_pd(_mm512_castps512_ps256(a.v))},
            {_mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1))}};
}
INLINE F narrow(Twice<D> a) {
    return {_mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(a.lo.v)),
                               _mm512_cvtpd_ps(a.hi.v), 1)};
}

INLINE void get(D& a, const float* p) { a.v = _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
INLINE void get(F& a, const float* p, int n) { a.v = _mm512_maskz_loadu_ps(first16(n), p); }
INLINE void get(D& a, const double* p, int n) { a.v = _mm512_maskz_loadu_pd(first8(n), p); }
INLINE void get(D& a, const float* p, int n) {
    a.v = _mm512_cvtps_pd(_mm256_maskz_loadu_ps(first8(n), p));
}
INLINE void get(F& a, const Half* p) {
    a.v = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
INLINE void get(D& a, const Half* p) {
    a.v = _mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)));
}
// Each 16-bit value into the upper half of a 32-bit one.
alignas(64) const std::int16_t UPPER[32] = {0, 0, 0, 1, 0, 2,  0, 3,  0, 4,  0, 5,  0, 6,  0, 7,
                                            0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
INLINE void get(F& a, const Bfloat* p) {
    __m512i b = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)p));
    __m512i wide = _mm512_maskz_permutexvar_epi16(0xAAAAAAAAu, _mm512_load_si512(UPPER), b);
    a.v = _mm512_castsi512_ps(wide);
}
INLINE void get(D& a, const Bfloat* p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    a.v = _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16)));
}
INLINE void put(Half* p, F a) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
alignas(64) const std::int16_t FROM_UPPER[32] = {1,  3,  5,  7,  9,  11, 13, 15,
                                                 17, 19, 21, 23, 25, 27, 29, 31};
INLINE __m256i bfloats(F a) {
    __m512i bits = _mm512_castps_si512(a.v), one = _mm512_set1_epi32(1);
    __m512i nearest = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    nearest = _mm512_mask_add_epi32(nearest, odd, nearest, one);
    __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    nearest = _mm512_mask_or_epi32(nearest, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_castsi512_si256(
        _mm512_permutexvar_epi16(_mm512_load_si512(FROM_UPPER), nearest));
}
INLINE void put(Bfloat* p, F a) { _mm256_storeu_si256((__m256i*)p, bfloats(a)); }
INLINE void put_past_cache(Half* p, F a) {
    _mm256_stream_si256((__m256i*)p, _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
INLINE void put_past_cache(Bfloat* p, F a) { _mm256_stream_si256((__m256i*)p, bfloats(a)); }
INLINE void put(float* p, F a, int n) { _mm512_mask_storeu_ps(p, first16(n), a.v); }
INLINE void put(double* p, D a, int n) { _mm512_mask_storeu_pd(p, first8(n), a.v); }

INLINE double sum(D a) {
    __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(a.v), _mm512_extractf64x4_pd(a.v, 1));
    __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(two) + _mm_cvtsd_f64(_mm_unpackhi_pd(two, two));
}

#elif defined(__AVX2__)

struct F { static constexpr int lanes = 8; __m256 v; };
struct D { static constexpr int lanes = 4; __m256d v; };
X86_REGISTERS(_mm256)

// A window on these that starts n before the middle has n lanes set.
alignas(64) const int ONES_THEN_ZEROS[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
INLINE __m256i first8(int n) {
    return _mm256_loadu_si256((const __m256i*)(ONES_THEN_ZEROS + 8 - n));
}
INLINE __m128i first4(int n) {
    return _mm_loadu_si128((const __m128i*)(ONES_THEN_ZEROS + 8 - n));
}

INLINE D multiply_add(D a, D b, D c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
INLINE unsigned above_zero(F a) {
    return (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(a.v, _mm256_setzero_ps(), _CMP_NLE_UQ));
}
INLINE unsigned above_zero(D a) {
    return (unsigned)_mm256_movemask_pd(_mm256_cmp_pd(a.v, _mm256_setzero_pd(), _CMP_NLE_UQ));
}
INLINE F select(unsigned bits, F a, F b) {
    __m256i lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    __m256i chosen = _mm256_and_si256(_mm256_set1_epi32((int)bits), lanes);
    return {_mm256_blendv_ps(b.v, a.v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(chosen, lanes)))};
}
INLINE D select(unsigned bits, D a, D b) {
    __m256i lanes = _mm256_setr_epi64x(1, 2, 4, 8);
    __m256i chosen = _mm256_and_si256(_mm256_set1_epi64x(bits), lanes);
    return {_mm256_blendv_pd(b.v, a.v, _mm256_castsi256_pd(_mm256_cmpeq_epi64(chosen, lanes)))};
}
INLINE Twice<D> widen(F a) {
    return {{_mm256_cvtps_pd(_mm256_castps256_ps128(a.v))},
            {_mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1))}};
}
INLINE F narrow(Twice<D> a) {
    return {_mm256_insertf128_ps(_mm256_castps128_ps256(_mm256_cvtpd_ps(a.lo.v)),
                                 _mm256_cvtpd_ps(a.hi.v), 1)};
}

INLINE void get(D& a, const float* p) { a.v = _mm256_cvtps_pd(_mm_loadu_ps(p)); }
INLINE void get(F& a, const float* p, int n) { a.v = _mm256_maskload_ps(p, first8(n)); }
INLINE void get(D& a, const double* p, int n) {
    a.v = _mm256_maskload_pd(p, _mm256_cvtepi32_epi64(first4(n)));
}
INLINE void get(D& a, const float* p, int n) {
    a.v = _mm256_cvtps_pd(_mm_maskload_ps(p, first4(n)));
}
INLINE void get(F& a, const Half* p) {
    a.v = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
INLINE void get(D& a, const Half* p) {
    a.v = _mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)p)));
}
INLINE void get(F& a, const Bfloat* p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    a.v = _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
INLINE void get(D& a, const Bfloat* p) {
    __m128i wide = _mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i*)p));
    a.v = _mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(wide, 16)));
}
INLINE __m128i halves(F a) { return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT); }
INLINE __m128i bfloats(F a) {
    __m256i bits = _mm256_castps_si256(a.v), upper = _mm256_srli_epi32(bits, 16);
    __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
    __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    __m256i nearest = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
    __m256i nan = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
    __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
    __m256i wide = _mm256_blendv_epi8(nearest, nan, is_nan);
    __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(wide, wide), 0x08);
    return _mm256_castsi256_si128(packed);
}
INLINE void put(Half* p, F a) { _mm_storeu_si128((__m128i*)p, halves(a)); }
INLINE void put(Bfloat* p, F a) { _mm_storeu_si128((__m128i*)p, bfloats(a)); }
INLINE void put_past_cache(Half* p, F a) { _mm_stream_si128((__m128i*)p, halves(a)); }
INLINE void put_past_cache(Bfloat* p, F a) { _mm_stream_si128((__m128i*)p, bfloats(a)); }
INLINE void put(float* p, F a, int n) { _mm256_maskstore_ps(p, first8(n), a.v); }
INLINE void put(double* p, D a, int n) {
    _mm256_maskstore_pd(p, _mm256_cvtepi32_epi64(first4(n)), a.v);
}

INLINE double sum(D a) {
    __m128d two = _mm_add_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
    return _mm_cvtsd_f64(two) + _mm_cvtsd_f64(_mm_unpackhi_pd(two, two));
}

#elif defined(__SSE2__) || defined(_M_X64)

struct F { static constexpr int lanes = 4; __m128 v; };
struct D { static constexpr int lanes = 2; __m128d v; };
X86_REGISTERS(_mm)

INLINE D multiply_add(D a, D b, D c) { return {_mm_add_pd(_mm_mul_pd(a.v, b.v), c.v)}; }
INLINE unsigned above_zero(F a) {
    return (unsigned)_mm_movemask_ps(_mm_cmpnle_ps(a.v, _mm_setzero_ps()));
}
INLINE unsigned above_zero(D a) {
    return (unsigned)_mm_movemask_pd(_mm_cmpnle_pd(a.v, _mm_setzero_pd()));
}
INLINE __m128i chosen(unsigned bits, __m128i lanes) {
    return _mm_cmpeq_epi32(_mm_and_si128(_mm_set1_epi32((int)bits), lanes), lanes);
}
INLINE F select(unsigned bits, F a, F b) {
    __m128 mask = _mm_castsi128_ps(chosen(bits, _mm_setr_epi32(1, 2, 4, 8)));
    return {_mm_or_ps(_mm_and_ps(mask, a.v), _mm_andnot_ps(mask, b.v))};
}
INLINE D select(unsigned bits, D a, D b) {
    __m128d mask = _mm_castsi128_pd(chosen(bits, _mm_setr_epi32(1, 1, 2, 2)));
    return {_mm_or_pd(_mm_and_pd(mask, a.v), _mm_andnot_pd(mask, b.v))};
}
INLINE Twice<D> widen(F a) {
    return {{_mm_cvtps_pd(a.v)}, {_mm_cvtps_pd(_mm_movehl_ps(a.v, a.v))}};
}
INLINE F narrow(Twice<D> a) {
    return {_mm_movelh_ps(_mm_cvtpd_ps(a.lo.v), _mm_cvtpd_ps(a.hi.v))};
}

INLINE void get(D& a, const float* p) {
    a.v = _mm_cvtps_pd(_mm_loadl_pi(_mm_setzero_ps(), (const __m64*)p));
}
INLINE double sum(D a) { return _mm_cvtsd_f64(a.v) + _mm_cvtsd_f64(_mm_unpackhi_pd(a.v, a.v)); }

#else

#if defined(__aarch64__) || defined(_M_ARM64)

struct F { static constexpr int lanes = 4; float32x4_t v; };
struct D { static constexpr int lanes = 2; float64x2_t v; };

INLINE F operator+(F a, F b) { return {vaddq_f32(a.v, b.v)}; }
INLINE F operator-(F a, F b) { return {vsubq_f32(a.v, b.v)}; }
INLINE F operator*(F a, F b) { return {vmulq_f32(a.v, b.v)}; }
INLINE D operator+(D a, D b) { return {vaddq_f64(a.v, b.v)}; }
INLINE D operator-(D a, D b) { return {vsubq_f64(a.v, b.v)}; }
INLINE D operator*(D a, D b) { return {vmulq_f64(a.v, b.v)}; }
INLINE D operator/(D a, D b) { return {vdivq_f64(a.v, b.v)}; }
INLINE D root(D a) { return {vsqrtq_f64(a.v)}; }
INLINE D multiply_add(D a, D b, D c) { return {vfmaq_f64(c.v, a.v, b.v)}; }
INLINE Twice<D> widen(F a) {
    return {{vcvt_f64_f32(vget_low_f32(a.v))}, {vcvt_high_f64_f32(a.v)}};
}
INLINE F narrow(Twice<D> a) {
    return {vcvt_high_f32_f64(vcvt_f32_f64(a.lo.v), a.hi.v)};
}
INLINE void set(F& a, float value) { a.v = vdupq_n_f32(value); }
INLINE void set(D& a, double value) { a.v = vdupq_n_f64(value); }
INLINE void get(F& a, const float* p) { a.v = vld1q_f32(p); }
INLINE void get(D& a, const double* p) { a.v = vld1q_f64(p); }
INLINE void get(D& a, const float* p) { a.v = vcvt_f64_f32(vld1_f32(p)); }
INLINE void put(float* p, F a) { vst1q_f32(p, a.v); }
INLINE void put(double* p, D a) { vst1q_f64(p, a.v); }
INLINE double sum(D a) { return vgetq_lane_f64(a.v, 0) + vgetq_lane_f64(a.v, 1); }

#else  // any other machine: one lane at a time, for the compiler to vectorise as it can

struct F { static constexpr int lanes = 1; float v; };
struct D { static constexpr int lanes = 1; double v; };

INLINE F operator+(F a, F b) { return {a.v + b.v}; }
INLINE F operator-(F a, F b) { return {a.v - b.v}; }
INLINE F operator*(F a, F b) { return {a.v * b.v}; }
INLINE D operator+(D a, D b) { return {a.v + b.v}; }
INLINE D operator-(D a, D b) { return {a.v - b.v}; }
INLINE D operator*(D a, D b) { return {a.v * b.v}; }
INLINE D operator/(D a, D b) { return {a.v / b.v}; }
INLINE D root(D a) { return {std::sqrt(a.v)}; }
INLINE D multiply_add(D a, D b, D c) { return {a.v * b.v + c.v}; }
INLINE D widen(F a) { return {a.v}; }
INLINE F narrow(D a) { return {(float)a.v}; }
INLINE void set(F& a, float value) { a.v = value; }
INLINE void set(D& a, double value) { a.v = value; }
INLINE void get(F& a, const float* p) { a.v = *p; }
INLINE void get(D& a, const double* p) { a.v = *p; }
INLINE void get(D& a, const float* p) { a.v = *p; }
INLINE void put(float* p, F a) { *p = a.v; }
INLINE void put(double* p, D a) { *p = a.v; }
INLINE double sum(D a) { return a.v; }

#endif

// Bits by way of memory, where the machine has no masks.
template <class V, class T> INLINE unsigned above_zero_each(V a, T*) {
    T buffer[V::lanes];
    unsigned bits = 0;
    put(buffer, a);
    for (int i = 0; i < V::lanes; i++) bits |= (unsigned)!(buffer[i] <= 0) << i;
    return bits;
}
INLINE unsigned above_zero(F a) { return above_zero_each(a, (float*)0); }
INLINE unsigned above_zero(D a) { return above_zero_each(a, (double*)0); }
template <class V, class T> INLINE V select_each(unsigned bits, V a, V b, T*) {
    T yes[V::lanes], both[V::lanes];
    put(yes, a);
    put(both, b);
    for (int i = 0; i < V::lanes; i++) if (bits >> i & 1u) both[i] = yes[i];
    get(a, (const T*)both);
    return a;
}
INLINE F select(unsigned bits, F a, F b) { return select_each(bits, a, b, (float*)0); }
INLINE D select(unsigned bits, D a, D b) { return select_each(bits, a, b, (double*)0); }

#endif

#if !defined(__AVX2__) && !defined(__AVX512F__)

// Partial registers by way of memory, where the machine has no masks.
template <class V, class T> INLINE void get(V& a, const T* p, int n) {
    if (n == V::lanes) { get(a, p); return; }
    T buffer[V::lanes] = {};
    for (int i = 0; i < n; i++) buffer[i] = p[i];
    get(a, (const T*)buffer);
}
template <class V, class T> INLINE void put(T* p, V a, int n) {
    if (n == V::lanes) { put(p, a); return; }
    T buffer[V::lanes];
    put(buffer, a);
    for (int i = 0; i < n; i++) p[i] = buffer[i];
}

#endif

// 16-bit types one by one: parts of a register, and all of it where the machine has no conversion.
template <class S> using Only16 = std::enable_if_t<sizeof(S) == 2>;
template <class V, class S> INLINE void get_each(V& a, const S* p, int n) {
    float buffer[V::lanes] = {};
    for (int i = 0; i < n; i++) buffer[i] = widened(p[i]);
    get(a, (const float*)buffer);
}
template <class S> INLINE Only16<S> get(F& a, const S* p, int n) { get_each(a, p, n); }
template <class S> INLINE Only16<S> get(D& a, const S* p, int n) { get_each(a, p, n); }
template <class S> INLINE Only16<S> get(F& a, const S* p) { get_each(a, p, F::lanes); }
template <class S> INLINE Only16<S> get(D& a, const S* p) { get_each(a, p, D::lanes); }
template <class S> INLINE Only16<S> put(S* p, F a, int n) {
    float buffer[F::lanes];
    put(buffer, a);
    for (int i = 0; i < n; i++) narrow(p[i], buffer[i]);
}
template <class S> INLINE Only16<S> put(S* p, F a) { put(p, a, F::lanes); }

// Where the machine has no stores that pass the cache by.
template <class T> INLINE void put_past_cache(T* p, F a) { put(p, a); }
template <class T> INLINE void put_past_cache(T* p, D a) { put(p, a); }

}  // namespace
}  // namespace fastbn
