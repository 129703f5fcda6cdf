# This file holds the cache of a forward pass, the merging of moments, and the update of running
# statistics.


cdef enum:  # the rows of a cache's statistics; those before GAMMA have one for each group
    MEAN
    MEAN_LOW
    VAR
    GAMMA
    BETA  # only while y is computed
    ROWS


@cython.final
@cython.freelist(16)
cdef class Cache:
    """What `batch_norm_backward` needs of the forward pass.

    It holds x itself, not a copy: x must not change before the backward pass. `copy.deepcopy`
    copies x too. A cache cannot be pickled: it would lose how x lies in memory.

    Attributes
    ----------
    mean, var : ndarray of float64, shape (C,)
        The statistics of each channel; var is biased (divided by M). Where each group of examples
        has its own, as in `instance_norm`: shape (groups, C).
    moments : Moments
        The statistics of the whole minibatch, all groups together.
    """

    cdef cnp.ndarray statistics  # float64, in rows: means, their low parts, vars, gamma, beta
    cdef cnp.ndarray x           # in memory as the kernels want it; None once out= overwrote it
    cdef Type type
    cdef Py_ssize_t examples     # outer size of all groups together
    cdef Py_ssize_t outer        # outer size of one group; the last may be smaller
    cdef Py_ssize_t channels
    cdef Py_ssize_t inner
    cdef double count            # how many values of a channel the statistics cover
    cdef double own              # how many of them x has
    cdef double eps
    cdef Py_ssize_t groups
    cdef bint grouped
    cdef bint fixed              # the statistics were given, so they are constants
    cdef bint residual           # whether forward had a residual
    cdef bint activated
    cdef double slope            # slope of the activation below 0
    cdef cnp.ndarray signs       # a bit for each value: its activation's input was not <= 0
    cdef Py_ssize_t first_bit    # which bit of signs is that of the first value
    # Of a mask, None without one: the runs of valid positions (Run in job.hpp, one a row), a bit for
    # each position where that is needed, and the order of x's axes in memory if x was copied.
    cdef cnp.ndarray runs
    cdef cnp.ndarray valid
    cdef object order
    # Arrays of the gradients' shape and dtype. None stands for (C,) and x's dtype, or float32 for
    # 16-bit x.
    cdef cnp.ndarray gamma_like
    cdef cnp.ndarray beta_like

    @property
    def mean(self):
        return self.matrix(MEAN)

    @property
    def var(self):
        return self.matrix(VAR)

    @property
    def moments(self):
        counts = np.full(self.groups, self.count)
        if self.grouped:
            counts[:] = self.outer * self.inner
            counts[self.groups - 1] = (self.examples - (self.groups - 1) * self.outer) * self.inner
        if self.runs is not None:
            group = self.runs[:-1, 0] // (self.outer * self.inner)
            counts = np.bincount(group, np.diff(self.runs[:, 1]), self.groups)
            counts = counts.astype(np.float64)  # of no runs at all it gives integers
        return merged(self.matrix(MEAN), self.matrix(MEAN_LOW), self.matrix(VAR), counts)

    @property
    def state(self):
        """What `restored` needs to know to make this cache again, beside x."""
        return (
            self.statistics, self.signs, self.first_bit, self.count, self.fixed, self.residual,
            self.activated, self.slope, self.eps,
        )

    def __copy__(self):
        return self  # so that both know if out= overwrites x

    def __deepcopy__(self, memo):
        make, arguments, state = self.__reduce__()  # by Cython, which knows all attributes
        twin = make(*arguments)
        twin.__setstate__(deepcopy(state, memo))
        return twin

    cdef object matrix(self, int which):
        rows = self.statistics[which * self.groups:(which + 1) * self.groups]
        return rows if self.grouped else rows[0]


def refuse_to_pickle(cache):
    raise TypeError(
        "cache: expected to stay in its process, got pickled, which loses how x lies in memory; "
        "copy.deepcopy keeps it"
    )


copyreg.pickle(Cache, refuse_to_pickle)


cdef inline double* row_of(Cache cache, int which) noexcept:
    """Return a row of the statistics, that of the first group."""
    cdef Py_ssize_t row = which * cache.groups
    if which > GAMMA:
        row = GAMMA * cache.groups + which - GAMMA
    return <double*>cnp.PyArray_DATA(cache.statistics) + row * cache.channels


cdef cnp.ndarray x_of(Cache cache):
    """Return x. Another thread may forget it meanwhile, and some Pythons have no GIL."""
    cdef cnp.ndarray x
    with cython.critical_section(cache):
        x = cache.x
    if x is None:
        raise ValueError(
            "cache: x is needed for the gradients, but out= has overwritten it; "
            "give another array as out"
        )
    return x


