"""The kernels: statistics, normalisation and gradients over one contiguous block of memory.

The shape. Every array is (outer, channels, inner), C-contiguous: NCHW is (N, C, H*W), NHWC is
(N*H*W, C, 1), the course's (n_h, m) is (1, n_h, m). Two ways of walking it:

- runs (inner >= 16): the values of one channel lie in runs of `inner`, and lanes go along the
  run. The channels are taken a tile at a time, so that a tile that fits in the cache is fetched
  from memory once although it is read twice.
- rows (inner < 16): lanes go across the channels. A row is `fold` times channels * inner values,
  so that a few channels fill the lanes as well; what the lanes of one channel gathered is merged
  at the end.

The statistics. Values are cut into blocks; block boundaries depend on the shape alone. In a block
each lane sums d and d*d in float64, where d = x - k and k is the block's first value: so the
cancellation in sum(d*d) - sum(d)^2 / n costs at most a factor n in float64's rounding, whatever
the mean. Blocks are merged in order with Chan's formula [1]_, as distances from the channel's
first value (its origin), which keeps what the mean itself would round away. The mean comes out as
two doubles, mean + mean_low.

The elements. y = (x - center) * scale + shift in the precision of x, where center is the mean
rounded to that precision and shift carries the rest of it; dx = ((dy - level) - ((x - center) *
slope + residue)) * scale likewise. Three and six operations an element, none of them a division.

The same bits everywhere: a pack has 16 lanes in every instruction set, each operation is one IEEE
operation (no contraction), and neither blocks nor the order of merging know who computes them.

In signatures IN marks what is read, OUT what is written, IN/OUT both. `x`, `y`, `dy`, `dx` hold
outer * channels * inner values; per-channel arrays are float64. y may be x, and dx may be x or dy.

.. [1] Chan, Golub, LeVeque, "Algorithms for computing the sample variance", 1983.
"""

from libc.math cimport sqrt
from libc.stdlib cimport free, malloc

cimport numpy as cnp

cnp.import_array()

ctypedef fused real:
    float
    double

cdef extern from "_simd.hpp" namespace "fastbn" nogil:
    cdef cppclass Pack[T]:
        Pack operator+(Pack)
        Pack operator-(Pack)
        Pack operator*(Pack)
    Pack[T] fill[T](T value)
    Pack[T] load[T](const T* p)
    Pack[T] load_some[T](const T* p, int n)
    Pack[double] load_wide[T](const T* p)
    Pack[double] load_wide_some[T](const T* p, int n)
    void store[T](T* p, Pack[T] a)
    void store_some[T](T* p, Pack[T] a, int n)
    Pack[double] keep_first(Pack[double] a, int n)
    double sum_lanes(Pack[double] a)

cdef enum:
    LANES = 16
    BLOCK = 4096           # values of one channel in a block of runs
    BLOCK_ROWS = 32        # rows in a block of rows
    GROUP_ROWS = 4         # rows that share one load of the coefficients
    TILE = 1024            # contiguous values that a tile of channels has at least
    MAX_TILE_CHANNELS = 64  # = TILE / LANES
    MIN_WIDTH = 64         # values that a row has at least, where the array has as many


cdef struct Shape:
    Py_ssize_t outer
    Py_ssize_t channels
    Py_ssize_t inner


cdef struct Moments:
    double* mean       # while blocks are merged: the distance from the origin
    double* mean_low   # what mean lost in rounding
    double* m2         # the sum of squared deviations from the mean


cdef inline void merge(
    double* mean, double* m2, double n, double block_mean, double block_m2, double block_n
) noexcept nogil:
    """Take a block into the moments of n values before it (Chan's formula)."""
    cdef double delta = block_mean - mean[0]
    cdef double weight = block_n / (n + block_n)
    mean[0] += delta * weight
    m2[0] += block_m2 + delta * delta * (n * weight)


cdef inline void finish(Moments m, Py_ssize_t c, double origin) noexcept nogil:
    """Turn a distance from the origin into a mean, rounded once, and what the rounding lost."""
    cdef double distance = m.mean[c]
    cdef double mean = origin + distance
    cdef double part = mean - origin
    m.mean_low[c] = (origin - (mean - part)) + (distance - part)
    m.mean[c] = mean
    if m.m2[c] < 0:  # rounding; a NaN stays
        m.m2[c] = 0


