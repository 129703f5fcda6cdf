"""The kernels: statistics, normalisation and gradients over one contiguous block of memory.

The shape. Every array is (outer, channels, inner), C-contiguous: NCHW is (N, C, H*W), NHWC is
(N*H*W, C, 1), the course's (n_h, m) is (1, n_h, m). There are two ways to walk it:

- runs (inner >= 16): the values of one channel lie in runs of `inner`, and lanes go along the run.
  The walk takes one tile of channels at a time. A tile that fits in the cache is read from memory
  once.
- rows (inner < 16): lanes go across the channels. A row is `fold` times channels * inner values,
  so that a few channels fill the lanes as well. Very wide rows are taken a panel at a time.

The statistics. Values are cut into blocks. In a block each lane sums x and x*x in float64. Where
the mean is so large that sum(x*x) - sum(x)^2 / n cancels, the block is summed again, of d = x - k
with k its mean, rounded to the precision of x (float for 16-bit types), so that d*d is exact as
well. (float64 values are summed so from the start, with k the mean of the block's first ones. Their
sums keep what rounding takes, step by step [2]_.) Chan's formula
[1]_ merges blocks in order, as distances from the channel's first value, its origin, which keeps
what the mean itself would round away. The mean comes out as two doubles, mean + mean_low.

The elements. y = (x - center) * scale + shift, dx = ((g - level) - ((x - center) * slope +
residue)) * scale, in the precision of x (float for 16-bit types). center is the mean rounded to
that precision, and shift carries the rest. g is dy, or with an activation the gradient of what went
into it: forward leaves a bit for each value, its sign there, and backward goes by that.

The indices. A channel is a place in memory. A statistic (mean, var, dgamma, dbeta) belongs to a
channel of a group of examples, a parameter (gamma, beta) to a channel of all of them.

The same bits everywhere. A pack has 16 lanes in every instruction set. Each operation is one IEEE
operation (contracted only where the product is exact). Neither the blocks nor the order of merging
depend on who computes them. The pool hands the work out in chunks.

.. [1] Chan, Golub, LeVeque, "Algorithms for computing the sample variance", 1983.
.. [2] Ogita, Rump, Oishi, "Accurate sum and dot product", 2005.
"""

from cpython.pycapsule cimport PyCapsule_New
from libc.stdint cimport uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from fastbn.kernels.job cimport APPLY, FORWARD, INFERENCE, Job, Run
from fastbn.kernels.loops cimport (
    LANES,
    MOST_CHANNELS,
    MOST_RUNS,
    Columns,
    Loops,
    Runs,
    Table,
    Wide,
    above_zero,
    fence,
    fill,
    leaky_relu,
    load,
    loops_for,
    prefetch_to_write,
    rounded,
    spread,
    square_root,
    store,
    sum_values,
)
from fastbn.runtime.pool cimport share_out, threads_for

from fastbn.runtime.caches import caches

cdef enum:
    # Changing one of these, or CANCELLED, changes bits.
    BLOCK = 4096             # values of one channel in a block of runs
    BLOCK_OF_ROWS = 65536    # values in a block of rows, about,
    LEAST_ROWS = 128         # but at least so many rows
    MOST_ROWS = 512          # and at most so many
    SIDE = 8                 # rows that are summed side by side; in backward, half as many
    # Of float64, whose sums have no digits to spare:
    STEP_OF_ROWS = 16        # rows that are summed before rounding errors are kept
    SOME = 32                # values of a run whose mean is the first shift; of rows, SIDE
    STRIP = 512              # lanes of rows at a time; this one changes no bits
    # Runs at least this long are summed one by one; in backward, half as long.
    SHORT = 256
    MIN_WIDTH = 64           # values that a row has at least, where the array has as many
    # Changing one of these changes no bits, nor does what is below.
    AHEAD = 8192             # how many values ahead of sums over rows memory is prefetched,
    RUNS_AHEAD = 8192        # and how many bytes ahead of sums over runs
    COLUMNS = 2048           # contiguous values of short runs that are summed side by side
    # Values of a row in a panel, rounded up to whole channels. A short row or the last panel has
    # fewer.
    PANEL = 4096
    CHUNKS_PER_THREAD = 8    # chunks of work for each thread, where the shape allows a choice
    COEFFICIENTS = 5         # of a channel: see Table
    SCRATCH = 1 << 17        # doubles for coefficients and sums of some channels of runs, about

