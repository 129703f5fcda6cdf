"""What this CPU and its operating system can run, and how large its cache is.

A CPU that has wide registers is not enough: the operating system must save them when it switches
threads, which it says in the register XCR0. Both are asked here, the same way with every compiler.
"""

cdef extern from *:
    """
    #include <stdint.h>
    #if defined(_M_X64)
      #include <intrin.h>
      static void fastbn_cpuid(uint32_t leaf, int subleaf, uint32_t r[4]) {
          __cpuidex((int*)r, (int)leaf, subleaf);
      }
      static uint64_t fastbn_xcr0(void) { return _xgetbv(0); }
    #elif defined(__x86_64__)
      #include <cpuid.h>
      static void fastbn_cpuid(uint32_t leaf, int subleaf, uint32_t r[4]) {
          __cpuid_count(leaf, subleaf, r[0], r[1], r[2], r[3]);
      }
      static uint64_t fastbn_xcr0(void) {
          uint32_t low, high;
          __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
          return ((uint64_t)high << 32) | low;
      }
    #else
      static void fastbn_cpuid(uint32_t leaf, int subleaf, uint32_t r[4]) {
          (void)leaf; (void)subleaf;
          r[0] = r[1] = r[2] = r[3] = 0;
      }
      static uint64_t fastbn_xcr0(void) { return 0; }
    #endif
    """
    ctypedef unsigned int uint32_t
    ctypedef unsigned long long uint64_t
    void fastbn_cpuid(uint32_t leaf, int subleaf, uint32_t* registers)
    uint64_t fastbn_xcr0()

# (name, bit): Intel's manual, volume 2, CPUID. Leaf 1, ECX, and leaf 7, EBX.
WIDE_256_LEAF_1 = [("fma", 12), ("f16c", 29)]
WIDE_256 = [("avx2", 5)]
WIDE_512 = [("avx512f", 16), ("avx512dq", 17), ("avx512bw", 30), ("avx512vl", 31)]

cdef enum:
    EAX = 0
    EBX = 1
    ECX = 2
    OSXSAVE = 1 << 27   # ECX in leaf 1: XCR0 can be asked
    XCR0_256 = 0x06     # XMM and the upper halves of YMM are saved
    XCR0_512 = 0xE6     # and the masks, the upper halves of ZMM0-15, and ZMM16-31


def cpu_features():
    """Return the names of the vector instructions beyond the baseline that can be used here."""
    cdef uint32_t r[4]
    cdef uint64_t saved
    fastbn_cpuid(0, 0, r)
    if r[0] < 7:
        return []
    fastbn_cpuid(1, 0, r)
    if not r[ECX] & OSXSAVE:
        return []
    saved = fastbn_xcr0()
    if saved & XCR0_256 != XCR0_256:
        return []
    found = [name for name, bit in WIDE_256_LEAF_1 if r[ECX] >> <int>bit & 1]
    fastbn_cpuid(7, 0, r)
    candidates = WIDE_256 + (WIDE_512 if saved & XCR0_512 == XCR0_512 else [])
    return found + [name for name, bit in candidates if r[EBX] >> <int>bit & 1]


cdef size_t largest_cache():
    """Return the bytes of the largest cache that CPUID describes, or 0 where it describes none."""
    cdef uint32_t r[4]
    cdef size_t largest = 0, size
    cdef uint32_t leaf, extended
    cdef int index
    for leaf, extended in ((4, 0), (0x8000001D, 0x80000000)):  # Intel, AMD
        fastbn_cpuid(extended, 0, r)
        if r[EAX] < leaf:
            continue
        for index in range(16):
            fastbn_cpuid(leaf, index, r)
            if r[EAX] & 31 == 0:  # no more caches
                break
            size = (r[EBX] >> 22) + 1                # ways
            size *= (r[EBX] >> 12 & 0x3FF) + 1       # partitions
            size *= (r[EBX] & 0xFFF) + 1             # bytes in a line
            size *= <size_t>r[ECX] + 1               # sets
            largest = max(largest, size)
    return largest


cdef size_t found_cache = largest_cache() or 16 << 20  # where it is not told: a middling one


cdef size_t cache_size() noexcept nogil:
    return found_cache