# ------------------------------------------------------------------------------------------ runs


cdef inline Py_ssize_t rows_in_block(Shape s) noexcept nogil:
    return max(1, BLOCK // s.inner)


cdef inline Py_ssize_t tile_channels(Shape s) noexcept nogil:
    return (TILE + s.inner - 1) // s.inner


cdef inline void sum_run(
    const real* x,          # IN  n values
    Py_ssize_t n,
    double k,
    Pack[double]* sum_d,    # IN/OUT  sum of x - k
    Pack[double]* sum_dd,   # IN/OUT  sum of (x - k)^2
) noexcept nogil:
    cdef Pack[double] origin = fill(k)
    cdef Pack[double] a = sum_d[0], b = sum_dd[0], d
    cdef Py_ssize_t i
    cdef int tail = n % LANES
    for i from 0 <= i < n - tail by LANES:
        d = load_wide(x + i) - origin
        a = a + d
        b = b + d * d
    if tail:
        d = keep_first(load_wide_some(x + n - tail, tail) - origin, tail)
        a = a + d
        b = b + d * d
    sum_d[0] = a
    sum_dd[0] = b


cdef void moments_of_runs(
    const real* x,     # IN
    Shape s,
    Py_ssize_t begin,  # the tile: channels begin to end
    Py_ssize_t end,
    Moments m,         # OUT  at begin to end
) noexcept nogil:
    cdef Pack[double] sum_d[MAX_TILE_CHANNELS]
    cdef Pack[double] sum_dd[MAX_TILE_CHANNELS]
    cdef Py_ssize_t row, first_row, end_row = 0, first, piece, c, stride = s.channels * s.inner
    cdef double n = 0, block_n, a, origin, k
    cdef const real* block
    for c in range(begin, end):
        m.mean[c] = 0
        m.m2[c] = 0
    while end_row < s.outer:
        first_row, end_row = end_row, min(end_row + rows_in_block(s), s.outer)
        for first from 0 <= first < s.inner by BLOCK:
            piece = min(s.inner - first, <Py_ssize_t>BLOCK)
            block = x + first_row * stride + first
            for c in range(begin, end):
                sum_d[c - begin] = sum_dd[c - begin] = fill(0.0)
            for row in range(first_row, end_row):
                for c in range(begin, end):
                    sum_run(
                        x + row * stride + c * s.inner + first, piece, block[c * s.inner],
                        &sum_d[c - begin], &sum_dd[c - begin],
                    )
            block_n = <double>piece * (end_row - first_row)
            for c in range(begin, end):
                a = sum_lanes(sum_d[c - begin])
                k = block[c * s.inner]
                origin = x[c * s.inner]
                merge(
                    &m.mean[c], &m.m2[c], n, (k - origin) + a / block_n,
                    sum_lanes(sum_dd[c - begin]) - a * a / block_n, block_n,
                )
            n += block_n
    for c in range(begin, end):
        finish(m, c, x[c * s.inner])


cdef inline void normalize_run(
    const real* x,   # IN   n values
    real* y,         # OUT  n values
    Py_ssize_t n,
    real center,
    real scale,
    real shift,
) noexcept nogil:
    cdef Pack[real] m = fill(center), a = fill(scale), b = fill(shift)
    cdef Py_ssize_t i
    cdef int tail = n % LANES
    for i from 0 <= i < n - tail by LANES:
        store(y + i, (load(x + i) - m) * a + b)
    if tail:
        i = n - tail
        store_some(y + i, (load_some(x + i, tail) - m) * a + b, tail)


cdef void normalize_runs(
    const real* x,        # IN
    real* y,              # OUT
    Shape s,
    Py_ssize_t begin,     # the tile: channels begin to end
    Py_ssize_t end,
    const real* center,   # IN  of all channels
    const real* scale,    # IN
    const real* shift,    # IN
) noexcept nogil:
    cdef Py_ssize_t row, c, i
    # Backwards, as everywhere: what the pass before touched last is still in the cache.
    for row in range(s.outer - 1, -1, -1):
        for c in range(end - 1, begin - 1, -1):
            i = (row * s.channels + c) * s.inner
            normalize_run(x + i, y + i, s.inner, center[c], scale[c], shift[c])


cdef inline void sum_gradient_run(
    const real* x,          # IN  n values
    const real* dy,         # IN  n values
    Py_ssize_t n,
    double mean,
    Pack[double]* sum_dy,   # IN/OUT  sum of dy
    Pack[double]* sum_dyd,  # IN/OUT  sum of dy * (x - mean)
) noexcept nogil:
    cdef Pack[double] m = fill(mean)
    cdef Pack[double] a = sum_dy[0], b = sum_dyd[0], g
    cdef Py_ssize_t i
    cdef int tail = n % LANES
    for i from 0 <= i < n - tail by LANES:
        g = load_wide(dy + i)
        a = a + g
        b = b + g * (load_wide(x + i) - m)
    if tail:
        i = n - tail
        g = load_wide_some(dy + i, tail)
        a = a + g
        b = b + g * (load_wide_some(x + i, tail) - m)
    sum_dy[0] = a
    sum_dyd[0] = b


cdef void sum_gradient_of_runs(
    const real* x,       # IN
    const real* dy,      # IN
    Shape s,
    Py_ssize_t begin,    # the tile: channels begin to end
    Py_ssize_t end,
    const double* mean,  # IN
    double* sum_dy,      # OUT  at begin to end
    double* sum_dyd,     # OUT
) noexcept nogil:
    cdef Pack[double] a[MAX_TILE_CHANNELS]
    cdef Pack[double] b[MAX_TILE_CHANNELS]
    cdef Py_ssize_t row, first_row, end_row = 0, first, piece, c, i, stride = s.channels * s.inner
    for c in range(begin, end):
        sum_dy[c] = 0
        sum_dyd[c] = 0
    while end_row < s.outer:
        first_row, end_row = end_row, min(end_row + rows_in_block(s), s.outer)
        for first from 0 <= first < s.inner by BLOCK:
            piece = min(s.inner - first, <Py_ssize_t>BLOCK)
            for c in range(begin, end):
                a[c - begin] = b[c - begin] = fill(0.0)
            for row in range(first_row, end_row):
                for c in range(begin, end):
                    i = row * stride + c * s.inner + first
                    sum_gradient_run(x + i, dy + i, piece, mean[c], &a[c - begin], &b[c - begin])
            for c in range(begin, end):
                sum_dy[c] += sum_lanes(a[c - begin])
                sum_dyd[c] += sum_lanes(b[c - begin])


cdef inline void gradient_run(
    const real* x,   # IN   n values
    const real* dy,  # IN   n values
    real* dx,        # OUT  n values
    Py_ssize_t n,
    real center,
    real slope,
    real residue,
    real level,
    real scale,
) noexcept nogil:
    cdef Pack[real] m = fill(center), q = fill(slope), r = fill(residue)
    cdef Pack[real] k = fill(level), a = fill(scale)
    cdef Py_ssize_t i
    cdef int tail = n % LANES
    for i from 0 <= i < n - tail by LANES:
        store(dx + i, ((load(dy + i) - k) - ((load(x + i) - m) * q + r)) * a)
    if tail:
        i = n - tail
        store_some(
            dx + i,
            ((load_some(dy + i, tail) - k) - ((load_some(x + i, tail) - m) * q + r)) * a,
            tail,
        )


cdef void gradient_of_runs(
    const real* x,        # IN
    const real* dy,       # IN
    real* dx,             # OUT
    Shape s,
    Py_ssize_t begin,     # the tile: channels begin to end
    Py_ssize_t end,
    const real* center,   # IN  of all channels
    const real* slope,    # IN
    const real* residue,  # IN
    const real* level,    # IN
    const real* scale,    # IN
) noexcept nogil:
    cdef Py_ssize_t row, c, i
    for row in range(s.outer - 1, -1, -1):
        for c in range(end - 1, begin - 1, -1):
            i = (row * s.channels + c) * s.inner
            gradient_run(
                x + i, dy + i, dx + i, s.inner,
                center[c], slope[c], residue[c], level[c], scale[c],
            )


# ------------------------------------------------------------------------------------------ rows


cdef struct Rows:
    Py_ssize_t fold
    Py_ssize_t width   # values in a row: fold * channels * inner
    Py_ssize_t count   # full rows
    Py_ssize_t tail    # values in the shorter row behind them, if any
    Py_ssize_t padded  # width rounded up to full packs: the length of a lane array


cdef Rows rows_of(Shape s) noexcept nogil:
    cdef Rows r
    cdef Py_ssize_t narrow = s.channels * s.inner
    r.fold = max(1, min(MIN_WIDTH // narrow, s.outer))
    r.width = r.fold * narrow
    r.count = s.outer // r.fold
    r.tail = (s.outer - r.count * r.fold) * narrow
    r.padded = (r.width + LANES - 1) // LANES * LANES
    return r


cdef void spread(const real* values, Shape s, Rows r, real* lanes) noexcept nogil:
    """Write the value of its channel (IN) into each lane of a row (OUT)."""
    cdef Py_ssize_t f, c, i, j = 0
    for f in range(r.fold):
        for c in range(s.channels):
            for i in range(s.inner):
                lanes[j] = values[c]
                j += 1
    for j in range(r.width, r.padded):
        lanes[j] = 0


cdef void moments_of_rows(
    const real* x,     # IN
    Shape s,
    Rows r,
    Moments lane,      # scratch, lane arrays
    double* sum_d,     # scratch, a lane array
    double* sum_dd,    # scratch, a lane array
    Moments m,         # OUT
) noexcept nogil:
    cdef Pack[double] a, b, d, k
    cdef Py_ssize_t row, first_row, rows, f, c, i, j
    cdef double block_n, n
    cdef int tail
    cdef const real* block
    for j in range(r.width):
        lane.mean[j] = 0
        lane.m2[j] = 0
    for first_row from 0 <= first_row < r.count by BLOCK_ROWS:
        rows = min(r.count - first_row, <Py_ssize_t>BLOCK_ROWS)
        block = x + first_row * r.width
        for j from 0 <= j < r.width - LANES + 1 by LANES:
            a = b = fill(0.0)
            k = load_wide(block + j)
            for row in range(1, rows):
                d = load_wide(block + row * r.width + j) - k
                a = a + d
                b = b + d * d
            store(sum_d + j, a)
            store(sum_dd + j, b)
        tail = r.width % LANES
        if tail:
            j = r.width - tail
            a = b = fill(0.0)
            k = load_wide_some(block + j, tail)
            for row in range(1, rows):
                d = load_wide_some(block + row * r.width + j, tail) - k
                a = a + d
                b = b + d * d
            store(sum_d + j, a)
            store(sum_dd + j, b)
        block_n = rows
        for j in range(r.width):
            merge(
                &lane.mean[j], &lane.m2[j], first_row,
                (<double>block[j] - <double>x[j]) + sum_d[j] / block_n,
                sum_dd[j] - sum_d[j] * sum_d[j] / block_n, block_n,
            )
    block = x + r.count * r.width
    for j in range(r.tail):
        merge(&lane.mean[j], &lane.m2[j], r.count, <double>block[j] - <double>x[j], 0, 1)
    for c in range(s.channels):
        m.mean[c] = 0
        m.m2[c] = 0
        n = 0
        for f in range(r.fold):
            for i in range(s.inner):
                j = (f * s.channels + c) * s.inner + i
                block_n = r.count + (j < r.tail)
                merge(
                    &m.mean[c], &m.m2[c], n,
                    (<double>x[j] - <double>x[c * s.inner]) + lane.mean[j], lane.m2[j], block_n,
                )
                n += block_n
        finish(m, c, x[c * s.inner])


cdef inline void normalize_some_rows(
    const real* x,       # IN
    real* y,             # OUT
    Py_ssize_t rows,
    Py_ssize_t width,
    Py_ssize_t length,   # how much of each row
    const real* center,  # IN  lane arrays
    const real* scale,   # IN
    const real* shift,   # IN
) noexcept nogil:
    cdef Pack[real] m, a, b
    cdef Py_ssize_t row, i, j
    cdef int tail
    for j from 0 <= j < length by LANES:
        m = load(center + j)
        a = load(scale + j)
        b = load(shift + j)
        if length - j >= LANES:
            for row in range(rows):
                i = row * width + j
                store(y + i, (load(x + i) - m) * a + b)
        else:
            tail = length - j
            for row in range(rows):
                i = row * width + j
                store_some(y + i, (load_some(x + i, tail) - m) * a + b, tail)


cdef void normalize_rows(
    const real* x,       # IN
    real* y,             # OUT
    Rows r,
    const real* center,  # IN  lane arrays
    const real* scale,   # IN
    const real* shift,   # IN
) noexcept nogil:
    cdef Py_ssize_t row, i = r.count * r.width
    normalize_some_rows(x + i, y + i, 1, r.width, r.tail, center, scale, shift)
    for row from (r.count - 1) // GROUP_ROWS * GROUP_ROWS >= row >= 0 by GROUP_ROWS:
        i = row * r.width
        normalize_some_rows(
            x + i, y + i, min(r.count - row, <Py_ssize_t>GROUP_ROWS), r.width, r.width,
            center, scale, shift,
        )


cdef inline void sum_gradient_of_some_rows(
    const real* x,       # IN
    const real* dy,      # IN
    Py_ssize_t rows,
    Py_ssize_t width,
    Py_ssize_t length,   # how much of each row
    const double* mean,  # IN      lane arrays
    double* sum_dy,      # IN/OUT
    double* sum_dyd,     # IN/OUT
) noexcept nogil:
    cdef Pack[double] a, b, g, m
    cdef Py_ssize_t row, i, j
    cdef int tail
    for j from 0 <= j < length by LANES:
        a = b = fill(0.0)
        m = load(mean + j)
        if length - j >= LANES:
            for row in range(rows):
                i = row * width + j
                g = load_wide(dy + i)
                a = a + g
                b = b + g * (load_wide(x + i) - m)
        else:
            tail = length - j
            for row in range(rows):
                i = row * width + j
                g = load_wide_some(dy + i, tail)
                a = a + g
                b = b + g * (load_wide_some(x + i, tail) - m)
        store(sum_dy + j, load(<const double*>sum_dy + j) + a)
        store(sum_dyd + j, load(<const double*>sum_dyd + j) + b)


cdef void sum_gradient_of_rows(
    const real* x,       # IN
    const real* dy,      # IN
    Shape s,
    Rows r,
    const double* mean,  # IN   a lane array
    double* lane_dy,     # scratch, a lane array
    double* lane_dyd,    # scratch, a lane array
    double* sum_dy,      # OUT  a channel each
    double* sum_dyd,     # OUT
) noexcept nogil:
    cdef Py_ssize_t row, i, j, f, c
    for j in range(r.padded):
        lane_dy[j] = lane_dyd[j] = 0
    for row from 0 <= row < r.count by BLOCK_ROWS:
        i = row * r.width
        sum_gradient_of_some_rows(
            x + i, dy + i, min(r.count - row, <Py_ssize_t>BLOCK_ROWS), r.width, r.width,
            mean, lane_dy, lane_dyd,
        )
    i = r.count * r.width
    sum_gradient_of_some_rows(x + i, dy + i, 1, r.width, r.tail, mean, lane_dy, lane_dyd)
    for c in range(s.channels):
        sum_dy[c] = sum_dyd[c] = 0
        for f in range(r.fold):
            for i in range(s.inner):
                j = (f * s.channels + c) * s.inner + i
                sum_dy[c] += lane_dy[j]
                sum_dyd[c] += lane_dyd[j]


cdef inline void gradient_of_some_rows(
    const real* x,        # IN
    const real* dy,       # IN
    real* dx,             # OUT
    Py_ssize_t rows,
    Py_ssize_t width,
    Py_ssize_t length,    # how much of each row
    const real* center,   # IN  lane arrays
    const real* slope,    # IN
    const real* residue,  # IN
    const real* level,    # IN
    const real* scale,    # IN
) noexcept nogil:
    cdef Pack[real] m, q, r, k, a
    cdef Py_ssize_t row, i, j
    cdef int tail
    for j from 0 <= j < length by LANES:
        m = load(center + j)
        q = load(slope + j)
        r = load(residue + j)
        k = load(level + j)
        a = load(scale + j)
        if length - j >= LANES:
            for row in range(rows):
                i = row * width + j
                store(dx + i, ((load(dy + i) - k) - ((load(x + i) - m) * q + r)) * a)
        else:
            tail = length - j
            for row in range(rows):
                i = row * width + j
                store_some(
                    dx + i,
                    ((load_some(dy + i, tail) - k) - ((load_some(x + i, tail) - m) * q + r)) * a,
                    tail,
                )


cdef void gradient_of_rows(
    const real* x,        # IN
    const real* dy,       # IN
    real* dx,             # OUT
    Rows r,
    const real* center,   # IN  lane arrays
    const real* slope,    # IN
    const real* residue,  # IN
    const real* level,    # IN
    const real* scale,    # IN
) noexcept nogil:
    cdef Py_ssize_t row, i = r.count * r.width
    gradient_of_some_rows(
        x + i, dy + i, dx + i, 1, r.width, r.tail, center, slope, residue, level, scale
    )
    for row from (r.count - 1) // GROUP_ROWS * GROUP_ROWS >= row >= 0 by GROUP_ROWS:
        i = row * r.width
        gradient_of_some_rows(
            x + i, dy + i, dx + i, min(r.count - row, <Py_ssize_t>GROUP_ROWS), r.width, r.width,
            center, slope, residue, level, scale,
        )


# --------------------------------------------------------------------------------- coefficients


cdef void affine_coefficients(
    Py_ssize_t begin,
    Py_ssize_t end,
    const double* mean,      # IN
    const double* mean_low,  # IN, may be NULL
    const double* var,       # IN
    const double* gamma,     # IN, may be NULL
    const double* beta,      # IN, may be NULL
    double eps,
    real* center,            # OUT
    real* scale,             # OUT
    real* shift,             # OUT
) noexcept nogil:
    cdef Py_ssize_t c
    cdef double a, low
    for c in range(begin, end):
        a = (gamma[c] if gamma else 1) / sqrt(var[c] + eps)
        center[c] = <real>mean[c]
        low = (mean[c] - <double>center[c]) + (mean_low[c] if mean_low else 0)
        scale[c] = <real>a
        shift[c] = <real>((beta[c] if beta else 0) - low * a)


cdef void gradient_coefficients(
    Py_ssize_t begin,
    Py_ssize_t end,
    double count,
    const double* mean,      # IN
    const double* mean_low,  # IN, may be NULL
    const double* var,       # IN
    const double* gamma,     # IN, may be NULL
    double eps,
    bint fixed,              # the statistics are constants: dx = dy * scale
    double* dgamma,          # IN/OUT  the sum of dy * (x - mean), then dgamma
    const double* dbeta,     # IN
    real* center,            # OUT
    real* slope,             # OUT
    real* residue,           # OUT
    real* level,             # OUT
    real* scale,             # OUT
) noexcept nogil:
    cdef Py_ssize_t c
    cdef double rstd, q, lost, low
    for c in range(begin, end):
        rstd = 1 / sqrt(var[c] + eps)
        lost = mean_low[c] if mean_low else 0
        dgamma[c] = (dgamma[c] - lost * dbeta[c]) * rstd
        scale[c] = <real>((gamma[c] if gamma else 1) * rstd)
        if fixed:
            center[c] = residue[c] = 0
            continue
        q = rstd * (dgamma[c] / count)
        center[c] = <real>mean[c]
        low = (mean[c] - <double>center[c]) + lost
        level[c] = <real>(dbeta[c] / count)
        slope[c] = <real>q
        residue[c] = <real>((dbeta[c] / count - <double>level[c]) - low * q)


# -------------------------------------------------------------------------------- entry points


cdef class Scratch:
    """Memory for one call: float64-sized arrays, handed out one after the other."""

    cdef double* start
    cdef double* free

    def __cinit__(self, Py_ssize_t doubles):
        self.start = self.free = <double*>malloc(max(doubles, 1) * sizeof(double))
        if self.start == NULL:
            raise MemoryError(f"fastbn: no memory for {doubles} float64 of per-channel scratch")

    def __dealloc__(self):
        free(self.start)

    cdef double* take(self, Py_ssize_t length) noexcept nogil:
        cdef double* taken = self.free
        self.free += length
        return taken


cdef inline double* doubles(cnp.ndarray array):
    return <double*>cnp.PyArray_DATA(array) if array is not None else NULL


cdef enum:
    CHANNEL_ARRAYS = 5  # at most so many per-channel and lane arrays are in use in one call
    LANE_ARRAYS = 8


cdef Scratch scratch_for(Shape s):
    cdef Py_ssize_t lanes = 0 if s.inner >= LANES else rows_of(s).padded
    return Scratch(CHANNEL_ARRAYS * s.channels + LANE_ARRAYS * lanes)


cdef void normalize(
    const real* x, real* y, Shape s, Scratch scratch,
    const real* center, const real* scale, const real* shift,
) noexcept nogil:
    cdef Rows r
    cdef real* lane[3]
    cdef const real* channel[3]
    cdef int i
    if s.inner >= LANES:
        normalize_runs(x, y, s, 0, s.channels, center, scale, shift)
        return
    r = rows_of(s)
    channel[0], channel[1], channel[2] = center, scale, shift
    for i in range(3):
        lane[i] = <real*>scratch.take(r.padded)
        spread(channel[i], s, r, lane[i])
    normalize_rows(x, y, r, lane[0], lane[1], lane[2])


cdef inline void divide(
    double* m2,  # IN/OUT  the sum of squared deviations, then the variance
    Py_ssize_t begin,
    Py_ssize_t end,
    double count,
) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(begin, end):
        m2[c] /= count


cdef void run_forward(
    const real* x, real* y, Shape s, Scratch scratch,
    const double* gamma, const double* beta, double eps,
    double* mean, double* mean_low, double* var,
) noexcept nogil:
    cdef Moments m = Moments(mean, mean_low, var), lane
    cdef real* center = <real*>scratch.take(s.channels)
    cdef real* scale = <real*>scratch.take(s.channels)
    cdef real* shift = <real*>scratch.take(s.channels)
    cdef double count = <double>s.outer * s.inner
    cdef Py_ssize_t begin, end, padded
    if s.inner >= LANES:
        end = 0
        while end < s.channels:
            begin, end = end, min(end + tile_channels(s), s.channels)
            moments_of_runs(x, s, begin, end, m)
            divide(var, begin, end, count)
            affine_coefficients(
                begin, end, mean, mean_low, var, gamma, beta, eps, center, scale, shift
            )
            normalize_runs(x, y, s, begin, end, center, scale, shift)
    else:
        padded = rows_of(s).padded
        lane = Moments(scratch.take(padded), NULL, scratch.take(padded))
        moments_of_rows(x, s, rows_of(s), lane, scratch.take(padded), scratch.take(padded), m)
        divide(var, 0, s.channels, count)
        affine_coefficients(
            0, s.channels, mean, mean_low, var, gamma, beta, eps, center, scale, shift
        )
        normalize(x, y, s, scratch, center, scale, shift)


cdef void run_inference(
    const real* x, real* y, Shape s, Scratch scratch,
    const double* gamma, const double* beta, double eps, const double* mean, const double* var,
) noexcept nogil:
    cdef real* center = <real*>scratch.take(s.channels)
    cdef real* scale = <real*>scratch.take(s.channels)
    cdef real* shift = <real*>scratch.take(s.channels)
    affine_coefficients(0, s.channels, mean, NULL, var, gamma, beta, eps, center, scale, shift)
    normalize(x, y, s, scratch, center, scale, shift)


cdef void run_backward(
    const real* x, const real* dy, real* dx, Shape s, Scratch scratch,
    const double* gamma, double eps,
    const double* mean, const double* mean_low, const double* var, bint fixed,
    double* dgamma, double* dbeta,
) noexcept nogil:
    cdef real* center = <real*>scratch.take(s.channels)
    cdef real* slope = <real*>scratch.take(s.channels)
    cdef real* residue = <real*>scratch.take(s.channels)
    cdef real* level = <real*>scratch.take(s.channels)
    cdef real* scale = <real*>scratch.take(s.channels)
    cdef double count = <double>s.outer * s.inner
    cdef Py_ssize_t begin, end, c, i
    cdef double* lane_mean
    cdef real* lane[5]
    cdef const real* channel[5]
    cdef Rows r
    if s.inner >= LANES:
        end = 0
        while end < s.channels:
            begin, end = end, min(end + tile_channels(s), s.channels)
            sum_gradient_of_runs(x, dy, s, begin, end, mean, dbeta, dgamma)
            gradient_coefficients(
                begin, end, count, mean, mean_low, var, gamma, eps, fixed, dgamma, dbeta,
                center, slope, residue, level, scale,
            )
            if fixed:
                normalize_runs(dy, dx, s, begin, end, center, scale, residue)
            else:
                gradient_of_runs(
                    x, dy, dx, s, begin, end, center, slope, residue, level, scale
                )
    else:
        r = rows_of(s)
        lane_mean = scratch.take(r.padded)
        spread(mean, s, r, lane_mean)
        sum_gradient_of_rows(
            x, dy, s, r, lane_mean, scratch.take(r.padded), scratch.take(r.padded),
            dbeta, dgamma,
        )
        gradient_coefficients(
            0, s.channels, count, mean, mean_low, var, gamma, eps, fixed, dgamma, dbeta,
            center, slope, residue, level, scale,
        )
        if fixed:
            normalize(dy, dx, s, scratch, center, scale, residue)
        else:
            channel[0], channel[1], channel[2] = center, slope, residue
            channel[3], channel[4] = level, scale
            for i in range(5):
                lane[i] = <real*>scratch.take(r.padded)
                spread(channel[i], s, r, lane[i])
            gradient_of_rows(x, dy, dx, r, lane[0], lane[1], lane[2], lane[3], lane[4])


def forward(
    cnp.ndarray x not None, cnp.ndarray y not None,
    Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner,
    cnp.ndarray gamma, cnp.ndarray beta, double eps,
    cnp.ndarray mean not None, cnp.ndarray mean_low not None, cnp.ndarray var not None,
):
    """Normalise by the minibatch's own statistics: y, mean, mean_low and var are OUT.

    The caller has checked everything: x and y are float32 or both float64, aligned, of the same
    memory order and outer * channels * inner > 0 values; the others are float64, contiguous, one
    value per channel (gamma and beta may be None). So in all entry points.
    """
    cdef Shape s = Shape(outer, channels, inner)
    cdef Scratch scratch = scratch_for(s)
    cdef void* px = cnp.PyArray_DATA(x)
    cdef void* py = cnp.PyArray_DATA(y)
    cdef bint single = cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT32
    cdef double* g = doubles(gamma)
    cdef double* b = doubles(beta)
    cdef double* m = doubles(mean)
    cdef double* low = doubles(mean_low)
    cdef double* v = doubles(var)
    with nogil:
        if single:
            run_forward(<const float*>px, <float*>py, s, scratch, g, b, eps, m, low, v)
        else:
            run_forward(<const double*>px, <double*>py, s, scratch, g, b, eps, m, low, v)


def inference(
    cnp.ndarray x not None, cnp.ndarray y not None,
    Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner,
    cnp.ndarray gamma, cnp.ndarray beta, double eps,
    cnp.ndarray mean not None, cnp.ndarray var not None,
):
    """Normalise by given statistics: y is OUT."""
    cdef Shape s = Shape(outer, channels, inner)
    cdef Scratch scratch = scratch_for(s)
    cdef void* px = cnp.PyArray_DATA(x)
    cdef void* py = cnp.PyArray_DATA(y)
    cdef bint single = cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT32
    cdef double* g = doubles(gamma)
    cdef double* b = doubles(beta)
    cdef double* m = doubles(mean)
    cdef double* v = doubles(var)
    with nogil:
        if single:
            run_inference(<const float*>px, <float*>py, s, scratch, g, b, eps, m, v)
        else:
            run_inference(<const double*>px, <double*>py, s, scratch, g, b, eps, m, v)


def backward(
    cnp.ndarray x not None, cnp.ndarray dy not None, cnp.ndarray dx not None,
    Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner,
    cnp.ndarray gamma, double eps,
    cnp.ndarray mean not None, cnp.ndarray mean_low, cnp.ndarray var not None,
    bint fixed,
    cnp.ndarray dgamma not None, cnp.ndarray dbeta not None,
):
    """Gradients of forward, or of inference where the statistics are `fixed`.

    mean_low may be None. dx, dgamma and dbeta are OUT.
    """
    cdef Shape s = Shape(outer, channels, inner)
    cdef Scratch scratch = scratch_for(s)
    cdef void* px = cnp.PyArray_DATA(x)
    cdef void* pg = cnp.PyArray_DATA(dy)
    cdef void* pd = cnp.PyArray_DATA(dx)
    cdef bint single = cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT32
    cdef double* g = doubles(gamma)
    cdef double* m = doubles(mean)
    cdef double* low = doubles(mean_low)
    cdef double* v = doubles(var)
    cdef double* dg = doubles(dgamma)
    cdef double* db = doubles(dbeta)
    with nogil:
        if single:
            run_backward(
                <const float*>px, <const float*>pg, <float*>pd, s, scratch, g, eps,
                m, low, v, fixed, dg, db,
            )
        else:
            run_backward(
                <const double*>px, <const double*>pg, <double*>pd, s, scratch, g, eps,
                m, low, v, fixed, dg, db,
            )
