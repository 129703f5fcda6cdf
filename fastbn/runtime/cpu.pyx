"""What this CPU and its operating system can run, and how large its cache is."""

cdef extern from *:
    """
    #include <stdint.h>
    enum { EAX, EBX, ECX, EDX };
    #if defined(_M_X64)
      #define NOMINMAX
      #include <windows.h>
      #include <intrin.h>
      #define FASTBN_HAS(name, windows) IsProcessorFeaturePresent(windows)
      static void fastbn_cpuid(uint32_t leaf, int subleaf, uint32_t r[4]) {
          __cpuidex((int*)r, (int)leaf, subleaf);
      }
    #elif defined(__x86_64__)
      #include <cpuid.h>
      #define FASTBN_HAS(name, windows) __builtin_cpu_supports(name)
      static void fastbn_cpuid(uint32_t leaf, int subleaf, uint32_t r[4]) {
          __cpuid_count(leaf, subleaf, r[EAX], r[EBX], r[ECX], r[EDX]);
      }
    #else
      #define FASTBN_HAS(name, windows) false
      static void fastbn_cpuid(uint32_t, int, uint32_t r[4]) { r[EAX] = r[EBX] = r[ECX] = 0; }
    #endif

    // The CPU must have wide registers, and the system must save them when it switches threads.
    // The compiler's function and that of Windows ask for both. Windows knows AVX2 (40) and
    // AVX-512F (41) alone; where it runs, CPUs with these have the others of their line as well.
    struct Feature { const char* name; bool here; };
    static Feature fastbn_features[] = {
        {"fma", FASTBN_HAS("fma", 40)},
        {"avx2", FASTBN_HAS("avx2", 40)},
        {"avx512f", FASTBN_HAS("avx512f", 41)},
        {"avx512dq", FASTBN_HAS("avx512dq", 41)},
        {"avx512bw", FASTBN_HAS("avx512bw", 41)},
        {"avx512vl", FASTBN_HAS("avx512vl", 41)},
    };
    """
    ctypedef unsigned int uint32_t
    enum: EAX, EBX, ECX
    void fastbn_cpuid(uint32_t leaf, int subleaf, uint32_t* registers)
    cdef struct Feature:
        const char* name
        bint here
    Feature[6] fastbn_features


def cpu_features():
    """Return the names of the vector instructions beyond the baseline that can be used here."""
    return [feature.name.decode() for feature in fastbn_features if feature.here]


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