# A block is summed again if sum(x*x) - sum(x)^2/n is below this part of sum(x*x): the mean is then
# above some 4 standard deviations. Down to there at most 4 of float64's 53 bits are lost.
cdef double CANCELLED = 1.0 / 16
cdef double CANCELLED_WIDE = 1.0 / 2  # of float64, which has no digits to spare

# Bytes in a tile of channels, about, and contiguous bytes in it, at most. The second read of a tile
# comes from level 2, or where that is small from the last level.
cdef Py_ssize_t TILE = max(caches.l2 // 2, min(1 << 20, caches.last // 4))
cdef Py_ssize_t SEGMENT = TILE // 32
# A larger result, in bytes, is stored past the cache.
cdef double PAST_CACHE = max(6e6, 0.3 * caches.last)

cdef struct Panel:         # some channels; in a walk over rows also their rows
    Py_ssize_t begin
    Py_ssize_t end
    Py_ssize_t start       # position of its first value
    Py_ssize_t fold        # how many times a row has the channels
    Py_ssize_t stride      # values from one row to the next, in the whole array
    Py_ssize_t width       # values of a row in this panel
    Py_ssize_t full_rows
    Py_ssize_t tail        # values of the shorter row behind them, if any
    Py_ssize_t block_rows
    Py_ssize_t padded      # width in full packs: the length of an array of lane sums
    Py_ssize_t wrapped     # padded and a pack more: the row of the table of lanes begins again

cdef struct Walk:          # of one group of examples
    Job* job
    const Loops* loops
    int threads
    double cancelled       # CANCELLED, or 1 to sum every block again
    bint shifted           # whether x is shifted in sum(dy * x)
    Py_ssize_t blocks      # that a channel is cut into
    Py_ssize_t per_chunk   # tiles, blocks or positions (rows) in a chunk
    Py_ssize_t tile        # channels in a tile of runs
    Py_ssize_t per_tile    # chunks in a tile, where its blocks are summed in several
    Panel panel
    # Scratch memory; see lay_out.
    Py_ssize_t row         # channels in the table, at most
    double* table          # coefficients of each channel; see table_of
    double* shifts         # by which x is shifted in sum(dy * x), one for each channel
    double* lane_shifts    # the same, one for each lane of the panel
    double* origins        # the first value of each lane of the panel
    double* sums           # two of each channel (or lane) and block
    double* lows           # what rounding took from those of each lane
    void* lanes            # coefficients of each lane of the panel, as elements

cdef struct Scratch:       # memory that arrays are cut from; without it they are only counted
    double* memory
    Py_ssize_t reserved    # doubles


cdef inline Py_ssize_t cut_into_chunks(
    Walk* w, Py_ssize_t count, Py_ssize_t whole
) noexcept nogil:
    """Cut positions, or rows, into chunks of multiples of `whole`; return how many."""
    cdef Py_ssize_t chunks = CHUNKS_PER_THREAD * w.threads if w.threads > 1 else 1
    w.per_chunk = ceil_div(ceil_div(count, chunks), whole) * whole
    return ceil_div(count, w.per_chunk)


cdef inline Py_ssize_t ceil_div(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b


cdef inline Py_ssize_t statistic_of(const Job* job, Py_ssize_t channel) noexcept nogil:
    """Return the index of a channel's mean, var, dgamma and dbeta in this group."""
    return job.first_statistic + channel


cdef inline Py_ssize_t parameter_of(const Job* job, Py_ssize_t channel) noexcept nogil:
    """Return the index of a channel's gamma and beta."""
    return channel


cdef inline bint takes_sums(const Job* job) noexcept nogil:
    return job.operation != INFERENCE and job.operation != APPLY


include "masks.pxi"
include "statistics.pxi"
include "runs.pxi"
include "rows.pxi"


# ------------------------------------------------------------------------------------- one group


cdef inline double* reserve(Scratch* scratch, Py_ssize_t doubles) noexcept nogil:
    """Return the next array of so many doubles, which begins on a line of the cache."""
    cdef Py_ssize_t start = scratch.reserved
    scratch.reserved += ceil_div(doubles, 8) * 8
    return <double*>NULL if scratch.memory == NULL else scratch.memory + start


cdef void lay_out(Walk* w, Scratch* scratch) noexcept nogil:
    """Give each array of a walk its memory."""
    cdef Job* job = w.job
    cdef Py_ssize_t columns = job.channels, start
    w.panel.begin, w.row = 0, job.channels
    if job.inner < LANES:
        choose_panel(w, 0)
        columns, w.row = w.panel.padded, w.panel.end
        w.lane_shifts = w.origins = reserve(scratch, columns)  # only one of them is needed
        if not w.loops.exact_products:
            w.lows = reserve(scratch, 2 * columns)
        # Align the lanes' coefficients like out, so that loads are aligned where stores are.
        start = (<uintptr_t>job.out // job.itemsize) % LANES
        w.lanes = reserve(scratch, COEFFICIENTS * w.panel.wrapped + LANES)
        w.lanes = <char*>w.lanes + start * (8 if w.loops.wide else 4)
    else:
        w.blocks = blocks_of_runs(job)
        columns = SCRATCH // (COEFFICIENTS + 2 * w.blocks)
        columns = w.row = min(job.channels, max(columns, <Py_ssize_t>LANES))
    w.table = reserve(scratch, COEFFICIENTS * w.row)
    if takes_sums(job):
        w.sums = reserve(scratch, 2 * w.blocks * columns)
        if job.dy != NULL:
            w.shifts = reserve(scratch, job.channels)


cdef inline Table table_of(const Walk* w, Py_ssize_t first) noexcept nogil:
    """Return the rows of the table, in which the first channel of the panel has this index."""
    cdef Table table
    table.center = w.table - first
    table.scale, table.shift = table.center + w.row, table.center + 2 * w.row
    table.slope, table.level = table.center + 3 * w.row, table.center + 4 * w.row
    return table


cdef Py_ssize_t compute_group(
    Job* job, const Loops* loops, int threads, double* memory
) noexcept nogil:
    """Compute a job of one group; without memory, return how many doubles of it that needs."""
    cdef Walk w
    cdef Scratch scratch
    w.job, w.loops, w.threads = job, loops, threads
    if job.runs != NULL and job.valid_count == 0:
        if memory != NULL:
            finish_without_values(job)
        return 0
    # batch_moments (no y) sums every block again, to keep all digits.
    w.cancelled = 1 if job.out == NULL else CANCELLED if loops.exact_products else CANCELLED_WIDE
    scratch.memory, scratch.reserved = memory, 0
    lay_out(&w, &scratch)
    if memory == NULL:
        return scratch.reserved
    w.shifted = False
    if job.dy != NULL and takes_sums(job):
        choose_shifts(&w)
    if job.inner < LANES:
        walk_rows(&w)
    else:
        walk_runs(&w)
    return scratch.reserved


# ------------------------------------------------------------------------------------- all groups

cdef struct Groups:
    Job* job
    Loops loops
    Py_ssize_t count
    Py_ssize_t per_chunk
    int threads               # for each group
    Py_ssize_t scratch_size   # doubles, for a chunk
    double* scratch


cdef inline char* moved(const void* p, Py_ssize_t bytes) noexcept nogil:
    return <char*>NULL if p == NULL else <char*>p + bytes


cdef Job group_of(Job* job, Py_ssize_t index) noexcept nogil:
    """Return the job of one group."""
    cdef Job group = job[0]
    cdef Py_ssize_t offset = index * job.outer * job.channels * job.inner
    cdef Py_ssize_t bytes = offset * job.itemsize
    group.outer = min(job.outer, job.examples - index * job.outer)
    group.count = <double>group.outer * group.inner
    if job.runs != NULL:
        count_valid(&group, index * job.outer * job.inner)
    group.x, group.dy, group.out = moved(job.x, bytes), moved(job.dy, bytes), moved(job.out, bytes)
    group.residual, group.dresidual = moved(job.residual, bytes), moved(job.dresidual, bytes)
    group.first_bit += offset
    group.first_statistic += index * job.channels
    return group


cdef void chunk_of_groups(void* groups, Py_ssize_t chunk) noexcept nogil:
    cdef Groups* g = <Groups*>groups
    cdef Py_ssize_t first = chunk * g.per_chunk, i
    cdef Job group
    for i in range(first, min(first + g.per_chunk, g.count)):
        group = group_of(g.job, i)
        compute_group(&group, &g.loops, g.threads, g.scratch + chunk * g.scratch_size)


cdef bint past_cache(const Job* job, double bytes) noexcept nogil:
    """Whether out is larger than its share of the cache, and none of the inputs."""
    return (
        bytes > PAST_CACHE
        and job.out != NULL and job.out != job.x and job.out != job.dy and job.out != job.residual
    )


cdef inline Py_ssize_t bytes_into_pack(const Job* job, const void* p) noexcept nogil:
    return <uintptr_t>p % <uintptr_t>(LANES * job.itemsize)


cdef int compute(Job* job) noexcept nogil:
    """Compute a job; return -1 where there is no memory for sums, before anything is written."""
    cdef Groups g
    cdef double bytes = <double>job.examples * job.channels * job.inner * job.itemsize
    cdef int threads = threads_for(2 * bytes)
    cdef Py_ssize_t chunks = 1, step, i
    cdef double* scratch
    cdef Job group
    job.past_cache = past_cache(job, bytes)
    job.residual_past_cache = (
        job.past_cache
        and bytes_into_pack(job, job.dresidual) == bytes_into_pack(job, job.out)
    )
    g.job, g.count, g.threads = job, ceil_div(job.examples, job.outer), threads
    g.loops = loops_for(job[0])
    if threads > 1 and g.count > 1 and threads_for(2 * bytes / g.count) == 1:
        g.threads = 1  # one thread for a group, several groups at once
        chunks = min(g.count, <Py_ssize_t>CHUNKS_PER_THREAD * threads)
    g.per_chunk = ceil_div(g.count, chunks)
    chunks = ceil_div(g.count, g.per_chunk)
    g.scratch_size = 0
    # The last group may be shorter, and behind a mask any, which lays it out in another way.
    step = 1 if job.runs != NULL else max(1, g.count - 1)
    for i from 0 <= i < g.count by step:
        group = group_of(job, i)
        g.scratch_size = max(g.scratch_size, compute_group(&group, &g.loops, g.threads, NULL))
    scratch = <double*>malloc((chunks * g.scratch_size + 8) * sizeof(double))
    if scratch == NULL:
        return -1
    g.scratch = <double*>((<uintptr_t>scratch + 63) // 64 * 64)
    if g.count == 1:
        compute_group(job, &g.loops, threads, g.scratch)
    else:
        share_out(chunk_of_groups, &g, chunks, threads)
    free(scratch)
    return 0


# What `functional` calls: a KernelFunction of job.pxd, and the size of the Job that it takes.
kernel = PyCapsule_New(<void*>compute, "fastbn.kernels.compute", NULL)
job_size = sizeof(Job)
