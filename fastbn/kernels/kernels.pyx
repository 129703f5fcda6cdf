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
large that sum(x*x) - sum(x)^2 / n cancels, the block is summed again, of d = x - k with k its mean,
rounded to the type of x, so that d*d is exact as well. (float64 values are summed so from the
start, with k the block's first value.) Blocks are merged in order with Chan's formula [1]_, as
distances from the channel's first value (its origin), which keeps what the mean itself would round
away. The mean comes out as two doubles, mean + mean_low.

The elements. y = (x - center) * scale + shift in the precision of x (float for 16-bit types), where
center is the mean rounded to that precision and shift carries the rest of it; dx = ((g - level) -
((x - center) * slope + residue)) * scale likewise. Three and six operations an element, none of
them a division. g is dy, or with an activation the gradient of what went into it: forward leaves a
bit for each value, its sign there, and backward goes by that. Whether anything is fused is a flag
that the compiler knows.

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
from libc.stdint cimport uint16_t
from libc.stdlib cimport free, malloc

from fastbn.runtime.cpu cimport cache_size
from fastbn.kernels.job cimport (
    APPLY,
    BACKWARD,
    BACKWARD_FIXED,
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FORWARD,
    INFERENCE,
    Job,
)
from fastbn.runtime.pool cimport run_units, threads_for

cdef extern from "packs.hpp" namespace "fastbn" nogil:
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
    Pack[double] wide[T](const T* type, Pack[T] a)
    unsigned signs_of[T](const T* type, Pack[T] a)
    Pack[T] leaky_relu[T](const T* type, unsigned signs, Pack[T] a, double slope)
    void put_bits(uint16_t* words, Py_ssize_t i, unsigned bits, int lanes)
    unsigned get_bits(const uint16_t* words, Py_ssize_t i)
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
    double leaky_relu_one[T](const T* p, unsigned sign, double slope)
    const T* at[T](const T* p, Py_ssize_t i)  # NULL stays NULL

cdef extern from *:
    """
    // What the sources call inline is so always: its flags are constants where it is called.
    #undef CYTHON_INLINE
    #define CYTHON_INLINE INLINE
    """

ctypedef fused real:
    float
    double
    Half
    Bfloat

cdef enum:
    LANES = 16
    LINE = 64                # bytes in a line of the cache
    BLOCK = 4096             # values of one channel in a block of runs
    BLOCK_OF_ROWS = 65536    # values in a block of rows, about,
    LEAST_ROWS = 128         # but at least so many rows
    MOST_ROWS = 512          # and at most so many
    SUM_ROWS = 8             # rows that are summed side by side, half as many of two arrays
    PREFETCH_DISTANCE = 8192 # values that are fetched ahead meanwhile
    TILE = 4 << 20           # bytes in a tile of channels, about,
    SEGMENT = 128 << 10      # and contiguous bytes in it, at most
    SHORT = 256              # values in a run that is summed by itself; half, of two arrays
    COLUMNS = 2048           # contiguous values of short runs that are summed side by side
    COLUMN_PACKS = 128       # = COLUMNS / LANES
    MAX_LONG = 64            # long runs that are
    MIN_WIDTH = 64           # values that a row has at least, where the array has as many
    PANEL = 4096             # values of a row that are taken at once, at least
    UNITS_PER_THREAD = 8     # pieces of work, where one can choose

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
    bint by_rows           # which of the two ways
    bint fused             # whether anything but a plain normalisation or gradient is written
    bint residual_past_cache  # whether dresidual is written past the cache where out is
    int threads
    Py_ssize_t blocks      # that a channel is cut into
    Py_ssize_t per_unit    # tiles, blocks or pieces in a unit
    Py_ssize_t units       # per tile in step SUM
    double* sums           # two of each channel (or lane) and block
    double* k              # what the sums of a gradient are shifted by, a channel (or lane)
    bint shifted           # whether any of those is not 0
    double cancelled       # the part of itself down to which sum(x * x) may cancel
    Py_ssize_t tile        # channels in a tile of runs
    void* table            # coefficients of each channel from `begin` on
    Py_ssize_t row         # from one row of it to the next
    # rows only
    Py_ssize_t begin       # the panel: its channels,
    Py_ssize_t end
    Py_ssize_t stride      # values from one row to the next, in the whole array
    Py_ssize_t width       # values of a row in this panel
    Py_ssize_t full_rows
    Py_ssize_t tail        # values of the shorter row behind them, if any
    Py_ssize_t block_rows
    Py_ssize_t side        # of these are summed side by side
    Py_ssize_t padded      # width in full packs: the length of an array of lane sums
    Py_ssize_t wrapped     # padded and a pack more: the row of the table of lanes begins again
    void* lanes            # coefficients of each lane

cdef struct Fusion:        # of the job, for the values that a line of memory begins with
    bint activated
    double slope
    uint16_t* signs
    Py_ssize_t first_bit
    const void* residual
    void* dresidual
    bint residual_past_cache
    bint fixed             # whether statistics are constants for dx

# ----------------------------------------------------------------------------------------- packs
# `count` packs, each `stride` values after the one before; of each only the first `lanes` exist.
# The results add to what a and b point to.


cdef inline void sum_packs(
    Job* job,
    const real* x, const real* dy, Py_ssize_t count, Py_ssize_t stride, int lanes,  # IN
    Pack[double] k,
    bint gradient, bint shifted, bint fused,                # known where this is compiled
    Pack[double]* a, Pack[double]* b,                       # IN/OUT: of d, d * d or of g, g * d
) noexcept nogil:
    """Sum d = x - k (x where not shifted) and its square, or g (dy) and its product with d."""
    cdef unsigned signs
    cdef Pack[double] sum_a = a[0], sum_b = b[0], d, g
    cdef Py_ssize_t i, bit = job.first_bit + (dy - <const real*>job.dy) if fused else 0
    for i in range(count):
        d = load_wide(x + i * stride, lanes)
        if shifted:
            d = d - k
        if not gradient:
            g = d
        elif fused:
            signs = get_bits(job.signs, bit + i * stride)
            if shifted:
                g = load_wide(dy + i * stride, lanes)
                g = leaky_relu(<const double*>NULL, signs, g, job.slope)
            else:  # slope is 0
                g = wide(dy, leaky_relu(dy, signs, load(dy + i * stride, lanes), 0))
        else:
            g = load_wide(dy + i * stride, lanes)
        sum_a = sum_a + g
        if shifted:
            sum_b = sum_b + g * d
        else:
            sum_b = add_exact_product(sum_b, g, d)
    a[0], b[0] = sum_a, sum_b


cdef inline void add_packs(
    Job* job,
    const real* x, const real* dy, Py_ssize_t count, Py_ssize_t stride, int lanes,  # dy may be NULL
    Pack[double] k, bint shifted,
    Pack[double]* a, Pack[double]* b,                                               # IN/OUT
) noexcept nogil:
    if lanes < LANES:
        k = keep_first(k, lanes)
    if dy == NULL:
        if shifted or real is double:
            sum_packs(job, x, dy, count, stride, lanes, k, False, True, False, a, b)
        else:
            sum_packs(job, x, dy, count, stride, lanes, k, False, False, False, a, b)
    elif job.signs == NULL:
        if shifted or real is double:
            sum_packs(job, x, dy, count, stride, lanes, k, True, True, False, a, b)
        else:
            sum_packs(job, x, dy, count, stride, lanes, k, True, False, False, a, b)
    elif shifted or real is double or job.slope != 0:  # whose products with dy are not exact
        sum_packs(job, x, dy, count, stride, lanes, k, True, True, True, a, b)
    else:
        sum_packs(job, x, dy, count, stride, lanes, k, True, False, True, a, b)


cdef inline char* moved(const void* p, Py_ssize_t bytes) noexcept nogil:
    return <char*>NULL if p == NULL else <char*>p + bytes


cdef inline Fusion fusion_of(Work* w, Py_ssize_t offset) noexcept nogil:
    """Return what is fused with values that lie so far behind the first one."""
    cdef Fusion f
    cdef Py_ssize_t bytes = offset * w.job.itemsize
    f.activated, f.slope = w.job.activated, w.job.slope
    f.signs, f.first_bit = w.job.signs, w.job.first_bit + offset
    f.residual, f.dresidual = moved(w.job.residual, bytes), moved(w.job.dresidual, bytes)
    f.residual_past_cache = w.residual_past_cache
    f.fixed = w.job.operation == BACKWARD_FIXED
    return f


cdef inline Pack[real] normalized(
    const real* x, Py_ssize_t i, int lanes, bint fused, Fusion f,
    Pack[real] center, Pack[real] scale, Pack[real] shift,
) noexcept nogil:
    cdef Pack[real] a = (load(x + i, lanes) - center) * scale + shift
    cdef unsigned signs
    if fused:
        if f.residual != NULL:
            a = a + load(<const real*>f.residual + i, lanes)
        if f.activated:
            signs = signs_of(x, a)
            if f.signs != NULL:
                put_bits(f.signs, f.first_bit + i, signs, lanes)
            a = leaky_relu(x, signs, a, f.slope)
    return a


cdef inline Pack[real] gradient(
    const real* x, const real* dy, Py_ssize_t i, int lanes, bint fused, Fusion f,
    Pack[real] center, Pack[real] scale, Pack[real] residue, Pack[real] slope, Pack[real] level,
) noexcept nogil:
    cdef Pack[real] g = load(dy + i, lanes)
    if fused:
        if f.signs != NULL:
            g = leaky_relu(dy, get_bits(f.signs, f.first_bit + i), g, f.slope)
        if f.dresidual != NULL:
            write_pack(<real*>f.dresidual + i, g, lanes, f.residual_past_cache)
        if f.fixed:
            return g * scale
    return ((g - level) - ((load(x + i, lanes) - center) * slope + residue)) * scale


cdef inline void write_result(
    const real* x, const real* dy, real* out, Py_ssize_t i, int lanes,   # IN, IN or NULL, OUT
    bint fused, Fusion f, bint past_cache,
    Pack[real] center, Pack[real] scale, Pack[real] shift, Pack[real] slope, Pack[real] level,
) noexcept nogil:
    cdef Pack[real] a
    if dy == NULL:
        a = normalized(x, i, lanes, fused, f, center, scale, shift)
    else:
        a = gradient(x, dy, i, lanes, fused, f, center, scale, shift, slope, level)
    write_pack(out + i, a, lanes, past_cache)


cdef inline void write_pack(real* out, Pack[real] a, int lanes, bint past_cache) noexcept nogil:
    if past_cache and lanes == LANES:
        store_past_cache(out, a)
    else:
        store(out, a, lanes)


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
    cdef Pack[double] count = fill(job.count), zero = fill(0.0)
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
    cdef Pack[double] eps = fill(job.eps), mean, scale, shift, low
    cdef Py_ssize_t c, i
    cdef int lanes
    for c from begin <= c < end by LANES:
        lanes, i = min(end - c, <Py_ssize_t>LANES), c - w.begin
        mean = load(job.mean + c, lanes)
        scale = load(job.gamma + c, lanes) / square_root(load(job.var + c, lanes) + eps)
        low = mean - put_values(type, w.table, CENTER * w.row + i, mean, lanes)
        shift = load(job.beta + c, lanes) - (low + load(job.mean_low + c, lanes)) * scale
        put_values(type, w.table, SCALE * w.row + i, scale, lanes)
        put_values(type, w.table, SHIFT * w.row + i, shift, lanes)


cdef void choose_shifts(const real* type, Work* w) noexcept nogil:
    """Choose what x is shifted by in sum(dy * x): the mean, where that would cancel."""
    cdef Job* job = w.job
    cdef Py_ssize_t c
    for c in range(job.channels):
        w.k[c] = 0
        if real is double or job.mean[c] * job.mean[c] * CANCELLED > job.var[c]:
            w.k[c], w.shifted = job.mean[c], True


cdef void gradient_coefficients(
    const real* type, Work* w, Py_ssize_t begin, Py_ssize_t end  # dgamma holds sum(dy * (x - k))
) noexcept nogil:
    cdef Job* job = w.job
    cdef Pack[double] eps = fill(job.eps), count = fill(job.count), one = fill(1.0)
    cdef Pack[double] mean, low, rstd, dbeta, dgamma, scale, slope, level, lost
    cdef Py_ssize_t c, i
    cdef int lanes
    for c from begin <= c < end by LANES:
        lanes, i = min(end - c, <Py_ssize_t>LANES), c - w.begin
        mean, low = load(job.mean + c, lanes), load(job.mean_low + c, lanes)
        rstd = one / square_root(load(job.var + c, lanes) + eps)
        dbeta, dgamma = load(job.dbeta + c, lanes), load(job.dgamma + c, lanes)
        if job.operation != APPLY:
            dgamma = (dgamma - (mean - load(w.k + c, lanes) + low) * dbeta) * rstd
            store(job.dgamma + c, dgamma, lanes)
        scale = load(job.gamma + c, lanes) * rstd
        slope, level = rstd * (dgamma / count), dbeta / count
        low = low + (mean - put_values(type, w.table, CENTER * w.row + i, mean, lanes))
        put_values(type, w.table, SCALE * w.row + i, scale, lanes)
        put_values(type, w.table, SLOPE * w.row + i, slope, lanes)
        lost = level - put_values(type, w.table, LEVEL * w.row + i, level, lanes)
        put_values(type, w.table, RESIDUE * w.row + i, lost - low * slope, lanes)


cdef inline Py_ssize_t ceil_div(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b


cdef void write_all(Work* w, Py_ssize_t count) noexcept nogil:
    """Cut what is to be written into units of whole lines of the cache, as far as those go."""
    cdef Py_ssize_t units = UNITS_PER_THREAD * w.threads if w.threads > 1 else 1
    w.step = WRITE
    w.per_unit = ceil_div(ceil_div(count, units), 64) * 64
    run_units(do_unit, w, ceil_div(count, w.per_unit), w.threads)


include "runs.pxi"
include "rows.pxi"


# ---------------------------------------------------------------------------------- entry points


cdef void unit_of(const real* x, Work* w, Py_ssize_t unit) noexcept nogil:
    cdef Py_ssize_t first = w.begin * w.job.inner  # where a panel of rows begins
    cdef const real* dy = <const real*>w.job.dy
    cdef real* out = <real*>w.job.out
    if w.by_rows:
        unit_of_rows(x + first, at(dy, first), out + first, w, unit)
    else:
        unit_of_runs(x, dy, out, w, unit)
    if w.job.past_cache:
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
    return ceil_div(doubles, 8) * 8


cdef Py_ssize_t lay_out(const real* x, Work* w, double* scratch) noexcept nogil:
    """Lay the arrays out in scratch (NULL: do not); return how many doubles they need."""
    cdef Job* job = w.job
    cdef Py_ssize_t shifts = whole_lines(job.channels), table = TABLE * shifts, sums = 0, lanes = 0
    if w.by_rows:
        choose_rows(w, 0)
        if w.width == w.end - w.begin:  # a lane is a channel: the table of lanes is enough
            table = 0
        shifts += w.padded
        lanes = TABLE * w.wrapped + LANES
    else:
        w.blocks = blocks_of_runs(job)
    if job.operation != INFERENCE and job.operation != APPLY:
        sums = whole_lines(2 * w.blocks * (w.padded if w.by_rows else job.channels))
    if scratch != NULL:
        w.table = align(scratch)
        w.row = job.channels
        w.k = <double*>w.table + table
        w.sums = w.k + shifts
        # Where stores to out are aligned, so shall be loads of the coefficients.
        w.lanes = <char*>(w.sums + sums) + (LANES - lanes_to_line(<real*>job.out)) * element_size(x)
    return table + shifts + sums + lanes + 8


cdef Py_ssize_t run_typed(const real* x, Job* job, int threads, double* scratch) noexcept nogil:
    """Run a job of one group; with scratch NULL only return how many doubles of that it needs."""
    cdef Work w
    cdef Py_ssize_t needed
    w.job = job
    w.by_rows = job.inner < LANES
    w.begin = 0
    w.shifted = False
    w.threads = threads
    w.cancelled = CANCELLED if job.out != NULL else 1  # who asks for moments alone wants each digit
    needed = lay_out(x, &w, scratch)
    if scratch == NULL:
        return needed
    w.fused = job.activated or job.residual != NULL or job.dresidual != NULL
    w.fused = w.fused or job.operation == BACKWARD_FIXED
    w.residual_past_cache = (
        job.past_cache
        and lanes_to_line(<real*>job.dresidual) == lanes_to_line(<real*>job.out)
    )
    if job.dy != NULL:
        choose_shifts(x, &w)
    if w.by_rows:
        run_rows(x, &w)
    else:
        run_runs(x, &w)
    return needed


cdef Py_ssize_t run_group(Job* job, int threads, double* scratch) noexcept nogil:
    if job.type == FLOAT32:
        return run_typed(<const float*>job.x, job, threads, scratch)
    if job.type == FLOAT16:
        return run_typed(<const Half*>job.x, job, threads, scratch)
    if job.type == BFLOAT16:
        return run_typed(<const Bfloat*>job.x, job, threads, scratch)
    return run_typed(<const double*>job.x, job, threads, scratch)


cdef Job group_of(Job* job, Py_ssize_t index) noexcept nogil:
    cdef Job group = job[0]
    cdef Py_ssize_t offset = index * job.outer * job.channels * job.inner
    cdef Py_ssize_t bytes = offset * job.itemsize
    cdef Py_ssize_t channels = index * job.channels
    group.outer = min(job.outer, job.examples - index * job.outer)
    group.count = <double>group.outer * group.inner
    group.x, group.out = moved(job.x, bytes), moved(job.out, bytes)
    group.dy = moved(job.dy, bytes)
    group.residual, group.dresidual = moved(job.residual, bytes), moved(job.dresidual, bytes)
    group.first_bit += offset
    group.mean += channels
    group.mean_low += channels
    group.var += channels
    if job.dy != NULL:
        group.dgamma += channels
        group.dbeta += channels
    return group


cdef struct Groups:
    Job* job
    Py_ssize_t count
    Py_ssize_t per_unit
    int threads               # for each group
    Py_ssize_t scratch_size   # for a unit
    double* scratch


cdef void do_groups(void* groups, Py_ssize_t unit) noexcept nogil:
    cdef Groups* g = <Groups*>groups
    cdef Py_ssize_t first = unit * g.per_unit, i
    cdef Job group
    for i in range(first, min(first + g.per_unit, g.count)):
        group = group_of(g.job, i)
        run_group(&group, g.threads, g.scratch + unit * g.scratch_size)


cdef int run(Job* job) noexcept nogil:
    cdef Groups g
    cdef double bytes = <double>job.examples * job.channels * job.inner * job.itemsize
    cdef int threads = threads_for(2 * bytes)
    cdef Py_ssize_t units = 1
    cdef Job last
    job.past_cache = (
        bytes > PAST_CACHE * cache_size()
        and job.out != NULL and job.out != job.x and job.out != job.dy and job.out != job.residual
    )
    g.job, g.count, g.threads = job, ceil_div(job.examples, job.outer), threads
    if threads > 1 and g.count > 1 and threads_for(2 * bytes / g.count) == 1:
        g.threads = 1  # one thread for a group, several groups at once
        units = min(g.count, <Py_ssize_t>UNITS_PER_THREAD * threads)
    g.per_unit = ceil_div(g.count, units)
    units = ceil_div(g.count, g.per_unit)
    g.scratch_size = run_group(job, g.threads, NULL)
    if g.count > 1:
        last = group_of(job, g.count - 1)  # may be shorter, which lays it out in another way
        g.scratch_size = max(g.scratch_size, run_group(&last, g.threads, NULL))
    g.scratch = <double*>malloc(units * g.scratch_size * sizeof(double))
    if g.scratch == NULL:
        return -1
    if g.count == 1:
        run_group(job, threads, g.scratch)
    else:
        run_units(do_groups, &g, units, threads)
    free(g.scratch)
    return 0


# What `functional` calls: a function of the type KernelFunction in job.pxd.
kernel = PyCapsule_New(<void*>run, "fastbn.kernels.run", NULL)