cdef bint forget_x(Cache cache) except -1:
    with cython.critical_section(cache):
        cache.x = None
    return True


cdef Cache checked_cache(object cache, bint one_group=False):
    """Return the cache if backward can use it; raise otherwise."""
    if type(cache) is not Cache:
        raise TypeError(
            f"cache: expected what batch_norm returned beside y, got {type(cache).__name__}"
        )
    x_of(cache)
    if one_group and (<Cache>cache).grouped:
        raise ValueError("cache: expected one group of examples; use batch_norm_backward")
    return cache


cdef struct Sum:
    double high
    double low  # the sum of the rounding errors of high


cdef inline Sum plus(Sum a, double b) noexcept nogil:
    cdef double high = a.high + b, part = high - a.high
    a.low += (a.high - (high - part)) + (b - part)
    a.high = high
    return a


def merged(means, lows, variances, counts):
    """Return the Moments of all, given those of k parts: float64, shape (k, C); counts (k,)."""
    cdef double[:, :] mean = np.atleast_2d(means), low = np.atleast_2d(lows)
    cdef double[:, :] var = np.atleast_2d(variances)
    cdef double[:] n = counts
    cdef Py_ssize_t parts = mean.shape[0], channels = mean.shape[1], c, i, first = 0
    cdef cnp.ndarray result = np.zeros((3, channels))
    cdef double[:, :] into = result
    cdef double total = np.sum(counts), origin, d, apart
    cdef Sum distance, m2
    while first < parts - 1 and n[first] == 0:
        first += 1
    for c in range(channels if total else 0):
        origin = mean[first, c]
        distance = m2 = Sum(0, 0)
        for i in range(first, parts):
            if n[i]:
                distance = plus(distance, n[i] * ((mean[i, c] - origin) + low[i, c]))
        d = (distance.high + distance.low) / total
        for i in range(first, parts):
            if n[i]:
                apart = ((mean[i, c] - origin) + low[i, c]) - d
                m2 = plus(m2, n[i] * (var[i, c] + apart * apart))
        distance = plus(Sum(origin, 0), d)
        into[0, c], into[1, c] = distance.high, distance.low
        into[2, c] = (m2.high + m2.low) / total
    moments = Moments(result[0], result[2], int(total))
    moments.mean_low = result[1]
    return moments


cdef bint is_running(cnp.ndarray array, Py_ssize_t channels):
    """Whether running statistics can be updated where they are."""
    return (
        cnp.PyArray_ISCARRAY(array)
        and cnp.PyArray_TYPE(array) in (cnp.NPY_FLOAT64, cnp.NPY_FLOAT32)
        and cnp.PyArray_SIZE(array) == channels
    )


cdef void move_towards(cnp.ndarray running, double* batch, double weight, double factor):
    """Average a running statistic with that of a minibatch, times a factor; round once."""
    cdef Py_ssize_t c
    cdef double* wide = <double*>cnp.PyArray_DATA(running)
    cdef float* narrow = <float*>cnp.PyArray_DATA(running)
    if cnp.PyArray_TYPE(running) == cnp.NPY_FLOAT64:
        for c in range(cnp.PyArray_SIZE(running)):
            wide[c] = (1 - weight) * wide[c] + weight * (batch[c] * factor)
    else:
        for c in range(cnp.PyArray_SIZE(running)):
            narrow[c] = <float>((1 - weight) * narrow[c] + weight * (batch[c] * factor))


def update_running(
    Cache cache not None, cnp.ndarray mean not None, cnp.ndarray var not None, double weight
):
    """Move running statistics, in place, towards those of a minibatch, var unbiased."""
    cdef double count = cache.count
    cdef double* batch_mean = row_of(cache, MEAN)
    cdef double* batch_var = row_of(cache, VAR)
    for name, array in (("running_mean", mean), ("running_var", var)):
        if not is_running(array, cache.channels):
            raise ValueError(
                f"{name}: expected a writeable, contiguous array of float64 or float32, "
                f"{cache.channels} value(s), got {array.dtype}, shape {np.shape(array)}, "
                f"writeable: {array.flags.writeable}, contiguous: {array.flags.c_contiguous}"
            )
    if cache.groups > 1:
        moments = cache.moments
        count = moments.count
        batch_mean = <double*>cnp.PyArray_DATA(moments.mean)
        batch_var = <double*>cnp.PyArray_DATA(moments.var)
    move_towards(mean, batch_mean, weight, 1)
    move_towards(var, batch_var, weight, count / (count - 1))
