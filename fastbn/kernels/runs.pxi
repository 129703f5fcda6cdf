# Runs (inner >= 16): lanes go along the values of one channel.


cdef struct Block:
    Py_ssize_t first_row
    Py_ssize_t end_row
    Py_ssize_t first   # of each run
    Py_ssize_t length


cdef inline Py_ssize_t pieces_of_run(Job* job) noexcept nogil:
    return ceil_div(job.inner, BLOCK)


cdef inline Py_ssize_t rows_of_block(Job* job) noexcept nogil:
    return max(1, BLOCK // job.inner)


cdef inline Py_ssize_t blocks_of_runs(Job* job) noexcept nogil:
    return ceil_div(job.outer, rows_of_block(job)) * pieces_of_run(job)


cdef inline Block block_of_runs(Job* job, Py_ssize_t b) noexcept nogil:
    """Return where block b lies: some whole runs, or a piece of one."""
    cdef Block block
    block.first_row = b // pieces_of_run(job) * rows_of_block(job)
    block.end_row = min(block.first_row + rows_of_block(job), job.outer)
    block.first = b % pieces_of_run(job) * BLOCK
    block.length = min(job.inner - block.first, <Py_ssize_t>BLOCK)
    return block


cdef Py_ssize_t tile_channels(Work* w) noexcept nogil:
    """Return how many channels are summed and written before the next.

    Each example adds a segment of memory to the tile. Long ones spare the hardware the search for
    the next one; all of them together should stay in a cache, and there should be tiles enough
    for all threads. Where a residual is read between them, the search is for two.
    """
    cdef Py_ssize_t twice = 1 if w.job.residual == NULL else 2
    cdef Py_ssize_t least = SEGMENT // 16, run = w.job.inner * w.job.itemsize
    cdef Py_ssize_t segment = twice * min(SEGMENT, TILE // w.job.outer)
    if w.threads > 1:
        segment = min(segment, ceil_div(w.job.channels, 4 * w.threads) * run)
    return max(1, max(segment, least) // run)


cdef inline void add_run(
    Job* job, const real* x, const real* dy, Py_ssize_t length, double shift, bint shifted,  # IN
    Pack[double]* a, Pack[double]* b,                                              # IN/OUT
) noexcept nogil:
    cdef Py_ssize_t whole = length // LANES
    cdef int tail = length % LANES
    cdef Pack[double] k = fill(shift)
    add_packs(job, x, dy, whole, LANES, LANES, k, shifted, a, b)
    if tail:
        add_packs(
            job, x + whole * LANES, at(dy, whole * LANES), 1, LANES, tail, k, shifted, a, b
        )


cdef void sum_shifted_block(
    const real* x, const real* dy, Work* w, Py_ssize_t c, Block block, double k,  # IN
    double* a, double* b,                                                         # OUT
) noexcept nogil:
    cdef Py_ssize_t row, i
    cdef Pack[double] sa = fill(0.0), sb = fill(0.0)
    for row in range(block.first_row, block.end_row):
        i = (row * w.job.channels + c) * w.job.inner + block.first
        add_run(w.job, x + i, at(dy, i), block.length, k, True, &sa, &sb)
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
            add_run(w.job, x + i, at(dy, i), block.length, 0, False, &a[c - begin], &b[c - begin])
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
    for j in range(ceil_div(width, LANES)):
        a[j] = b[j] = fill(0.0)
    for row from block.first_row <= row < block.end_row by rows:
        for j from 0 <= j < width by LANES:
            i = row * stride + begin * job.inner + j
            lanes = min(width - j, <Py_ssize_t>LANES)
            add_packs(
                job, x + i, at(dy, i), min(block.end_row - row, rows), stride, lanes,
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
    cdef double rounded[1]
    if dy != NULL:
        if real is double or w.k[c] != 0:
            sum_shifted_block(x, dy, w, c, block, w.k[c], &sums[0], &sums[1])
        return
    if real is double:
        k = value_of(x + (block.first_row * w.job.channels + c) * w.job.inner + block.first)
        sum_shifted_block(x, dy, w, c, block, k, &sums[0], &sums[1])
    if sums[1] - sums[0] * sums[0] / n < sums[1] * w.cancelled:
        put_value(x, rounded, 0, k + sums[0] / n)  # so that d * d is exact, where x is no float64
        k = get_value(x, rounded, 0)
        sum_shifted_block(x, dy, w, c, block, k, &sums[0], &sums[1])
    sums[1] -= sums[0] * sums[0] / n
    sums[0] = (k - value_of(x + c * w.job.inner)) + sums[0] / n


cdef void sum_tile(
    const real* x, const real* dy, Work* w, Py_ssize_t begin, Py_ssize_t end,  # IN
    Py_ssize_t first_block, Py_ssize_t end_block,
) noexcept nogil:
    cdef Job* job = w.job
    cdef Py_ssize_t index, c, upto = begin
    # How many channels to take at once. Runs of several blocks one after the other, for the sake
    # of a straight line through memory.
    cdef Py_ssize_t some = end - begin if job.inner <= BLOCK else 1
    cdef Py_ssize_t least = SHORT if dy == NULL else SHORT // 2
    cdef bint in_columns = job.inner < least and job.outer >= SUM_ROWS
    cdef Py_ssize_t group = COLUMNS // job.inner if in_columns else <Py_ssize_t>MAX_LONG
    cdef Block block
    while upto < end:
        begin, upto = upto, min(upto + some, end)
        for index in range(first_block, end_block):
            block = block_of_runs(job, index)
            if real is not double:
                for c from begin <= c < upto by group:
                    if in_columns:
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
        if job.out != NULL:
            affine_coefficients(x, w, begin, end)
    else:
        gradient_coefficients(x, w, begin, end)


cdef inline void write_line_of_runs(
    const real* x, const real* dy, real* out,         # IN, IN (NULL: normalise), OUT
    Work* w, Py_ssize_t begin, Py_ssize_t end,        # contiguous positions in the array
    bint fused,
) noexcept nogil:
    """Write packs that lie in one line of memory, from the end; a pack may have two channels."""
    cdef Py_ssize_t channels = w.job.channels, row = w.row, inner = w.job.inner
    cdef Py_ssize_t start = (end - 1) // inner * inner  # of the last run, which is of channel
    cdef Py_ssize_t c = start // inner % channels
    cdef Py_ssize_t bottom = min(end, begin + lanes_to_line(out + begin)), p = end, n
    cdef int lanes = (end - bottom) % LANES
    cdef bint past_cache = w.job.past_cache
    cdef Fusion f = fusion_of(w, 0)
    cdef Pack[real] center, scale, shift, slope, level, center0, scale0, shift0, slope0, level0
    center = center0 = fill_value(x, w.table, CENTER * row + c)
    scale = scale0 = fill_value(x, w.table, SCALE * row + c)
    shift = shift0 = fill_value(x, w.table, SHIFT * row + c)
    slope = slope0 = fill_value(x, w.table, SLOPE * row + c)
    level = level0 = fill_value(x, w.table, LEVEL * row + c)
    while p > begin:
        if lanes == 0 and p > bottom:  # whole packs of one channel
            for n in range(min(p - start, p - bottom) // LANES):
                p -= LANES
                write_result(
                    x, dy, out, p, LANES, fused, f, past_cache, center, scale, shift, slope, level
                )
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
        if lanes == LANES:  # known where this is compiled
            write_result(
                x, dy, out, p, LANES, fused, f, past_cache, center, scale, shift, slope, level
            )
        else:
            write_result(
                x, dy, out, p, lanes, fused, f, False, center, scale, shift, slope, level
            )
        center, scale, shift, slope, level = center0, scale0, shift0, slope0, level0
        lanes = 0


cdef void write_runs(
    const real* x, const real* dy, real* out,         # IN, IN (NULL: normalise), OUT
    Work* w, Py_ssize_t begin, Py_ssize_t end,        # contiguous positions in the array
) noexcept nogil:
    if w.fused and dy == NULL:
        write_line_of_runs(x, <const real*>NULL, out, w, begin, end, True)
    elif w.fused:
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
    cdef Py_ssize_t first = unit * w.per_unit, tile, begin, end, row
    if w.step == SUM:
        begin = unit // w.units * size
        first = unit % w.units * w.per_unit
        sum_tile(
            x, dy, w, begin, min(begin + size, job.channels),
            first, min(first + w.per_unit, w.blocks),
        )
    elif w.step == WRITE:
        write_runs(x, dy, out, w, first, min(first + w.per_unit, job.outer * stride))
    else:
        for tile in range(first, min(first + w.per_unit, ceil_div(job.channels, size))):
            begin, end = tile * size, min((tile + 1) * size, job.channels)
            sum_tile(x, dy, w, begin, end, 0, w.blocks)
            finish_runs(x, w, begin, end)
            if out == NULL:
                continue
            for row in range(job.outer - 1, -1, -1):
                first = row * stride
                if w.job.past_cache and row:  # of its first and last line, part lies outside
                    prefetch_to_write(out + first - stride + begin * job.inner)
                    prefetch_to_write(out + first - stride + end * job.inner)
                write_runs(x, dy, out, w, first + begin * job.inner, first + end * job.inner)


cdef void run_runs(const real* x, Work* w) noexcept nogil:
    cdef Job* job = w.job
    cdef Py_ssize_t tiles
    w.tile = tile_channels(w)
    tiles = ceil_div(job.channels, w.tile)
    if job.operation == INFERENCE:
        affine_coefficients(x, w, 0, job.channels)
    elif job.operation == APPLY:
        gradient_coefficients(x, w, 0, job.channels)
    elif w.threads == 1 or tiles >= 4 * w.threads:
        w.step = TILES
        w.per_unit = ceil_div(tiles, UNITS_PER_THREAD * w.threads) if w.threads > 1 else tiles
        run_units(do_unit, w, ceil_div(tiles, w.per_unit), w.threads)
        return
    else:
        w.step = SUM
        w.per_unit = ceil_div(w.blocks, ceil_div(UNITS_PER_THREAD * w.threads, tiles))
        w.units = ceil_div(w.blocks, w.per_unit)
        run_units(do_unit, w, tiles * w.units, w.threads)
        finish_runs(x, w, 0, job.channels)
    if job.out != NULL:
        write_all(w, job.outer * job.channels * job.inner)
