"""What this CPU and its operating system can run."""

cdef extern from *:
    """
    #if defined(_M_X64)
      #define NOMINMAX
      #include <windows.h>
      #define FASTBN_HAS(name, windows) IsProcessorFeaturePresent(windows)
    #elif defined(__x86_64__)
      #define FASTBN_HAS(name, windows) __builtin_cpu_supports(name)
    #else
      #define FASTBN_HAS(name, windows) false
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
    cdef struct Feature:
        const char* name
        bint here
    Feature[6] fastbn_features


def cpu_features():
    """Return the names of the vector instructions beyond the baseline that can be used here."""
    return [feature.name.decode() for feature in fastbn_features if feature.here]
