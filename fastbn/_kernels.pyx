"""The kernels: statistics, normalisation and gradients over one contiguous block of memory.

The shape. Every array is (outer, channels, inner), C-contiguous: NCHW is (N, C, H*W), NHWC is
(N*H*W, C, 1), the course's (n_h, m) is (1, n_h, m). Two ways of walking it:

- runs (inner >= 16): the values of one channel lie in runs of `inner`, and lanes go along the
  run. The channels are taken a tile at a time, so that a tile that fits in the cache is fetched
  from memory once although it is read twice.
- rows (inner < 16): lanes go across the channels. A row is `fold` times channels * inner values,
  so that a few channels fill the lanes as well; what the lanes of one channel gathered is merged
  at the end. Of very wide rows a panel of channels is taken at a time.

Either way sums are taken of packs of 16 lanes that lie a stride apart. Results are written along
straight lines, backwards: what was touched last is still in the cache, and the hardware fetches
ahead only along straight lines. Results larger than the cache are written past it.

The statistics. Values are cut into blocks; block boundaries depend on the shape alone. In a block
each lane sums x and x*x in float64, where the product of two floats is exact. Where the mean is so
large that sum(x*x) - sum(x)^2 / n cancels, the block is summed again, of d = x - k with k its mean.
(float64 values are summed so from the start, with k the block's first value.) Blocks are merged in
order with Chan's formula [1]_, as distances from the channel's first value (its origin), which
keeps what the mean itself would round away. The mean comes out as two doubles, mean + mean_low.

The elements. y = (x - center) * scale + shift in the precision of x (float for 16-bit types), where
center is the mean rounded to that precision and shift carries the rest of it; dx = ((dy - level) -
((x - center) * slope + residue)) * scale likewise. Three and six operations an element, none of
them a division.

The threads. The work is cut into units, which the pool hands out: whole tiles where there are
enough of them, otherwise blocks to sum first, then pieces to write.

The same bits everywhere: a pack has 16 lanes in every instruction set, each operation is one IEEE
operation (contracted only where the product is exact), and neither blocks nor the order of merging
know who computes them.

In signatures IN marks what is read, OUT what is written. Where none of a function's arguments has
the type of x, `type` stands for it; it is never read.

.. [1] Chan, Golub, LeVeque, "Algorithms for computing the sample variance", 1983.
"""

from cpython.pycapsule cimport PyCapsule_New
from libc.stdlib cimport free, malloc

from fastbn._cpu cimport cache_size
from fastbn._job cimport (
    BACKWARD,
    BACKWARD_FIXED,
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FORWARD,
    INFERENCE,
    Job,
)
from fastbn._pool cimport run_units, threads_for

cdef extern from "_simd.hpp" namespace "fastbn" nogil:
    cdef cppclass Half:
        pass
    cdef cppclass Bfloat:
        pass
    cdef cppclass Pack[T]:
        Pack operator+(Pack)
        Pack operator-(Pack)
        Pack operator*(Pack)
        Pack operator/(Pack)
    Pack[T] fill[T](T value)
    Pack[T] load[T](const T* p, int lanes)
    Pack[double] load_wide[T](const T* p, int lanes)
    void store[T](T* p, Pack[T] a, int lanes)
    Pack[double] keep_first(Pack[double] a, int lanes)
    double sum_lanes(Pack[double] a)
    Pack[double] square_root(Pack[double] a)
    Pack[double] add_exact_product(Pack[double] sum, Pack[double] a, Pack[double] b)
    Pack[double] where_less(Pack[double] a, Pack[double] b, Pack[double] yes, Pack[double] no)
    P combine[P](P a, P b, int n)
    int lanes_to_line[T](const T* p)
    void store_past_cache[T](T* p, Pack[T] a)
    void fence()
    double* align(double* p)  # up to a line of the cache
    size_t element_size[T](const T* type)
    void prefetch[T](const T* p)
    void prefetch_to_write[T](T* p)
    void put_value[T](const T* type, void* values, Py_ssize_t i, double value)
    Pack[double] put_values[T](const T* type, void* values, Py_ssize_t i, Pack[double] a, int lanes)
    Pack[T] fill_value[T](const T* type, const void* values, Py_ssize_t i)
    Pack[T] load_values[T](const T* type, const void* values, Py_ssize_t i)
    double get_value[T](const T* type, const void* values, Py_ssize_t i)
    double value_of[T](const T* p)
    const T* at[T](const T* p, Py_ssize_t i)  # NULL stays NULL

ctypedef fused real:
    float
    double
    Half
    Bfloat

cdef enum:
    LANES = 16
    BLOCK = 4096             # values of one channel in a block of runs
    BLOCK_OF_ROWS = 65536    # values in a block of rows, about,
    LEAST_ROWS = 128         # but at least so many rows
    MOST_ROWS = 512          # and at most so many
    SUM_ROWS = 8             # rows that are summed side by side, half as many of two arrays
    AHEAD = 8192             # values that are fetched ahead meanwhile
    TILE = 4 << 20           # bytes in a tile of channels, about,
    SEGMENT = 128 << 10      # and contiguous bytes in it, at most
    SHORT = 256              # values in a run that is summed by itself; half, of two arrays
    COLUMNS = 2048           # contiguous values of short runs that are summed side by side
    COLUMN_PACKS = 128       # = COLUMNS / LANES
    MAX_LONG = 64            # long runs that are
    MIN_WIDTH = 64           # values that a row has at least, where the array has as many
    PANEL = 4096             # values of a row that are taken at once, at least
    UNITS = 8                # pieces of work per thread, where one can choose

# The part of itself down to which sum(x * x) may cancel: 4 of float64's 53 bits. That is where the
# mean is 4 times the standard deviation.
cdef double CANCELLED = 1.0 / 16

# The part of the last-level cache that a result may fill before it is written past it.
cdef double PAST_CACHE = 0.3

# The rows of the table of coefficients; normalisation needs the first three.
cdef enum:
    CENTER
    SCALE
    SHIFT
    SLOPE
    LEVEL
    TABLE
    RESIDUE = SHIFT

