"""The kernels: statistics, normalisation and gradients over one contiguous block of memory.

The shape. Every array is (outer, channels, inner), C-contiguous: NCHW is (N, C, H*W), NHWC is
(N*H*W, C, 1), the course's (n_h, m) is (1, n_h, m). Two ways of walking it:

- runs (inner >= 16): the values of one channel lie in runs of `inner`, and lanes go along the
  run. The channels are taken a tile at a time, so that a tile that fits in the cache is fetched
  from memory once although it is read twice.
- rows (inner < 16): lanes go across the channels. A row is `fold` times channels * inner values,
  so that a few channels fill the lanes as well; what the lanes of one channel gathered is merged
  at the end.

Either way the work is done on packs of 16 lanes that lie a stride apart and share their
coefficients: the four functions of the section "packs" are all the arithmetic there is. The second
pass over what the first has read walks backwards without a break, down to the packs of a run: what
was touched last is still in the cache, and the hardware fetches ahead only along straight lines.

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

In signatures IN marks what is read, OUT what is written. x, y, dy, dx hold outer * channels *
inner values; y may be x, and dx may be x or dy. Per-channel arrays are float64. Only coefficients
have the precision of x, and come as one table: row SCALE holds the scale of each channel, and so
on.

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
    Pack[T] load[T](const T* p, int lanes)
    Pack[double] load_wide[T](const T* p, int lanes)
    void store[T](T* p, Pack[T] a, int lanes)
    Pack[double] keep_first(Pack[double] a, int lanes)
    double sum_lanes(Pack[double] a)

cdef enum:
    LANES = 16
    BLOCK = 4096             # values of one channel in a block of runs
    BLOCK_ROWS = 128         # rows in a block of rows
    SUM_ROWS = 4             # rows that are summed side by side
    TILE = 2048              # contiguous values that a tile of channels has at least
    MAX_TILE_CHANNELS = 128  # = TILE / LANES
    MIN_WIDTH = 64           # values that a row has at least, where the array has as many
    PANEL = 4096             # values of a row that are taken at once, at least

# The rows of a table of coefficients; normalisation needs the first three.
cdef enum:
    CENTER
    SCALE
    SHIFT
    SLOPE
    LEVEL
    TABLE
    RESIDUE = SHIFT

cdef struct Shape:
    Py_ssize_t outer
    Py_ssize_t channels
    Py_ssize_t inner

cdef struct Statistics:
    double* mean
    double* mean_low   # what mean lost in rounding; NULL: nothing
    double* var        # while sums are gathered: of squared deviations


# ----------------------------------------------------------------------------------------- packs
# `count` packs, each `stride` values after the one before; of each only the first `lanes` exist.


cdef inline void sum_packs(
    const real* x, Py_ssize_t count, Py_ssize_t stride, int lanes,  # IN
    Pack[double] k,
    Pack[double]* sum_d, Pack[double]* sum_dd,                      # IN/OUT
) noexcept nogil:
    cdef Pack[double] a = sum_d[0], b = sum_dd[0], d
    cdef Py_ssize_t i
    for i in range(count):
        d = load_wide(x + i * stride, lanes) - k
        a = a + d
        b = b + d * d
    sum_d[0], sum_dd[0] = a, b


cdef inline void normalize_packs(
    const real* x, real* y, Py_ssize_t count, Py_ssize_t stride, int lanes,  # IN, OUT
    Pack[real] center, Pack[real] scale, Pack[real] shift,
) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(count - 1, -1, -1):
        store(y + i * stride, (load(x + i * stride, lanes) - center) * scale + shift, lanes)


cdef inline void sum_gradient_packs(
    const real* x, const real* dy, Py_ssize_t count, Py_ssize_t stride, int lanes,  # IN
    Pack[double] mean,
    Pack[double]* sum_dy, Pack[double]* sum_dyd,                                    # IN/OUT
) noexcept nogil:
    cdef Pack[double] a = sum_dy[0], b = sum_dyd[0], g
    cdef Py_ssize_t i
    for i in range(count):
        g = load_wide(dy + i * stride, lanes)
        a = a + g
        b = b + g * (load_wide(x + i * stride, lanes) - mean)
    sum_dy[0], sum_dyd[0] = a, b


cdef inline void gradient_packs(
    const real* x, const real* dy, real* dx,                   # IN, IN, OUT
    Py_ssize_t count, Py_ssize_t stride, int lanes,
    Pack[real] center, Pack[real] scale, Pack[real] residue, Pack[real] slope, Pack[real] level,
) noexcept nogil:
    cdef Pack[real] g, d
    cdef Py_ssize_t i
    for i in range(count - 1, -1, -1):
        g = load(dy + i * stride, lanes) - level
        d = load(x + i * stride, lanes) - center
        store(dx + i * stride, (g - (d * slope + residue)) * scale, lanes)


# ------------------------------------------------------------------------------------ statistics


cdef inline void merge(
    double* mean, double* m2, double n, double block_mean, double block_m2, double block_n
) noexcept nogil:
    """Take a block into the moments of n values before it (Chan's formula)."""
    cdef double delta = block_mean - mean[0]
    cdef double weight = block_n / (n + block_n)
    mean[0] += delta * weight
    m2[0] += block_m2 + delta * delta * (n * weight)


cdef inline void finish(Statistics s, Py_ssize_t c, double origin, double count) noexcept nogil:
    """Turn a distance from the origin into a mean and what it loses in rounding; m2 into var."""
    cdef double distance = s.mean[c]
    cdef double mean = origin + distance
    cdef double part = mean - origin
    s.mean_low[c] = (origin - (mean - part)) + (distance - part)
    s.mean[c] = mean
    s.var[c] = 0 if s.var[c] < 0 else s.var[c] / count  # below 0 by rounding; a NaN stays


cdef void affine_coefficients(
    Py_ssize_t begin, Py_ssize_t end, Statistics s,                # IN
    const double* gamma, const double* beta, double eps,           # IN, may be NULL
    real* table, Py_ssize_t row,                                   # OUT
) noexcept nogil:
    cdef Py_ssize_t c
    cdef double scale, low
    for c in range(begin, end):
        scale = (gamma[c] if gamma else 1) / sqrt(s.var[c] + eps)
        table[CENTER * row + c] = <real>s.mean[c]
        low = s.mean[c] - <double>table[CENTER * row + c] + (s.mean_low[c] if s.mean_low else 0)
        table[SCALE * row + c] = <real>scale
        table[SHIFT * row + c] = <real>((beta[c] if beta else 0) - low * scale)


cdef void gradient_coefficients(
    Py_ssize_t begin, Py_ssize_t end, Statistics s, double count,  # IN
    const double* gamma, double eps, bint fixed,                   # IN, may be NULL
    double* dgamma,             # IN: the sum of dy * (x - mean), OUT: dgamma
    const double* dbeta,        # IN
    real* table, Py_ssize_t row,                                   # OUT
) noexcept nogil:
    cdef Py_ssize_t c
    cdef double rstd, slope, level, lost, low
    for c in range(begin, end):
        rstd = 1 / sqrt(s.var[c] + eps)
        lost = s.mean_low[c] if s.mean_low else 0
        dgamma[c] = (dgamma[c] - lost * dbeta[c]) * rstd
        slope = rstd * (dgamma[c] / count)
        level = dbeta[c] / count
        table[CENTER * row + c] = <real>s.mean[c]
        low = s.mean[c] - <double>table[CENTER * row + c] + lost
        table[SCALE * row + c] = <real>((gamma[c] if gamma else 1) * rstd)
        table[SLOPE * row + c] = <real>slope
        table[LEVEL * row + c] = <real>level
        table[RESIDUE * row + c] = <real>(level - <double>table[LEVEL * row + c] - low * slope)
    if fixed:  # dx = (dy - 0) * scale + 0: normalize_packs does that
        for c in range(begin, end):
            table[CENTER * row + c] = table[SHIFT * row + c] = 0


# ------------------------------------------------------------------------------------------ runs


cdef inline Py_ssize_t rows_in_block(Shape s) noexcept nogil:
    return max(1, BLOCK // s.inner)


cdef inline Py_ssize_t tile_channels(Shape s) noexcept nogil:
    return (TILE + s.inner - 1) // s.inner


cdef void moments_of_runs(
    const real* x, Shape s, Py_ssize_t begin, Py_ssize_t end,  # IN; the tile: begin to end
    Statistics stats,                                          # OUT
) noexcept nogil:
    cdef Pack[double] sum_d[MAX_TILE_CHANNELS]
    cdef Pack[double] sum_dd[MAX_TILE_CHANNELS]
    cdef Pack[double] k
    cdef Py_ssize_t row, first_row, end_row = 0, first, piece, c, t
    cdef Py_ssize_t stride = s.channels * s.inner
    cdef double n = 0, block_n, a
    cdef int tail
    cdef const real* block
    cdef const real* run
    for c in range(begin, end):
        stats.mean[c] = stats.var[c] = 0
    while end_row < s.outer:
        first_row, end_row = end_row, min(end_row + rows_in_block(s), s.outer)
        for first from 0 <= first < s.inner by BLOCK:
            piece = min(s.inner - first, <Py_ssize_t>BLOCK)
            tail = piece % LANES
            block = x + first_row * stride + first
            for t in range(end - begin):
                sum_d[t] = sum_dd[t] = fill(0.0)
            for row in range(first_row, end_row):
                for c in range(begin, end):
                    t = c - begin
                    run = x + row * stride + c * s.inner + first
                    k = fill(<double>block[c * s.inner])
                    sum_packs(run, piece // LANES, LANES, LANES, k, &sum_d[t], &sum_dd[t])
                    if tail:
                        k = keep_first(k, tail)
                        run += piece - tail
                        sum_packs(run, 1, LANES, tail, k, &sum_d[t], &sum_dd[t])
            block_n = <double>piece * (end_row - first_row)
            for c in range(begin, end):
                a = sum_lanes(sum_d[c - begin])
                merge(
                    &stats.mean[c], &stats.var[c], n,
                    (<double>block[c * s.inner] - <double>x[c * s.inner]) + a / block_n,
                    sum_lanes(sum_dd[c - begin]) - a * a / block_n, block_n,
                )
            n += block_n
    for c in range(begin, end):
        finish(stats, c, x[c * s.inner], n)


cdef void normalize_runs(
    const real* x, real* y, Shape s, Py_ssize_t begin, Py_ssize_t end,  # IN, OUT; the tile
    const real* table,                                                  # IN
) noexcept nogil:
    cdef Pack[real] center, scale, shift
    cdef Py_ssize_t row, c, i, whole = s.inner // LANES
    cdef int tail = s.inner % LANES
    for row in range(s.outer - 1, -1, -1):
        for c in range(end - 1, begin - 1, -1):
            center = fill(table[CENTER * s.channels + c])
            scale = fill(table[SCALE * s.channels + c])
            shift = fill(table[SHIFT * s.channels + c])
            i = (row * s.channels + c) * s.inner + whole * LANES
            if tail:
                normalize_packs(x + i, y + i, 1, LANES, tail, center, scale, shift)
            i -= whole * LANES
            normalize_packs(x + i, y + i, whole, LANES, LANES, center, scale, shift)


cdef void sum_gradient_of_runs(
    const real* x, const real* dy, Shape s, Py_ssize_t begin, Py_ssize_t end,  # IN; the tile
    const double* mean,                                                        # IN
    double* sum_dy, double* sum_dyd,                                           # OUT
) noexcept nogil:
    cdef Pack[double] a[MAX_TILE_CHANNELS]
    cdef Pack[double] b[MAX_TILE_CHANNELS]
    cdef Pack[double] m
    cdef Py_ssize_t row, first_row, end_row = 0, first, piece, c, t, i
    cdef int tail
    for c in range(begin, end):
        sum_dy[c] = sum_dyd[c] = 0
    while end_row < s.outer:
        first_row, end_row = end_row, min(end_row + rows_in_block(s), s.outer)
        for first from 0 <= first < s.inner by BLOCK:
            piece = min(s.inner - first, <Py_ssize_t>BLOCK)
            tail = piece % LANES
            for t in range(end - begin):
                a[t] = b[t] = fill(0.0)
            for row in range(first_row, end_row):
                for c in range(begin, end):
                    t = c - begin
                    m = fill(mean[c])
                    i = (row * s.channels + c) * s.inner + first
                    sum_gradient_packs(
                        x + i, dy + i, piece // LANES, LANES, LANES, m, &a[t], &b[t]
                    )
                    if tail:
                        i += piece - tail
                        sum_gradient_packs(x + i, dy + i, 1, LANES, tail, m, &a[t], &b[t])
            for c in range(begin, end):
                sum_dy[c] += sum_lanes(a[c - begin])
                sum_dyd[c] += sum_lanes(b[c - begin])


cdef void gradient_of_runs(
    const real* x, const real* dy, real* dx,           # IN, IN, OUT
    Shape s, Py_ssize_t begin, Py_ssize_t end,         # the tile
    const real* table,                                 # IN
) noexcept nogil:
    cdef Pack[real] center, scale, residue, slope, level
    cdef Py_ssize_t row, c, i, whole = s.inner // LANES
    cdef int tail = s.inner % LANES
    for row in range(s.outer - 1, -1, -1):
        for c in range(end - 1, begin - 1, -1):
            center = fill(table[CENTER * s.channels + c])
            scale = fill(table[SCALE * s.channels + c])
            residue = fill(table[RESIDUE * s.channels + c])
            slope = fill(table[SLOPE * s.channels + c])
            level = fill(table[LEVEL * s.channels + c])
            i = (row * s.channels + c) * s.inner + whole * LANES
            if tail:
                gradient_packs(
                    x + i, dy + i, dx + i, 1, LANES, tail, center, scale, residue, slope, level
                )
            i -= whole * LANES
            gradient_packs(
                x + i, dy + i, dx + i, whole, LANES, LANES, center, scale, residue, slope, level
            )


# ------------------------------------------------------------------------------------------ rows


cdef struct Rows:
    Py_ssize_t fold
    Py_ssize_t stride  # from one row to the next: fold * channels * inner, of the whole array
    Py_ssize_t width   # values in a row, here: less than stride in a panel of wide rows
    Py_ssize_t count   # full rows
    Py_ssize_t tail    # values in the shorter row behind them, if any
    Py_ssize_t padded  # width rounded up to full packs: the length of a lane array


cdef Rows rows_of(Shape s, Py_ssize_t channels) noexcept nogil:
    """Describe the rows of some of the channels: of all, or of a panel of them."""
    cdef Rows r
    cdef Py_ssize_t narrow = s.channels * s.inner
    r.fold = max(1, min(MIN_WIDTH // narrow, s.outer))
    r.stride = r.fold * narrow
    r.width = r.fold * channels * s.inner
    r.count = s.outer // r.fold
    r.tail = (s.outer - r.count * r.fold) * channels * s.inner
    r.padded = (r.width + LANES - 1) // LANES * LANES
    return r


cdef inline Py_ssize_t panel_channels(Shape s) noexcept nogil:
    """Return how many channels to take at once, so that the lane arrays stay in the cache."""
    return min(s.channels, (PANEL + s.inner - 1) // s.inner)


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
    const real* x, Shape s, Rows r,  # IN
    double* lanes,                   # scratch, four lane arrays
    Statistics stats,                # OUT
) noexcept nogil:
    cdef double* mean = lanes
    cdef double* m2 = lanes + r.padded
    cdef double* sum_d = lanes + 2 * r.padded
    cdef double* sum_dd = lanes + 3 * r.padded
    cdef Pack[double] a, b
    cdef Py_ssize_t first_row, rows, row, f, c, i, j
    cdef double n, block_n
    cdef int present
    cdef const real* block
    for j in range(r.width):
        mean[j] = m2[j] = 0
    for first_row from 0 <= first_row < r.count by BLOCK_ROWS:
        rows = min(r.count - first_row, <Py_ssize_t>BLOCK_ROWS)
        block = x + first_row * r.stride
        for j in range(r.padded):
            sum_d[j] = sum_dd[j] = 0
        for row from 0 <= row < rows by SUM_ROWS:
            for j from 0 <= j < r.width by LANES:
                present = min(r.width - j, <Py_ssize_t>LANES)
                a = load(<const double*>sum_d + j, LANES)
                b = load(<const double*>sum_dd + j, LANES)
                sum_packs(
                    block + row * r.stride + j, min(rows - row, <Py_ssize_t>SUM_ROWS), r.stride,
                    present, load_wide(block + j, present), &a, &b,
                )
                store(sum_d + j, a, LANES)
                store(sum_dd + j, b, LANES)
        block_n = rows
        for j in range(r.width):
            merge(
                &mean[j], &m2[j], first_row,
                (<double>block[j] - <double>x[j]) + sum_d[j] / block_n,
                sum_dd[j] - sum_d[j] * sum_d[j] / block_n, block_n,
            )
    block = x + r.count * r.stride
    for j in range(r.tail):
        merge(&mean[j], &m2[j], r.count, <double>block[j] - <double>x[j], 0, 1)
    if r.width == s.channels:  # a lane is a channel
        for c in range(s.channels):
            stats.mean[c], stats.var[c] = mean[c], m2[c]
            finish(stats, c, x[c], r.count)
        return
    for c in range(s.channels):
        stats.mean[c] = stats.var[c] = n = 0
        for f in range(r.fold):
            for i in range(s.inner):
                j = (f * s.channels + c) * s.inner + i
                block_n = r.count + (j < r.tail)
                merge(
                    &stats.mean[c], &stats.var[c], n,
                    (<double>x[j] - <double>x[c * s.inner]) + mean[j], m2[j], block_n,
                )
                n += block_n
        finish(stats, c, x[c * s.inner], n)


cdef inline void normalize_row(
    const real* x, real* y, Py_ssize_t length,  # IN, OUT
    const real* lanes, Py_ssize_t padded,       # IN, a table of lanes
) noexcept nogil:
    cdef Py_ssize_t j
    for j from (length - 1) // LANES * LANES >= j >= 0 by LANES:
        normalize_packs(
            x + j, y + j, 1, LANES, min(length - j, <Py_ssize_t>LANES),
            load(lanes + CENTER * padded + j, LANES),
            load(lanes + SCALE * padded + j, LANES),
            load(lanes + SHIFT * padded + j, LANES),
        )


cdef void normalize_rows(
    const real* x, real* y, Shape s, Rows r,  # IN, OUT
    const real* table,                        # IN
    real* lanes,                              # scratch, a table of lanes
) noexcept nogil:
    cdef Py_ssize_t row, i = r.count * r.stride
    for row in range(SHIFT + 1):
        spread(table + row * s.channels, s, r, lanes + row * r.padded)
    normalize_row(x + i, y + i, r.tail, lanes, r.padded)
    for row in range(r.count):
        i -= r.stride
        normalize_row(x + i, y + i, r.width, lanes, r.padded)


cdef inline void sum_gradient_of_block(
    const real* x, const real* dy, Rows r, Py_ssize_t rows, Py_ssize_t length,  # IN; of each row
    double* lanes,  # five lane arrays: mean is IN, sums over all blocks IN/OUT, of this one scratch
) noexcept nogil:
    cdef double* total_dy = lanes + r.padded
    cdef double* total_dyd = lanes + 2 * r.padded
    cdef double* sum_dy = lanes + 3 * r.padded
    cdef double* sum_dyd = lanes + 4 * r.padded
    cdef Pack[double] a, b
    cdef Py_ssize_t row, i, j
    for j in range(r.padded):
        sum_dy[j] = sum_dyd[j] = 0
    for row from 0 <= row < rows by SUM_ROWS:
        for j from 0 <= j < length by LANES:
            i = row * r.stride + j
            a = load(<const double*>sum_dy + j, LANES)
            b = load(<const double*>sum_dyd + j, LANES)
            sum_gradient_packs(
                x + i, dy + i, min(rows - row, <Py_ssize_t>SUM_ROWS), r.stride,
                min(length - j, <Py_ssize_t>LANES), load(<const double*>lanes + j, LANES), &a, &b,
            )
            store(sum_dy + j, a, LANES)
            store(sum_dyd + j, b, LANES)
    for j in range(r.padded):
        total_dy[j] += sum_dy[j]
        total_dyd[j] += sum_dyd[j]


cdef void sum_gradient_of_rows(
    const real* x, const real* dy, Shape s, Rows r, const double* mean,  # IN
    double* lanes,                                                       # scratch, five arrays
    double* sum_dy, double* sum_dyd,                                     # OUT
) noexcept nogil:
    cdef Py_ssize_t row, i, j, f, c
    spread(mean, s, r, lanes)
    for j in range(r.padded, 3 * r.padded):
        lanes[j] = 0
    for row from 0 <= row < r.count by BLOCK_ROWS:
        i = row * r.stride
        j = min(r.count - row, <Py_ssize_t>BLOCK_ROWS)
        sum_gradient_of_block(x + i, dy + i, r, j, r.width, lanes)
    i = r.count * r.stride
    sum_gradient_of_block(x + i, dy + i, r, 1, r.tail, lanes)
    for c in range(s.channels):
        sum_dy[c] = sum_dyd[c] = 0
    for f in range(r.fold):
        for c in range(s.channels):
            for i in range(s.inner):
                j = (f * s.channels + c) * s.inner + i
                sum_dy[c] += lanes[r.padded + j]
                sum_dyd[c] += lanes[2 * r.padded + j]


cdef inline void gradient_of_row(
    const real* x, const real* dy, real* dx, Py_ssize_t length,  # IN, IN, OUT
    const real* lanes, Py_ssize_t padded,                        # IN, a table of lanes
) noexcept nogil:
    cdef Py_ssize_t j
    for j from (length - 1) // LANES * LANES >= j >= 0 by LANES:
        gradient_packs(
            x + j, dy + j, dx + j, 1, LANES, min(length - j, <Py_ssize_t>LANES),
            load(lanes + CENTER * padded + j, LANES),
            load(lanes + SCALE * padded + j, LANES),
            load(lanes + RESIDUE * padded + j, LANES),
            load(lanes + SLOPE * padded + j, LANES),
            load(lanes + LEVEL * padded + j, LANES),
        )


cdef void gradient_of_rows(
    const real* x, const real* dy, real* dx, Shape s, Rows r,  # IN, IN, OUT
    const real* table,                                         # IN
    real* lanes,                                               # scratch, a table of lanes
) noexcept nogil:
    cdef Py_ssize_t row, i = r.count * r.stride
    for row in range(TABLE):
        spread(table + row * s.channels, s, r, lanes + row * r.padded)
    gradient_of_row(x + i, dy + i, dx + i, r.tail, lanes, r.padded)
    for row in range(r.count):
        i -= r.stride
        gradient_of_row(x + i, dy + i, dx + i, r.width, lanes, r.padded)


# ---------------------------------------------------------------------------------- entry points


cdef inline const double* at(const double* values, Py_ssize_t begin) noexcept nogil:
    return values + begin if values else NULL


cdef inline Statistics part_of(Statistics s, Py_ssize_t begin) noexcept nogil:
    return Statistics(s.mean + begin, <double*>at(s.mean_low, begin), s.var + begin)


cdef void run_forward(
    const real* x, real* y, Shape s, const double* gamma, const double* beta, double eps,
    Statistics stats, double* scratch,
) noexcept nogil:
    cdef real* table = <real*>scratch
    cdef double* lanes = scratch + TABLE * panel_channels(s)
    cdef Py_ssize_t begin, i, end = 0
    cdef Statistics part
    cdef Shape p = s
    cdef Rows r
    while end < s.channels:
        if s.inner >= LANES:
            begin, end = end, min(end + tile_channels(s), s.channels)
            moments_of_runs(x, s, begin, end, stats)
            affine_coefficients(begin, end, stats, gamma, beta, eps, table, s.channels)
            normalize_runs(x, y, s, begin, end, table)
        else:
            begin, end = end, min(end + panel_channels(s), s.channels)
            p.channels = end - begin
            part, r, i = part_of(stats, begin), rows_of(s, p.channels), begin * s.inner
            moments_of_rows(x + i, p, r, lanes, part)
            affine_coefficients(
                0, p.channels, part, at(gamma, begin), at(beta, begin), eps, table, p.channels
            )
            normalize_rows(x + i, y + i, p, r, table, <real*>lanes)


cdef void run_inference(
    const real* x, real* y, Shape s, const double* gamma, const double* beta, double eps,
    Statistics stats, double* scratch,
) noexcept nogil:
    cdef real* table = <real*>scratch
    cdef double* lanes = scratch + TABLE * panel_channels(s)
    cdef Py_ssize_t begin, i, end = 0
    cdef Shape p = s
    if s.inner >= LANES:
        affine_coefficients(0, s.channels, stats, gamma, beta, eps, table, s.channels)
        normalize_runs(x, y, s, 0, s.channels, table)
        return
    while end < s.channels:
        begin, end = end, min(end + panel_channels(s), s.channels)
        p.channels, i = end - begin, begin * s.inner
        affine_coefficients(
            0, p.channels, part_of(stats, begin), at(gamma, begin), at(beta, begin), eps,
            table, p.channels,
        )
        normalize_rows(x + i, y + i, p, rows_of(s, p.channels), table, <real*>lanes)


cdef void run_backward(
    const real* x, const real* dy, real* dx, Shape s, const double* gamma, double eps,
    Statistics stats, bint fixed, double* dgamma, double* dbeta, double* scratch,
) noexcept nogil:
    cdef real* table = <real*>scratch
    cdef double* lanes = scratch + TABLE * panel_channels(s)
    cdef double count = <double>s.outer * s.inner
    cdef Py_ssize_t begin, i, end = 0
    cdef Statistics part
    cdef Shape p = s
    cdef Rows r
    while end < s.channels:
        if s.inner >= LANES:
            begin, end = end, min(end + tile_channels(s), s.channels)
            sum_gradient_of_runs(x, dy, s, begin, end, stats.mean, dbeta, dgamma)
            gradient_coefficients(
                begin, end, stats, count, gamma, eps, fixed, dgamma, dbeta, table, s.channels
            )
            if fixed:
                normalize_runs(dy, dx, s, begin, end, table)
            else:
                gradient_of_runs(x, dy, dx, s, begin, end, table)
        else:
            begin, end = end, min(end + panel_channels(s), s.channels)
            p.channels = end - begin
            part, r, i = part_of(stats, begin), rows_of(s, p.channels), begin * s.inner
            sum_gradient_of_rows(
                x + i, dy + i, p, r, part.mean, lanes, dbeta + begin, dgamma + begin
            )
            gradient_coefficients(
                0, p.channels, part, count, at(gamma, begin), eps, fixed,
                dgamma + begin, dbeta + begin, table, p.channels,
            )
            if fixed:
                normalize_rows(dy + i, dx + i, p, r, table, <real*>lanes)
            else:
                gradient_of_rows(x + i, dy + i, dx + i, p, r, table, <real*>lanes)


cdef double* scratch_for(Shape s) except NULL:
    """Allocate a table of coefficients, and for a panel of rows a table of lanes."""
    cdef Py_ssize_t length = s.channels
    if s.inner < LANES:
        length = panel_channels(s) + rows_of(s, panel_channels(s)).padded
    cdef double* scratch = <double*>malloc(TABLE * length * sizeof(double))
    if scratch == NULL:
        raise MemoryError(f"fastbn: no memory for the coefficients of {s.channels} channels")
    return scratch


cdef inline void* data(cnp.ndarray array):
    return cnp.PyArray_DATA(array) if array is not None else NULL


cdef inline bint is_single(cnp.ndarray array):
    return cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT32


def forward(
    cnp.ndarray x not None, cnp.ndarray y not None,
    Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner,
    cnp.ndarray gamma, cnp.ndarray beta, double eps,
    cnp.ndarray mean not None, cnp.ndarray mean_low not None, cnp.ndarray var not None,
):
    """Normalise by the minibatch's own statistics: y, mean, mean_low and var are OUT.

    The caller has checked everything: x and y are both float32 or both float64, aligned, of the
    same memory order and outer * channels * inner > 0 values; the others are float64, contiguous,
    one value per channel (gamma and beta may be None). So in all entry points.
    """
    cdef Shape s = Shape(outer, channels, inner)
    cdef Statistics stats = Statistics(<double*>data(mean), <double*>data(mean_low),
                                       <double*>data(var))
    cdef double* g = <double*>data(gamma)
    cdef double* b = <double*>data(beta)
    cdef void* px = data(x)
    cdef void* py = data(y)
    cdef bint single = is_single(x)
    cdef double* scratch = scratch_for(s)
    with nogil:
        if single:
            run_forward(<const float*>px, <float*>py, s, g, b, eps, stats, scratch)
        else:
            run_forward(<const double*>px, <double*>py, s, g, b, eps, stats, scratch)
        free(scratch)


def inference(
    cnp.ndarray x not None, cnp.ndarray y not None,
    Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner,
    cnp.ndarray gamma, cnp.ndarray beta, double eps,
    cnp.ndarray mean not None, cnp.ndarray var not None,
):
    """Normalise by given statistics: y is OUT."""
    cdef Shape s = Shape(outer, channels, inner)
    cdef Statistics stats = Statistics(<double*>data(mean), NULL, <double*>data(var))
    cdef double* g = <double*>data(gamma)
    cdef double* b = <double*>data(beta)
    cdef void* px = data(x)
    cdef void* py = data(y)
    cdef bint single = is_single(x)
    cdef double* scratch = scratch_for(s)
    with nogil:
        if single:
            run_inference(<const float*>px, <float*>py, s, g, b, eps, stats, scratch)
        else:
            run_inference(<const double*>px, <double*>py, s, g, b, eps, stats, scratch)
        free(scratch)


def backward(
    cnp.ndarray x not None, cnp.ndarray dy not None, cnp.ndarray dx not None,
    Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner,
    cnp.ndarray gamma, double eps,
    cnp.ndarray mean not None, cnp.ndarray mean_low, cnp.ndarray var not None, bint fixed,
    cnp.ndarray dgamma not None, cnp.ndarray dbeta not None,
):
    """Gradients of forward, or of inference where the statistics are `fixed`.

    mean_low may be None. dx, dgamma and dbeta are OUT.
    """
    cdef Shape s = Shape(outer, channels, inner)
    cdef Statistics stats = Statistics(<double*>data(mean), <double*>data(mean_low),
                                       <double*>data(var))
    cdef double* g = <double*>data(gamma)
    cdef double* dg = <double*>data(dgamma)
    cdef double* db = <double*>data(dbeta)
    cdef void* px = data(x)
    cdef void* pg = data(dy)
    cdef void* pd = data(dx)
    cdef bint single = is_single(x)
    cdef double* scratch = scratch_for(s)
    with nogil:
        if single:
            run_backward(<const float*>px, <const float*>pg, <float*>pd, s, g, eps, stats, fixed,
                         dg, db, scratch)
        else:
            run_backward(<const double*>px, <const double*>pg, <double*>pd, s, g, eps, stats,
                         fixed, dg, db, scratch)
        free(scratch)
