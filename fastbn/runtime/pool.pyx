"""How many threads a call may use, and the pool of them (see `pool.hpp`)."""

import os
import re

from fastbn import checks
from fastbn.runtime.limits import usable_cpus

cdef extern from "pool.hpp" namespace "fastbn" nogil:
    cdef cppclass Pool:
        void share_out(Task task, void* work, Py_ssize_t chunks, int threads)
    Pool*& the_pool()

cdef extern from *:
    """
    #include <atomic>
    static std::atomic<int> fastbn_threads{1};
    extern "C" {  // for threadpoolctl, which finds the library by these names
    Py_EXPORTED_SYMBOL int fastbn_get_num_threads() { return fastbn_threads; }
    Py_EXPORTED_SYMBOL void fastbn_set_num_threads(int n) {
        fastbn_threads = n < 1 ? 1 : n > 1024 ? 1024 : n;
    }
    }
    """
    int fastbn_get_num_threads() noexcept nogil
    void fastbn_set_num_threads(int n) noexcept nogil

MOST = 1024

# Whether FASTBN_NUM_THREADS or set_num_threads has said how many threads there are, and otherwise
# what another library has said last.
cdef bint chosen = "FASTBN_NUM_THREADS" in os.environ
cdef int followed

# Below this many bytes of arguments and results a second thread does not pay: docs/decisions.
cdef double ENOUGH = 2e6


cdef int threads_for(double bytes) noexcept nogil:
    return fastbn_get_num_threads() if bytes > ENOUGH else 1


cdef void share_out(Task task, void* work, Py_ssize_t chunks, int threads) noexcept nogil:
    the_pool().share_out(task, work, chunks, threads)


def set_num_threads(n):
    """Set how many threads one call may use at most.

    Results do not depend on it, not in a single bit. At first it is what FASTBN_NUM_THREADS says,
    or OMP_NUM_THREADS, or as many CPUs as this process may run on (its affinity, and the quota of
    its control group). `threadpoolctl.threadpool_limits` sets it too.

    Parameters
    ----------
    n : int
        At least 1; 1 keeps all work on the calling thread. Small arrays stay there anyway.

    Raises
    ------
    TypeError, ValueError
        If n is not an integer from 1 to 1024.

    Examples
    --------
    >>> import fastbn
    >>> fastbn.set_num_threads(2)
    >>> fastbn.get_num_threads()
    2
    """
    global chosen
    n = checks.integer("n", n)
    if not 1 <= n <= MOST:
        raise ValueError(f"n: expected an integer from 1 to {MOST}, got {n}")
    chosen = True
    fastbn_set_num_threads(n)


def follow_num_threads(int n):
    """Take another library's number of threads, unless one of this library has been set.

    A number that is not the one followed last was set by threadpoolctl, for a while.
    """
    global followed
    if n != followed and not chosen and fastbn_get_num_threads() == followed:
        fastbn_set_num_threads(n)
        followed = fastbn_get_num_threads()


def get_num_threads():
    """Return how many threads one call may use at most; see `set_num_threads`."""
    return fastbn_get_num_threads()


def default_num_threads():
    """Return what FASTBN_NUM_THREADS or OMP_NUM_THREADS says, or how many CPUs there are."""
    wanted = os.environ.get("FASTBN_NUM_THREADS")
    if wanted is not None:
        if not re.fullmatch(r"\s*\d{1,4}\s*", wanted) or not 1 <= int(wanted) <= MOST:
            raise ImportError(
                f"FASTBN_NUM_THREADS: expected an integer from 1 to {MOST}, got {wanted!r}"
            )
        return int(wanted)
    # OpenMP has a list there, one number a level of nesting. What else it is, OpenMP will say.
    openmp = re.match(r"\s*(\d{1,4})\s*(,|$)", os.environ.get("OMP_NUM_THREADS", ""))
    if openmp and 1 <= int(openmp[1]) <= MOST:
        return int(openmp[1])
    return min(usable_cpus(), MOST)


followed = default_num_threads()
fastbn_set_num_threads(followed)
the_pool()  # here, where no other thread can fork meanwhile
