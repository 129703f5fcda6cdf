"""What this CPU and its operating system can run.

A CPU that has wide registers is not enough: the operating system must save them when it switches
threads, which it says in the register XCR0. Both are asked here, the same way with every compiler.
"""

cdef extern from *:
    """
    #include <stdint.h>
    #if defined(_M_X64)
      #include <intrin.h>
      static void fastbn_cpuid(int leaf, int subleaf, uint32_t r[4]) {
          __cpuidex((int*)r, leaf, subleaf);
      }
      static uint64_t fastbn_xcr0(void) { return _xgetbv(0); }
    #elif defined(__x86_64__)
      #include <cpuid.h>
      static void fastbn_cpuid(int leaf, int subleaf, uint32_t r[4]) {
          __cpuid_count(leaf, subleaf, r[0], r[1], r[2], r[3]);
      }
      static uint64_t fastbn_xcr0(void) {
          uint32_t low, high;
          __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
          return ((uint64_t)high << 32) | low;
      }
    #else
      static void fastbn_cpuid(int leaf, int subleaf, uint32_t r[4]) {
          (void)leaf; (void)subleaf;
          r[0] = r[1] = r[2] = r[3] = 0;
      }
      static uint64_t fastbn_xcr0(void) { return 0; }
    #endif
    """
    ctypedef unsigned int uint32_t
    ctypedef unsigned long long uint64_t
    void fastbn_cpuid(int leaf, int subleaf, uint32_t* registers)
    uint64_t fastbn_xcr0()

# (name, bit of EBX in leaf 7): Intel's manual, volume 2, CPUID.
WIDE_256 = [("avx2", 5)]
WIDE_512 = [("avx512f", 16), ("avx512dq", 17), ("avx512bw", 30), ("avx512vl", 31)]

cdef enum:
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
    fastbn_cpuid(7, 0, r)
    candidates = WIDE_256 if saved & XCR0_256 == XCR0_256 else []
    if saved & XCR0_512 == XCR0_512:
        candidates = candidates + WIDE_512
    return [name for name, bit in candidates if r[EBX] >> <int>bit & 1]