cdef enum Step:
    TILES   # sum and write some tiles
    SUM     # sum some blocks of a tile, or one block of rows
    WRITE   # write some pieces

cdef struct Work:
    Job* job
    Step step
    bint rows              # which of the two ways
    bint past_cache        # how out is written
    int threads
    Py_ssize_t blocks      # that a channel is cut into
    Py_ssize_t per_unit    # tiles, blocks or pieces in a unit
    Py_ssize_t units       # per tile in step SUM
    double* sums           # two of each channel (or lane) and block
    double* k              # what the sums of a gradient are shifted by, a channel (or lane)
    bint shifted           # whether any of those is not 0
    Py_ssize_t tile        # channels in a tile of runs
    void* table            # coefficients of each channel from `begin` on
    Py_ssize_t row         # from one row of it to the next
    # rows only
    Py_ssize_t begin       # the panel: its channels,
    Py_ssize_t end
    Py_ssize_t stride      # values from one row to the next, in the whole array
    Py_ssize_t width       # values of a row in this panel
    Py_ssize_t count       # full rows
    Py_ssize_t tail        # values of the shorter row behind them, if any
    Py_ssize_t block_rows
    Py_ssize_t padded      # width in full packs: the length of an array of lane sums
    Py_ssize_t wrapped     # padded and a pack more: the row of the table of lanes begins again
    void* lanes            # coefficients of each lane

# ----------------------------------------------------------------------------------------- packs
# `count` packs, each `stride` values after the one before; of each only the first `lanes` exist.
# The results add to what a and b point to.


cdef inline void sum_packs(
    const real* x, Py_ssize_t count, Py_ssize_t stride, int lanes,  # IN, not float64
    Pack[double]* a, Pack[double]* b,                               # IN/OUT: of x, of x * x
) noexcept nogil:
    cdef Pack[double] sum_x = a[0], sum_xx = b[0], v
    cdef Py_ssize_t i
    for i in range(count):
        v = load_wide(x + i * stride, lanes)
        sum_x = sum_x + v
        sum_xx = add_exact_product(sum_xx, v, v)
    a[0], b[0] = sum_x, sum_xx


cdef inline void sum_shifted_packs(
    const real* x, Py_ssize_t count, Py_ssize_t stride, int lanes,  # IN
    Pack[double] k,
    Pack[double]* a, Pack[double]* b,                               # IN/OUT: of d, of d * d
) noexcept nogil:
    cdef Pack[double] sum_d = a[0], sum_dd = b[0], d
    cdef Py_ssize_t i
    for i in range(count):
        d = load_wide(x + i * stride, lanes) - k
        sum_d = sum_d + d
        sum_dd = sum_dd + d * d
    a[0], b[0] = sum_d, sum_dd


cdef inline void sum_gradient_packs(
    const real* x, const real* dy, Py_ssize_t count, Py_ssize_t stride, int lanes,  # IN
    Pack[double]* a, Pack[double]* b,                        # IN/OUT: of dy, of dy * x
) noexcept nogil:
    cdef Pack[double] sum_dy = a[0], sum_dyx = b[0], g
    cdef Py_ssize_t i
    for i in range(count):
        g = load_wide(dy + i * stride, lanes)
        sum_dy = sum_dy + g
        sum_dyx = add_exact_product(sum_dyx, g, load_wide(x + i * stride, lanes))
    a[0], b[0] = sum_dy, sum_dyx


cdef inline void sum_shifted_gradient_packs(
    const real* x, const real* dy, Py_ssize_t count, Py_ssize_t stride, int lanes,  # IN
    Pack[double] k,
    Pack[double]* a, Pack[double]* b,                        # IN/OUT: of dy, of dy * (x - k)
) noexcept nogil:
    cdef Pack[double] sum_dy = a[0], sum_dyd = b[0], g
    cdef Py_ssize_t i
    for i in range(count):
        g = load_wide(dy + i * stride, lanes)
        sum_dy = sum_dy + g
        sum_dyd = sum_dyd + g * (load_wide(x + i * stride, lanes) - k)
    a[0], b[0] = sum_dy, sum_dyd


cdef inline void add_packs(
    const real* x, const real* dy, Py_ssize_t count, Py_ssize_t stride, int lanes,  # dy may be NULL
    Pack[double] k, bint shifted,
    Pack[double]* a, Pack[double]* b,                                               # IN/OUT
) noexcept nogil:
    if lanes < LANES:
        k = keep_first(k, lanes)
    if dy == NULL:
        if shifted or real is double:
            sum_shifted_packs(x, count, stride, lanes, k, a, b)
        else:
            sum_packs(x, count, stride, lanes, a, b)
    elif shifted or real is double:
        sum_shifted_gradient_packs(x, dy, count, stride, lanes, k, a, b)
    else:
        sum_gradient_packs(x, dy, count, stride, lanes, a, b)


cdef inline Pack[real] normalized(
    const real* x, int lanes, Pack[real] center, Pack[real] scale, Pack[real] shift
) noexcept nogil:
    return (load(x, lanes) - center) * scale + shift


cdef inline Pack[real] gradient(
    const real* x, const real* dy, int lanes, Pack[real] center, Pack[real] scale,
    Pack[real] residue, Pack[real] slope, Pack[real] level,
) noexcept nogil:
    return ((load(dy, lanes) - level) - ((load(x, lanes) - center) * slope + residue)) * scale


# ------------------------------------------------------------------------------------ statistics


cdef inline void merge(
    double* mean, double* m2, double n, double block_mean, double block_m2, double block_n
) noexcept nogil:
    """Take a block into the moments of n values before it (Chan's formula)."""
    cdef double delta = block_mean - mean[0]
    cdef double weight = block_n / (n + block_n)
    mean[0] += delta * weight
    m2[0] += block_m2 + delta * delta * (n * weight)


