// Packs: the vectors that the loops are written in.
//
// The loops work on packs of 16 lanes, whatever the instruction set: Pack<float> holds 16
// floats, Pack<double> 16 doubles. A pack is a tree of native registers (Twice<Twice<F>> and so
// on, of registers.hpp), so it needs no array that the compiler might leave in memory, and every
// operation is one IEEE operation a lane: a loop over packs gives the same bits in every
// instruction set. Only sum() mixes lanes, and it always folds the upper half onto the lower.

#pragma once

#include "registers.hpp"

namespace fastbn {
namespace {

template <class V, bool enough = (V::lanes >= 16)> struct Doubled {
    using type = typename Doubled<Twice<V>>::type;
};
template <class V> struct Doubled<V, true> { using type = V; };

// What a type is computed in: float for the 16-bit types.
template <class T> struct ElementOf { using type = T; };
template <> struct ElementOf<Half> { using type = float; };
template <> struct ElementOf<Bfloat> { using type = float; };
template <class T> using Element = typename ElementOf<T>::type;

template <class E> struct PackOf;
template <> struct PackOf<float> { using type = Doubled<F>::type; };
template <> struct PackOf<double> { using type = Doubled<D>::type; };
template <class T> using Pack = typename PackOf<Element<T>>::type;

INLINE int lower(int n, int half) { return n < half ? n : half; }
INLINE int upper(int n, int half) { return n < half ? 0 : n - half; }

template <class H> INLINE Twice<H> operator+(Twice<H> a, Twice<H> b) {
    return {a.lo + b.lo, a.hi + b.hi};
}
template <class H> INLINE Twice<H> operator-(Twice<H> a, Twice<H> b) {
    return {a.lo - b.lo, a.hi - b.hi};
}
template <class H> INLINE Twice<H> operator*(Twice<H> a, Twice<H> b) {
    return {a.lo * b.lo, a.hi * b.hi};
}
template <class H> INLINE Twice<H> operator/(Twice<H> a, Twice<H> b) {
    return {a.lo / b.lo, a.hi / b.hi};
}
template <class H> INLINE Twice<H> root(Twice<H> a) { return {root(a.lo), root(a.hi)}; }
template <class H> INLINE Twice<H> multiply_add(Twice<H> a, Twice<H> b, Twice<H> c) {
    return {multiply_add(a.lo, b.lo, c.lo), multiply_add(a.hi, b.hi, c.hi)};
}
template <class H, class T> INLINE void set(Twice<H>& a, T value) {
    set(a.lo, value);
    set(a.hi, value);
}
template <class H, class T> INLINE void get(Twice<H>& a, const T* p) {
    get(a.lo, p);
    get(a.hi, p + H::lanes);
}
template <class H, class T> INLINE void get(Twice<H>& a, const T* p, int n) {
    get(a.lo, p, lower(n, H::lanes));
    get(a.hi, p + H::lanes, upper(n, H::lanes));
}
template <class H, class T> INLINE void put(T* p, Twice<H> a) {
    put(p, a.lo);
    put(p + H::lanes, a.hi);
}
template <class H, class T> INLINE void put(T* p, Twice<H> a, int n) {
    put(p, a.lo, lower(n, H::lanes));
    put(p + H::lanes, a.hi, upper(n, H::lanes));
}
template <class H, class T> INLINE void put_past_cache(T* p, Twice<H> a) {
    put_past_cache(p, a.lo);
    put_past_cache(p + H::lanes, a.hi);
}
template <class H> INLINE double sum(Twice<H> a) { return sum(a.lo + a.hi); }
template <class H> INLINE unsigned above_zero(Twice<H> a) {
    return above_zero(a.lo) | above_zero(a.hi) << H::lanes;
}
template <class H> INLINE Twice<H> select(unsigned bits, Twice<H> a, Twice<H> b) {
    return {select(bits, a.lo, b.lo), select(bits >> H::lanes, a.hi, b.hi)};
}
INLINE D widen(D a) { return a; }
template <class H> INLINE auto widen(Twice<H> a) -> Twice<decltype(widen(a.lo))> {
    return {widen(a.lo), widen(a.hi)};
}
template <class H> INLINE auto narrow(Twice<H> a) -> Twice<decltype(narrow(a.lo))> {
    return {narrow(a.lo), narrow(a.hi)};
}

// What the loops are written in. `lanes` counts the lanes that exist: the others read as zero and
// are never written. load_wide reads any type as doubles.
template <class E> INLINE Pack<E> fill(E value) { Pack<E> a; set(a, value); return a; }
template <class T> INLINE Pack<T> load(const T* p, int lanes) {
    Pack<T> a;
    if (lanes == 16) get(a, p); else get(a, p, lanes);
    return a;
}
template <class T> INLINE Pack<double> load_wide(const T* p, int lanes) {
    Pack<double> a;
    if (lanes == 16) get(a, p); else get(a, p, lanes);
    return a;
}
template <class T> INLINE void store(T* p, Pack<T> a, int lanes) {
    if (lanes == 16) put(p, a); else put(p, a, lanes);
}
// The first n lanes of a, the others of b.
template <class P> INLINE P join(P a, P b, int n) { return select((1u << n) - 1, a, b); }
INLINE double sum_lanes(Pack<double> a) { return sum(a); }
INLINE Pack<double> square_root(Pack<double> a) { return root(a); }
// sum + a * b where the product is exact, as that of two floats is in double: then it makes no
// difference whether the machine rounds it before it adds.
INLINE Pack<double> add_exact_product(Pack<double> sum, Pack<double> a, Pack<double> b) {
    return multiply_add(a, b, sum);
}
// Keep a where its bit is set; elsewhere return slope * a, or 0 if slope is 0 (also for NaN).
INLINE Pack<float> leaky_relu(unsigned signs, Pack<float> a, double slope) {
    return select(signs, a, slope == 0 ? fill(0.0f) : a * fill((float)slope));
}
INLINE Pack<double> leaky_relu(unsigned signs, Pack<double> a, double slope) {
    return select(signs, a, slope == 0 ? fill(0.0) : a * fill(slope));
}
// The sum of contiguous values, lane by lane and then over the lanes.
INLINE double sum_values(const double* values, std::ptrdiff_t count) {
    Pack<double> total = fill(0.0);
    for (; count >= 16; count -= 16, values += 16) total = total + load(values, 16);
    if (count) total = total + load(values, (int)count);
    return sum(total);
}
template <class T> INLINE double value_of(T value) {
    if constexpr (sizeof(T) == 2) return widened(value); else return value;
}

// Bits of values, 16 in a word: whether what went into the activation was above 0. Words must be
// zero at first, and there are two more behind the last: chunks of work may share a word.
INLINE void set_bits(std::uint16_t* word, std::uint32_t bits) {
#if defined(_MSC_VER)
    if (bits) _InterlockedOr16((short*)word, (short)bits);
#else
    if (bits) __atomic_fetch_or(word, (std::uint16_t)bits, __ATOMIC_RELAXED);
#endif
}
// i is a multiple of 16 where all 16 lanes are there.
INLINE void put_bits(std::uint16_t* words, std::ptrdiff_t i, unsigned bits, int lanes) {
    words += i >> 4;
    if (lanes == 16) {
        *words = (std::uint16_t)bits;
        return;
    }
    std::uint32_t both = (std::uint32_t)(bits & ((1u << lanes) - 1)) << (i & 15);
    set_bits(words, both & 0xffffu);
    set_bits(words + 1, both >> 16);
}
INLINE unsigned get_bits(const std::uint16_t* words, std::ptrdiff_t i) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    std::uint32_t both;
    std::memcpy(&both, (const char*)words + (i >> 3), sizeof both);
    return both >> (i & 7) & 0xffffu;
#else
    words += i >> 4;
    return (words[0] | (std::uint32_t)words[1] << 16) >> (i & 15) & 0xffffu;
#endif
}

// Whole packs past the cache. The address must be a multiple of the size of a pack, and a fence
// must follow before another thread may look.
template <class T> INLINE void store_past_cache(T* p, Pack<T> a) { put_past_cache(p, a); }
template <class T> INLINE int lanes_to_line(const T* p) {
    return (int)((0 - (std::uintptr_t)p) % (16 * sizeof(T)) / sizeof(T));
}
INLINE void fence() {
#if defined(__SSE2__) || defined(_M_X64)
    _mm_sfence();
#endif
}
INLINE void prefetch(const void* p) {
#if defined(__GNUC__)
    __builtin_prefetch(p, 0, 2);
#else
    (void)p;
#endif
}
INLINE void prefetch_to_write(const void* p) {
#if defined(__GNUC__)
    __builtin_prefetch(p, 1);
#else
    (void)p;
#endif
}

}  // namespace
}  // namespace fastbn
