# From sums to statistics, and from statistics to coefficients: over channels, 16 at a time.


cdef inline void add(double* sum, double* low, double term, bint careful) noexcept nogil:
    """Add a term to a sum; where asked, add up what that loses in rounding as well (TwoSum [2]_)."""
    cdef double high = sum[0] + term, part
    if careful:
        part = high - sum[0]
        low[0] += (sum[0] - (high - part)) + (term - part)
    sum[0] = high


cdef struct Merged:        # moments of n values, or sums; low is what rounding took
    double n
    double mean
    double mean_low
    double m2
    double m2_low


cdef inline void merge(
    Merged* all, double mean, double m2, double n, bint careful
) noexcept nogil:
    """Take a block of n values into the moments of those before it (Chan's formula)."""
    cdef double delta = (mean - all.mean) - all.mean_low, weight = n / (all.n + n)
    add(&all.mean, &all.mean_low, delta * weight, careful)
    add(&all.m2, &all.m2_low, m2 + delta * delta * (all.n * weight), careful)
    all.n += n


cdef void finish_moments(Job* job, Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
    """Make mean, what it loses in rounding, and var of some channels.

    On entry mean holds the distance from the origin, mean_low the origin, var the sum of squares.
    """
    cdef Wide count = fill(job.count), distance, origin, mean, part, m2
    cdef Py_ssize_t c, s
    cdef int lanes
    for c from begin <= c < end by LANES:
        lanes, s = min(end - c, <Py_ssize_t>LANES), statistic_of(job, c)
        distance, origin = load(job.mean + s, lanes), load(job.mean_low + s, lanes)
        m2 = load(job.var + s, lanes)
        mean = origin + distance
        part = mean - origin
        store(job.mean + s, mean, lanes)
        store(job.mean_low + s, (origin - (mean - part)) + (distance - part), lanes)
        # Rounding may leave less than 0. A NaN stays.
        store(job.var + s, leaky_relu(above_zero(m2), m2, 0) / count, lanes)


cdef void make_affine_coefficients(Walk* w, Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
    """Make center, scale and shift of some channels."""
    cdef Job* job = w.job
    cdef Table table = table_of(w, 0)
    cdef Wide eps = fill(job.eps), mean, low, center, scale
    cdef Py_ssize_t c, s, p, at
    cdef int lanes
    for c from begin <= c < end by LANES:
        lanes, s, p = min(end - c, <Py_ssize_t>LANES), statistic_of(job, c), parameter_of(job, c)
        mean, low = load(job.mean + s, lanes), load(job.mean_low + s, lanes)
        center = rounded(mean, w.loops.wide)
        scale = load(job.gamma + p, lanes) / square_root(load(job.var + s, lanes) + eps)
        at = c - w.panel.begin
        store(table.center + at, center, lanes)
        store(table.scale + at, scale, lanes)
        store(table.shift + at, load(job.beta + p, lanes) - ((mean - center) + low) * scale, lanes)


cdef void choose_shifts(Walk* w) noexcept nogil:
    """Choose what x is shifted by in sum(dy * x): the mean, where that would cancel."""
    cdef Job* job = w.job
    cdef Py_ssize_t c, s
    for c in range(job.channels):
        s = statistic_of(job, c)
        w.shifts[c] = 0
        if not w.loops.exact_products or job.mean[s] * job.mean[s] * CANCELLED > job.var[s]:
            w.shifts[c], w.shifted = job.mean[s], True


cdef void make_gradient_coefficients(Walk* w, Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
    """Make the coefficients of dx of some channels, and dgamma, so far sum(dy * (x - shift))."""
    cdef Job* job = w.job
    cdef Table table = table_of(w, 0)
    cdef Wide eps = fill(job.eps), count = fill(job.count), one = fill(1.0)
    cdef Wide mean, low, rstd, dbeta, dgamma, center, slope, level, residue
    cdef Py_ssize_t c, s, p, at
    cdef int lanes
    for c from begin <= c < end by LANES:
        lanes, s, p = min(end - c, <Py_ssize_t>LANES), statistic_of(job, c), parameter_of(job, c)
        mean, low = load(job.mean + s, lanes), load(job.mean_low + s, lanes)
        rstd = one / square_root(load(job.var + s, lanes) + eps)
        dbeta, dgamma = load(job.dbeta + s, lanes), load(job.dgamma + s, lanes)
        if job.operation != APPLY:
            dgamma = (dgamma - (mean - load(w.shifts + c, lanes) + low) * dbeta) * rstd
            store(job.dgamma + s, dgamma, lanes)
        center, slope, level = rounded(mean, w.loops.wide), rstd * (dgamma / count), dbeta / count
        # What center and level lose in rounding.
        residue = (level - rounded(level, w.loops.wide)) - (low + (mean - center)) * slope
        at = c - w.panel.begin
        store(table.center + at, center, lanes)
        store(table.scale + at, load(job.gamma + p, lanes) * rstd, lanes)
        store(table.shift + at, residue, lanes)
        store(table.slope + at, slope, lanes)
        store(table.level + at, level, lanes)


cdef void make_coefficients(Walk* w, Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
    """Make what follows from the sums of some channels: statistics or dgamma, and coefficients."""
    if w.job.operation == FORWARD:
        finish_moments(w.job, begin, end)
    if w.job.dy != NULL:
        make_gradient_coefficients(w, begin, end)
    elif w.job.out != NULL:
        make_affine_coefficients(w, begin, end)
