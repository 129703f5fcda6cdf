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

cdef enum:
    EAX, EBX, ECX, EDX

# Intel's manual, volume 2, CPUID; leaf 7 holds AVX2 in EBX 5 and AVX-512 F, DQ, BW, VL in these.
cdef enum:
    OSXSAVE = 1 << 27
    AVX = 1 << 28
    AVX2 = 1 << 5
    XCR0_AVX = 0x06      # XMM and YMM are saved
    XCR0_AVX512 = 0xE6   # and opmask, the upper halves of ZMM0-15, and ZMM16-31
cdef uint32_t AVX512 = (<uint32_t>1 << 16) | (1 << 17) | (1 << 30) | (<uint32_t>1 << 31)


def supported_isas():
    """Return the kernel variants that run here, slowest first: "baseline", "avx2", "avx512"."""
    cdef uint32_t r[4]
    cdef uint64_t saved
    isas = ["baseline"]
    fastbn_cpuid(0, 0, r)
    if r[EAX] < 7:
        return isas
    fastbn_cpuid(1, 0, r)
    if not (r[ECX] & OSXSAVE and r[ECX] & AVX):
        return isas
    saved = fastbn_xcr0()
    fastbn_cpuid(7, 0, r)
    if saved & XCR0_AVX == XCR0_AVX and r[EBX] & AVX2:
        isas.append("avx2")
        if saved & XCR0_AVX512 == XCR0_AVX512 and r[EBX] & AVX512 == AVX512:
            isas.append("avx512")
    return isas