cdef void finish_moments(Job* job, Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
    """Make mean, what it loses in rounding, and var.

    So far the three hold the distance from the origin, the origin, and the sum of squares.
    """
    cdef Pack[double] count = fill(<double>job.outer * job.inner), zero = fill(0.0)
    cdef Pack[double] distance, origin, mean, part, m2
    cdef Py_ssize_t c
    cdef int lanes
    for c from begin <= c < end by LANES:
        lanes = min(end - c, <Py_ssize_t>LANES)
        distance, origin = load(job.mean + c, lanes), load(job.mean_low + c, lanes)
        m2 = load(job.var + c, lanes)
        mean = origin + distance
        part = mean - origin
        store(job.mean + c, mean, lanes)
        store(job.mean_low + c, (origin - (mean - part)) + (distance - part), lanes)
        # Below 0 by rounding; a NaN stays.
        store(job.var + c, where_less(m2, zero, zero, m2) / count, lanes)


cdef void affine_coefficients(
    const real* type, Work* w, Py_ssize_t begin, Py_ssize_t end
) noexcept nogil:
    cdef Job* job = w.job
    cdef Pack[double] eps = fill(job.eps), mean, scale, low
    cdef Py_ssize_t c
    cdef int lanes
    for c from begin <= c < end by LANES:
        lanes = min(end - c, <Py_ssize_t>LANES)
        mean = load(job.mean + c, lanes)
        scale = load(job.gamma + c, lanes) / square_root(load(job.var + c, lanes) + eps)
        low = mean - put_values(type, w.table, CENTER * w.row + c - w.begin, mean, lanes)
        low = low + load(job.mean_low + c, lanes)
        put_values(type, w.table, SCALE * w.row + c - w.begin, scale, lanes)
        put_values(
            type, w.table, SHIFT * w.row + c - w.begin,
            load(job.beta + c, lanes) - low * scale, lanes,
        )


cdef void choose_shifts(const real* type, Work* w) noexcept nogil:
    """Choose what x is shifted by in sum(dy * x): the mean, where that would cancel."""
    cdef Job* job = w.job
    cdef Py_ssize_t c
    w.shifted = real is double
    for c in range(job.channels):
        w.k[c] = job.mean[c]
        if real is not double:
            if job.mean[c] * job.mean[c] * CANCELLED > job.var[c]:
                w.shifted = True
            else:
                w.k[c] = 0


cdef void gradient_coefficients(
    const real* type, Work* w, Py_ssize_t begin, Py_ssize_t end  # dgamma holds sum(dy * (x - k))
) noexcept nogil:
    cdef Job* job = w.job
    cdef Pack[double] eps = fill(job.eps), count = fill(<double>job.outer * job.inner)
    cdef Pack[double] one = fill(1.0), zero = fill(0.0)
    cdef Pack[double] mean, low, rstd, dbeta, dgamma, slope, level, lost
    cdef Py_ssize_t c
    cdef int lanes
    for c from begin <= c < end by LANES:
        lanes = min(end - c, <Py_ssize_t>LANES)
        mean, low = load(job.mean + c, lanes), load(job.mean_low + c, lanes)
        rstd = one / square_root(load(job.var + c, lanes) + eps)
        dbeta, dgamma = load(job.dbeta + c, lanes), load(job.dgamma + c, lanes)
        dgamma = (dgamma - (mean - load(w.k + c, lanes) + low) * dbeta) * rstd
        store(job.dgamma + c, dgamma, lanes)
        put_values(type, w.table, SCALE * w.row + c - w.begin, load(job.gamma + c, lanes) * rstd,
                   lanes)
        if job.operation == BACKWARD_FIXED:  # dx = (dy - 0) * scale + 0
            put_values(type, w.table, CENTER * w.row + c - w.begin, zero, lanes)
            put_values(type, w.table, SHIFT * w.row + c - w.begin, zero, lanes)
            continue
        slope, level = rstd * (dgamma / count), dbeta / count
        low = low + (mean - put_values(type, w.table, CENTER * w.row + c - w.begin, mean, lanes))
        put_values(type, w.table, SLOPE * w.row + c - w.begin, slope, lanes)
        lost = level - put_values(type, w.table, LEVEL * w.row + c - w.begin, level, lanes)
        put_values(type, w.table, RESIDUE * w.row + c - w.begin, lost - low * slope, lanes)


# ------------------------------------------------------------------------------------------ runs


cdef inline Py_ssize_t parts(Py_ssize_t whole, Py_ssize_t part) noexcept nogil:
    return (whole + part - 1) // part


cdef struct Block:
    Py_ssize_t first_row
    Py_ssize_t end_row
    Py_ssize_t first   # of each run
    Py_ssize_t length


cdef inline Py_ssize_t pieces_of_run(Job* job) noexcept nogil:
    return parts(job.inner, BLOCK)


cdef inline Py_ssize_t rows_of_block(Job* job) noexcept nogil:
    return max(1, BLOCK // job.inner)


cdef inline Py_ssize_t blocks_of_runs(Job* job) noexcept nogil:
    return parts(job.outer, rows_of_block(job)) * pieces_of_run(job)


cdef inline Block block_of_runs(Job* job, Py_ssize_t b) noexcept nogil:
    """Return where block b lies: some whole runs, or a piece of one."""
    cdef Block block
    block.first_row = b // pieces_of_run(job) * rows_of_block(job)
    block.end_row = min(block.first_row + rows_of_block(job), job.outer)
    block.first = b % pieces_of_run(job) * BLOCK
    block.length = min(job.inner - block.first, <Py_ssize_t>BLOCK)
    return block


cdef Py_ssize_t tile_channels(Work* w, Py_ssize_t itemsize) noexcept nogil:
    """Return how many channels are summed and written before the next.

    Each example adds a segment of memory to the tile. Long ones spare the hardware the search for
    the next one; all of them together should stay in a cache, and there should be tiles enough
    for all threads.
    """
    cdef Py_ssize_t least = SEGMENT // 16, segment = min(SEGMENT, TILE // w.job.outer)
    if w.threads > 1:
        segment = min(
            segment, parts(w.job.channels, 4 * w.threads) * w.job.inner * itemsize
        )
    return max(1, max(segment, least) // (w.job.inner * itemsize))


cdef inline void add_run(
    const real* x, const real* dy, Py_ssize_t length, double shift, bint shifted,  # IN
    Pack[double]* a, Pack[double]* b,                                              # IN/OUT
) noexcept nogil:
    cdef Py_ssize_t whole = length // LANES
    cdef int tail = length % LANES
    cdef Pack[double] k = fill(shift)
    add_packs(x, dy, whole, LANES, LANES, k, shifted, a, b)
    if tail:
        add_packs(x + whole * LANES, at(dy, whole * LANES), 1, LANES, tail, k, shifted, a, b)


cdef void sum_shifted_block(
    const real* x, const real* dy, Work* w, Py_ssize_t c, Block block, double k,  # IN
    double* a, double* b,                                                         # OUT
) noexcept nogil:
    cdef Py_ssize_t row, i
    cdef Pack[double] sa = fill(0.0), sb = fill(0.0)
    for row in range(block.first_row, block.end_row):
        i = (row * w.job.channels + c) * w.job.inner + block.first
        add_run(x + i, at(dy, i), block.length, k, True, &sa, &sb)
    a[0], b[0] = sum_lanes(sa), sum_lanes(sb)


cdef void sum_long_runs(
    const real* x, const real* dy, Work* w, Py_ssize_t begin, Py_ssize_t end, Block block,  # IN
    Py_ssize_t index,                                                                       # block
) noexcept nogil:
    cdef Pack[double] a[MAX_LONG]
    cdef Pack[double] b[MAX_LONG]
    cdef Py_ssize_t row, c, t, i
    for t in range(end - begin):
        a[t] = b[t] = fill(0.0)
    for row in range(block.first_row, block.end_row):
        for c in range(begin, end):
            i = (row * w.job.channels + c) * w.job.inner + block.first
            add_run(x + i, at(dy, i), block.length, 0, False, &a[c - begin], &b[c - begin])
    for c in range(begin, end):
        i = 2 * (c * w.blocks + index)
        w.sums[i], w.sums[i + 1] = sum_lanes(a[c - begin]), sum_lanes(b[c - begin])


cdef void sum_short_runs(
    const real* x, const real* dy, Work* w, Py_ssize_t begin, Py_ssize_t end, Block block,  # IN
    Py_ssize_t index,                                                                       # block
) noexcept nogil:
    """Sum whole rows of short runs position by position, then the positions of each channel."""
    cdef Job* job = w.job
    cdef Pack[double] a[COLUMN_PACKS]
    cdef Pack[double] b[COLUMN_PACKS]
    cdef Py_ssize_t row, c, i, j, width = (end - begin) * job.inner
    cdef Py_ssize_t stride = job.channels * job.inner
    cdef int lanes
    cdef Py_ssize_t rows = SUM_ROWS if dy == NULL else SUM_ROWS // 2
    for j in range(parts(width, LANES)):
        a[j] = b[j] = fill(0.0)
    for row from block.first_row <= row < block.end_row by rows:
        for j from 0 <= j < width by LANES:
            i = row * stride + begin * job.inner + j
            lanes = min(width - j, <Py_ssize_t>LANES)
            add_packs(
                x + i, at(dy, i), min(block.end_row - row, rows), stride, lanes,
                fill(0.0), False, &a[j // LANES], &b[j // LANES],
            )
    for c in range(begin, end):
        i = 2 * (c * w.blocks + index)
        j = (c - begin) * job.inner
        w.sums[i] = sum_of(<const double*>a + j, job.inner)
        w.sums[i + 1] = sum_of(<const double*>b + j, job.inner)


cdef inline double sum_of(const double* values, Py_ssize_t count) noexcept nogil:
    cdef Pack[double] total = fill(0.0)
    cdef Py_ssize_t i
    for i from 0 <= i < count - LANES + 1 by LANES:
        total = total + load(values + i, LANES)
    if count % LANES:
        total = total + load(values + count - count % LANES, <int>(count % LANES))
    return sum_lanes(total)


cdef void finish_block(
    const real* x, const real* dy, Work* w, Py_ssize_t c, Block block, double* sums  # IN/OUT
) noexcept nogil:
    """Sum a block again where that is needed; of x make moments."""
    cdef double k = 0, n = <double>block.length * (block.end_row - block.first_row)
    if dy != NULL:
        if real is double or w.k[c] != 0:
            sum_shifted_block(x, dy, w, c, block, w.k[c], &sums[0], &sums[1])
        return
    if real is double:
        k = value_of(x + (block.first_row * w.job.channels + c) * w.job.inner + block.first)
        sum_shifted_block(x, dy, w, c, block, k, &sums[0], &sums[1])
    if sums[1] - sums[0] * sums[0] / n < sums[1] * CANCELLED:
        k += sums[0] / n
        sum_shifted_block(x, dy, w, c, block, k, &sums[0], &sums[1])
    sums[1] -= sums[0] * sums[0] / n
    sums[0] = (k - value_of(x + c * w.job.inner)) + sums[0] / n


cdef void sum_tile(
    const real* x, const real* dy, Work* w, Py_ssize_t begin, Py_ssize_t end,  # IN
    Py_ssize_t first_block, Py_ssize_t end_block,
) noexcept nogil:
    cdef Job* job = w.job
    cdef Py_ssize_t index, c, i, upto = begin
    # How many channels to take at once. Runs of several blocks one after the other, for the sake
    # of a straight line through memory.
    cdef Py_ssize_t some = end - begin if job.inner <= BLOCK else 1
    cdef Py_ssize_t least = SHORT if dy == NULL else SHORT // 2
    cdef Py_ssize_t group = COLUMNS // job.inner if job.inner < least else <Py_ssize_t>MAX_LONG
    cdef Block block
    while upto < end:
        begin, upto = upto, min(upto + some, end)
        for index in range(first_block, end_block):
            block = block_of_runs(job, index)
            if real is not double:
                for c from begin <= c < upto by group:
                    if job.inner < least:
                        sum_short_runs(x, dy, w, c, min(c + group, upto), block, index)
                    else:
                        sum_long_runs(x, dy, w, c, min(c + group, upto), block, index)
            for c in range(begin, upto):
                finish_block(x, dy, w, c, block, w.sums + 2 * (c * w.blocks + index))


cdef void finish_runs(const real* x, Work* w, Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
    """Put the blocks of some channels together, in order, and make their coefficients."""
    cdef Job* job = w.job
    cdef Py_ssize_t c, i
    cdef double* sums
    cdef double mean, m2, n, block_n
    cdef Block block
    for c in range(begin, end):
        sums = w.sums + 2 * c * w.blocks
        mean = m2 = n = 0
        if job.operation == FORWARD:
            for i in range(w.blocks):
                block = block_of_runs(job, i)
                block_n = <double>block.length * (block.end_row - block.first_row)
                merge(&mean, &m2, n, sums[2 * i], sums[2 * i + 1], block_n)
                n += block_n
            job.mean[c], job.mean_low[c], job.var[c] = mean, value_of(x + c * job.inner), m2
        else:
            job.dbeta[c] = job.dgamma[c] = 0
            for i in range(w.blocks):
                job.dbeta[c] += sums[2 * i]
                job.dgamma[c] += sums[2 * i + 1]
    if job.operation == FORWARD:
        finish_moments(job, begin, end)
        affine_coefficients(x, w, begin, end)
    else:
        gradient_coefficients(x, w, begin, end)


cdef inline void write_line_of_runs(
    const real* x, const real* dy, real* out,         # IN, IN (NULL: normalise), OUT
    Work* w, Py_ssize_t begin, Py_ssize_t end,        # contiguous positions in the array
    bint past_cache,
) noexcept nogil:
    """Write packs that lie in one line of memory, from the end; a pack may have two channels."""
    cdef Py_ssize_t channels = w.job.channels, row = w.row, inner = w.job.inner
    cdef Py_ssize_t start = (end - 1) // inner * inner  # of the last run, which is of channel
    cdef Py_ssize_t c = start // inner % channels
    cdef Py_ssize_t bottom = min(end, begin + lanes_to_line(out + begin)), p = end, n
    cdef int lanes = (end - bottom) % LANES
    cdef Pack[real] center, scale, shift, slope, level, center0, scale0, shift0, slope0, level0, a
    center = center0 = fill_value(x, w.table, CENTER * row + c)
    scale = scale0 = fill_value(x, w.table, SCALE * row + c)
    shift = shift0 = fill_value(x, w.table, SHIFT * row + c)
    slope = slope0 = fill_value(x, w.table, SLOPE * row + c)
    level = level0 = fill_value(x, w.table, LEVEL * row + c)
    while p > begin:
        if lanes == 0 and p > bottom:  # whole packs of one channel
            for n in range(min(p - start, p - bottom) // LANES):
                p -= LANES
                if dy == NULL:
                    a = normalized(x + p, LANES, center, scale, shift)
                else:
                    a = gradient(x + p, dy + p, LANES, center, scale, shift, slope, level)
                if past_cache:
                    store_past_cache(out + p, a)
                else:
                    store(out + p, a, LANES)
            if p == begin:
                return
        if p == bottom:
            lanes = <int>(bottom - begin)
        elif lanes == 0:
            lanes = LANES
        p -= lanes
        if p < start:  # the lower part of the pack is of the channel before
            c = c - 1 if c else channels - 1
            n = start - p
            start -= inner
            center0 = fill_value(x, w.table, CENTER * row + c)
            scale0 = fill_value(x, w.table, SCALE * row + c)
            shift0 = fill_value(x, w.table, SHIFT * row + c)
            center = combine(center0, center, <int>n)
            scale = combine(scale0, scale, <int>n)
            shift = combine(shift0, shift, <int>n)
            if dy != NULL:
                slope0 = fill_value(x, w.table, SLOPE * row + c)
                level0 = fill_value(x, w.table, LEVEL * row + c)
                slope, level = combine(slope0, slope, <int>n), combine(level0, level, <int>n)
        if dy == NULL:
            a = normalized(x + p, lanes, center, scale, shift)
        else:
            a = gradient(x + p, dy + p, lanes, center, scale, shift, slope, level)
        if lanes == LANES and past_cache:
            store_past_cache(out + p, a)
        else:
            store(out + p, a, lanes)
        center, scale, shift, slope, level = center0, scale0, shift0, slope0, level0
        lanes = 0


cdef void write_runs(
    const real* x, const real* dy, real* out,         # IN, IN (NULL: normalise), OUT
    Work* w, Py_ssize_t begin, Py_ssize_t end,        # contiguous positions in the array
) noexcept nogil:
    if w.past_cache and dy == NULL:
        write_line_of_runs(x, <const real*>NULL, out, w, begin, end, True)
    elif w.past_cache:
        write_line_of_runs(x, dy, out, w, begin, end, True)
    elif dy == NULL:
        write_line_of_runs(x, <const real*>NULL, out, w, begin, end, False)
    else:
        write_line_of_runs(x, dy, out, w, begin, end, False)


cdef void unit_of_runs(
    const real* x, const real* dy, real* out, Work* w, Py_ssize_t unit
) noexcept nogil:
    cdef Job* job = w.job
    cdef Py_ssize_t size = w.tile, stride = job.channels * job.inner
    cdef Py_ssize_t tile, begin, end, row, first
    # What is written: a normalisation of x, or of dy, or a gradient.
    cdef const real* source = dy if job.operation == BACKWARD_FIXED else x
    cdef const real* other = dy if job.operation == BACKWARD else NULL
    if w.step == SUM:
        begin = unit // w.units * size
        first = unit % w.units * w.per_unit
        sum_tile(
            x, dy, w, begin, min(begin + size, job.channels),
            first, min(first + w.per_unit, w.blocks),
        )
    elif w.step == WRITE:
        first = unit * w.per_unit
        write_runs(source, other, out, w, first, min(first + w.per_unit, job.outer * stride))
    else:
        first = unit * w.per_unit
        for tile in range(first, min(first + w.per_unit, parts(job.channels, size))):
            begin, end = tile * size, min((tile + 1) * size, job.channels)
            sum_tile(x, dy, w, begin, end, 0, w.blocks)
            finish_runs(x, w, begin, end)
            for row in range(job.outer - 1, -1, -1):
                first = row * stride
                if w.past_cache and row:  # where a line begins and ends part of it stays outside
                    prefetch_to_write(out + first - stride + begin * job.inner)
                    prefetch_to_write(out + first - stride + end * job.inner)
                write_runs(
                    source, other, out, w, first + begin * job.inner, first + end * job.inner
                )


cdef void run_runs(const real* x, Work* w) noexcept nogil:
    cdef Job* job = w.job
    cdef Py_ssize_t tiles
    w.tile = tile_channels(w, sizeof(real))
    tiles = parts(job.channels, w.tile)
    if job.operation == INFERENCE:
        affine_coefficients(x, w, 0, job.channels)
    elif w.threads == 1 or tiles >= 4 * w.threads:
        w.step = TILES
        w.per_unit = parts(tiles, UNITS * w.threads) if w.threads > 1 else tiles
        run_units(do_unit, w, parts(tiles, w.per_unit), w.threads)
        return
    else:
        w.step = SUM
        w.per_unit = parts(w.blocks, parts(UNITS * w.threads, tiles))
        w.units = parts(w.blocks, w.per_unit)
        run_units(do_unit, w, tiles * w.units, w.threads)
        finish_runs(x, w, 0, job.channels)
    w.step = WRITE
    write_all(w, job.outer * job.channels * job.inner)


cdef void write_all(Work* w, Py_ssize_t count) noexcept nogil:
    """Cut what is to be written into units of whole lines of the cache, as far as those go."""
    w.per_unit = parts(parts(count, UNITS * w.threads if w.threads > 1 else 1), 64) * 64
    run_units(do_unit, w, parts(count, w.per_unit), w.threads)


# ------------------------------------------------------------------------------------------ rows


cdef void choose_rows(Work* w, Py_ssize_t begin) noexcept nogil:
    """Choose the panel that begins at a channel, and describe its rows."""
    cdef Job* job = w.job
    cdef Py_ssize_t narrow = job.channels * job.inner, fold
    fold = max(1, min(MIN_WIDTH // narrow, job.outer))
    w.begin, w.end = begin, min(begin + parts(PANEL, job.inner), job.channels)
    w.stride = fold * narrow
    w.width = fold * (w.end - begin) * job.inner
    w.count = job.outer // fold
    w.tail = (job.outer - w.count * fold) * narrow
    w.block_rows = max(LEAST_ROWS, min(BLOCK_OF_ROWS // w.stride, <Py_ssize_t>MOST_ROWS))
    w.blocks = parts(w.count, w.block_rows)
    w.padded = parts(w.width, LANES) * LANES
    w.wrapped = w.padded + LANES


cdef void spread(
    const real* type, Work* w, const void* values,   # IN, one a channel, from `begin` on
    void* lanes, Py_ssize_t length,                  # OUT
) noexcept nogil:
    """Write the value of its channel into each lane, over and over."""
    cdef Py_ssize_t fold, c, i, j = 0
    if lanes != values:
        for fold in range(w.stride // (w.job.channels * w.job.inner)):
            for c in range(w.end - w.begin):
                for i in range(w.job.inner):
                    put_value(type, lanes, j, get_value(type, values, c))
                    j += 1
    for j in range(w.width, length):
        put_value(type, lanes, j, get_value(type, lanes, j - w.width))


cdef inline double* lane_shifts(Work* w) noexcept nogil:
    return w.k + parts(w.job.channels, 8) * 8


cdef inline void add_rows(
    const real* x, const real* dy, Py_ssize_t stride, Py_ssize_t rows, int lanes,  # IN
    Pack[double] k, bint shifted,
    Pack[double]* a, Pack[double]* b,                                              # IN/OUT
) noexcept nogil:
    """Add a column of packs, in the order in which whole rows are added."""
    cdef Py_ssize_t row
    for row from 0 <= row < rows by SUM_ROWS:
        add_packs(
            x + row * stride, at(dy, row * stride),
            min(rows - row, <Py_ssize_t>SUM_ROWS), stride, lanes, k, shifted, a, b,
        )


cdef void moments_of_rows(
    const real* x, const real* block, Work* w, Py_ssize_t rows,  # IN: the panel, its block
    double* a, double* b,                                        # IN/OUT: sums, moments
) noexcept nogil:
    """Turn the sums of a block into its moments, after summing it again where they cancel."""
    cdef Pack[double] one = fill(1.0), zero = fill(0.0), limit = fill(CANCELLED)
    cdef Pack[double] per_row = fill(1.0 / rows), sa, sb, k, m2
    cdef Py_ssize_t j
    cdef int lanes
    for j from 0 <= j < w.width by LANES:
        lanes = min(w.width - j, <Py_ssize_t>LANES)
        sa, sb = load(<const double*>a + j, LANES), load(<const double*>b + j, LANES)
        k = load_wide(block + j, lanes) if real is double else zero
        m2 = sb - sa * sa * per_row
        if sum_lanes(where_less(m2, sb * limit, one, zero)) > 0:
            k = where_less(m2, sb * limit, k + sa * per_row, k)
            sa = sb = zero
            add_rows(block + j, <const real*>NULL, w.stride, rows, lanes, k, True, &sa, &sb)
            m2 = sb - sa * sa * per_row
        store(a + j, (k - load_wide(x + j, lanes)) + sa * per_row, LANES)
        store(b + j, m2, LANES)


cdef void sum_rows(
    const real* x, const real* dy, Work* w, Py_ssize_t index  # IN: the panel; which block
) noexcept nogil:
    cdef double* a = w.sums + 2 * index * w.padded
    cdef double* b = a + w.padded
    cdef double* k = lane_shifts(w)
    cdef Py_ssize_t first_row = index * w.block_rows, row, i, j, t
    cdef Py_ssize_t rows = min(w.count - first_row, w.block_rows)
    cdef Pack[double] sa, sb, shift = fill(0.0)
    cdef int lanes
    cdef Py_ssize_t side = SUM_ROWS if dy == NULL else SUM_ROWS // 2
    for j in range(2 * w.padded):
        a[j] = 0
    for row from 0 <= row < rows by side:
        for j from 0 <= j < w.width by LANES:
            i = (first_row + row) * w.stride + j
            lanes = min(w.width - j, <Py_ssize_t>LANES)
            sa, sb = load(<const double*>a + j, LANES), load(<const double*>b + j, LANES)
            for t in range(side):
                prefetch(x + (first_row + row) * w.stride + j * side + t * LANES + AHEAD)
                if dy != NULL:
                    prefetch(dy + (first_row + row) * w.stride + j * side + t * LANES + AHEAD)
            if dy != NULL:
                if w.shifted:
                    shift = load(<const double*>k + j, LANES)
                add_packs(
                    x + i, dy + i, min(rows - row, side), w.stride, lanes, shift,
                    w.shifted, &sa, &sb,
                )
            else:
                if real is double:
                    shift = load_wide(x + first_row * w.stride + j, lanes)
                add_packs(
                    x + i, dy, min(rows - row, side), w.stride, lanes, shift,
                    False, &sa, &sb,
                )
            store(a + j, sa, LANES)
            store(b + j, sb, LANES)
    if dy == NULL:
        moments_of_rows(x, x + first_row * w.stride, w, rows, a, b)


cdef void merge_lanes(Work* w, Py_ssize_t block) noexcept nogil:
    """Take a block into the sums or moments of those before it, all lanes side by side."""
    cdef double* into = w.sums
    cdef const double* sums = w.sums + 2 * block * w.padded
    cdef double n = <double>block * w.block_rows
    cdef double block_n = min(w.count - block * w.block_rows, w.block_rows)
    cdef Pack[double] weight = fill(block_n / (n + block_n)), both = fill(n) * weight, a, b, delta
    cdef Py_ssize_t j
    for j from 0 <= j < w.padded by LANES:
        a = load(<const double*>into + j, LANES)
        b = load(<const double*>into + w.padded + j, LANES)
        if w.job.operation == FORWARD:
            delta = load(sums + j, LANES) - a
            a = a + delta * weight
            b = b + (load(sums + w.padded + j, LANES) + delta * delta * both)
        else:
            a = a + load(sums + j, LANES)
            b = b + load(sums + w.padded + j, LANES)
        store(into + j, a, LANES)
        store(into + w.padded + j, b, LANES)


cdef void finish_rows(const real* x, const real* dy, Work* w) noexcept nogil:
    """Put the blocks of the panel together, in order, and then the lanes of each channel."""
    cdef Job* job = w.job
    cdef double* a = w.sums
    cdef double* b = a + w.padded
    cdef double* k = lane_shifts(w)
    cdef double* first = job.mean if dy == NULL else job.dbeta
    cdef double* second = job.var if dy == NULL else job.dgamma
    cdef Py_ssize_t block, c, f, i, j, channels = w.end - w.begin
    cdef const real* last_x = x + w.count * w.stride
    cdef double n, block_n, g
    for block in range(1, w.blocks):
        merge_lanes(w, block)
    for c in range(w.begin, w.end):
        if dy == NULL:
            job.mean_low[c] = value_of(x + (c - w.begin) * job.inner)
        if w.width == channels:  # a lane is a channel
            first[c], second[c] = a[c - w.begin], b[c - w.begin]
            continue
        first[c] = second[c] = n = 0
        for f in range(w.stride // (job.channels * job.inner)):
            for i in range(job.inner):
                j = (f * channels + c - w.begin) * job.inner + i
                if dy == NULL:
                    if j < w.tail:
                        merge(&a[j], &b[j], w.count, value_of(last_x + j) - value_of(x + j), 0, 1)
                    block_n = w.count + (j < w.tail)
                    merge(
                        &first[c], &second[c], n, value_of(x + j) - job.mean_low[c] + a[j], b[j],
                        block_n,
                    )
                    n += block_n
                    continue
                first[c] += a[j]
                second[c] += b[j]
                if j < w.tail:
                    g = value_of(dy + w.count * w.stride + j)
                    first[c] += g
                    second[c] += g * (value_of(last_x + j) - k[j])


cdef inline Pack[real] pack_of_row(
    const real* x, const real* dy, Work* w, Py_ssize_t lane, int lanes
) noexcept nogil:
    """Return what is written for the values at x, the first of which is in a certain lane."""
    cdef Pack[real] center = load_values(x, w.lanes, CENTER * w.wrapped + lane)
    cdef Pack[real] scale = load_values(x, w.lanes, SCALE * w.wrapped + lane)
    cdef Pack[real] shift = load_values(x, w.lanes, SHIFT * w.wrapped + lane)
    if dy == NULL:
        return normalized(x, lanes, center, scale, shift)
    return gradient(
        x, dy, lanes, center, scale, shift,
        load_values(x, w.lanes, SLOPE * w.wrapped + lane),
        load_values(x, w.lanes, LEVEL * w.wrapped + lane),
    )


cdef inline void write_line_of_rows(
    const real* x, const real* dy, real* out,           # IN, IN (NULL: normalise), OUT
    Work* w, Py_ssize_t lane, Py_ssize_t length,        # lane: of the first value
    bint past_cache,
) noexcept nogil:
    """Write contiguous values, whose lanes begin again and again, from the end."""
    cdef Py_ssize_t head = min(length, <Py_ssize_t>lanes_to_line(out)), i, j, t
    cdef int tail = (length - head) % LANES
    cdef Pack[real] a
    i = length - tail
    j = (lane + i) % w.width
    if tail:
        store(out + i, pack_of_row(x + i, at(dy, i), w, j, tail), tail)
    for t in range((i - head) // LANES):
        i -= LANES
        j -= LANES
        while j < 0:
            j += w.width
        if dy == NULL:
            a = pack_of_row(x + i, <const real*>NULL, w, j, LANES)
        else:
            a = pack_of_row(x + i, dy + i, w, j, LANES)
        if past_cache:
            store_past_cache(out + i, a)
        else:
            store(out + i, a, LANES)
    if head:
        store(out, pack_of_row(x, dy, w, lane % w.width, <int>head), <int>head)


cdef void write_rows(
    const real* x, const real* dy, real* out, Work* w, Py_ssize_t lane, Py_ssize_t length
) noexcept nogil:
    if w.past_cache and dy == NULL:
        write_line_of_rows(x, <const real*>NULL, out, w, lane, length, True)
    elif w.past_cache:
        write_line_of_rows(x, dy, out, w, lane, length, True)
    elif dy == NULL:
        write_line_of_rows(x, <const real*>NULL, out, w, lane, length, False)
    else:
        write_line_of_rows(x, dy, out, w, lane, length, False)


cdef void unit_of_rows(
    const real* x, const real* dy, real* out, Work* w, Py_ssize_t unit
) noexcept nogil:
    cdef Job* job = w.job
    cdef const real* source = dy if job.operation == BACKWARD_FIXED else x
    cdef const real* other = dy if job.operation == BACKWARD else NULL
    cdef Py_ssize_t first = unit * w.per_unit, end, i
    cdef Py_ssize_t whole = job.outer * job.channels * job.inner
    if w.step == SUM:
        sum_rows(x, dy, w, unit)
    elif w.width == w.stride:  # a unit is some values
        end = min(first + w.per_unit, whole)
        write_rows(
            source + first, at(other, first), out + first,
            w, first % w.width, end - first,
        )
    else:  # a unit is some rows of the panel
        end = min(first + w.per_unit, w.count)
        i = end * w.stride
        while i > first * w.stride:
            i -= w.stride
            write_rows(
                source + i, at(other, i), out + i, w, 0, w.width
            )


cdef inline void* row_of(const real* type, void* values, Py_ssize_t i) noexcept nogil:
    return <char*>values + i * element_size(type)


cdef void run_rows(const real* x, Work* w) noexcept nogil:
    cdef Job* job = w.job
    cdef const real* dy = <const real*>job.dy
    cdef Py_ssize_t row, whole, end = 0
    while end < job.channels:
        choose_rows(w, end)
        end = w.end
        whole = w.begin * job.inner  # the panel begins there
        if job.operation != INFERENCE:
            w.step = SUM
            if dy != NULL:
                spread(<const double*>NULL, w, w.k + w.begin, lane_shifts(w), w.padded)
            run_units(do_unit, w, w.blocks, w.threads)
            finish_rows(x + whole, at(dy, whole), w)
        if w.width == w.end - w.begin:  # a lane is a channel
            w.table, w.row = w.lanes, w.wrapped
        if job.operation == FORWARD:
            finish_moments(job, w.begin, w.end)
        if dy != NULL:
            gradient_coefficients(x, w, w.begin, w.end)
        else:
            affine_coefficients(x, w, w.begin, w.end)
        for row in range(TABLE if job.operation == BACKWARD else SHIFT + 1):
            spread(x, w, row_of(x, w.table, row * w.row), row_of(x, w.lanes, row * w.wrapped),
                   w.wrapped)
        w.step = WRITE
        write_all(w, job.outer * job.channels * job.inner if w.width == w.stride else w.count)


# ---------------------------------------------------------------------------------- entry points


cdef void unit_of(const real* x, Work* w, Py_ssize_t unit) noexcept nogil:
    cdef Py_ssize_t first = w.begin * w.job.inner  # where a panel of rows begins
    cdef const real* dy = <const real*>w.job.dy
    cdef real* out = <real*>w.job.out
    if w.rows:
        unit_of_rows(x + first, at(dy, first), out + first, w, unit)
    else:
        unit_of_runs(x, dy, out, w, unit)
    if w.past_cache:
        fence()


cdef void do_unit(void* work, Py_ssize_t unit) noexcept nogil:
    cdef Work* w = <Work*>work
    if w.job.type == FLOAT32:
        unit_of(<const float*>w.job.x, w, unit)
    elif w.job.type == FLOAT16:
        unit_of(<const Half*>w.job.x, w, unit)
    elif w.job.type == BFLOAT16:
        unit_of(<const Bfloat*>w.job.x, w, unit)
    else:
        unit_of(<const double*>w.job.x, w, unit)


cdef inline Py_ssize_t whole_lines(Py_ssize_t doubles) noexcept nogil:
    return parts(doubles, 8) * 8


cdef int run_typed(const real* x, Job* job) noexcept nogil:
    cdef Work w
    cdef double size = <double>job.outer * job.channels * job.inner * sizeof(real)
    cdef Py_ssize_t table, shifts, sums = 0, lanes = 0
    cdef double* scratch
    w.job = job
    w.rows = job.inner < LANES
    w.begin = 0
    w.shifted = False
    w.threads = threads_for(2 * size)
    w.past_cache = size > PAST_CACHE * cache_size() and job.out != job.x and job.out != job.dy
    table = shifts = whole_lines(job.channels)
    table *= TABLE
    if w.rows:
        choose_rows(&w, 0)
        if w.width == w.end - w.begin:  # a lane is a channel: the table of lanes is enough
            table = 0
        shifts += w.padded
        lanes = TABLE * w.wrapped + LANES
    else:
        w.blocks = blocks_of_runs(job)
    if job.operation != INFERENCE:
        sums = whole_lines(2 * w.blocks * (w.padded if w.rows else job.channels))
    scratch = <double*>malloc((table + shifts + sums + lanes + 8) * sizeof(double))
    if scratch == NULL:
        return -1
    w.table = align(scratch)
    w.row = job.channels
    w.k = <double*>w.table + table
    w.sums = w.k + shifts
    # Where stores to out are aligned, so shall be loads of the coefficients.
    w.lanes = <char*>(w.sums + sums) + (LANES - lanes_to_line(<real*>job.out)) * element_size(x)
    if job.dy != NULL:
        choose_shifts(x, &w)
    if w.rows:
        run_rows(x, &w)
    else:
        run_runs(x, &w)
    free(scratch)
    return 0


cdef int run(Job* job) noexcept nogil:
    if job.type == FLOAT32:
        return run_typed(<const float*>job.x, job)
    if job.type == FLOAT16:
        return run_typed(<const Half*>job.x, job)
    if job.type == BFLOAT16:
        return run_typed(<const Bfloat*>job.x, job)
    return run_typed(<const double*>job.x, job)


# What `functional` calls: a function of the type Run in _job.pxd.
kernel = PyCapsule_New(<void*>run, "fastbn._kernels.run", NULL)
