# The walk over runs (inner >= 16): lanes go along the values of one channel. Behind a mask they go
# along its valid positions, and a block is a piece of these.

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
    if job.runs != NULL:
        return ceil_div(job.valid_count, BLOCK)
    return ceil_div(job.outer, rows_of_block(job)) * pieces_of_run(job)


cdef inline Block block_of_runs(Job* job, Py_ssize_t b) noexcept nogil:
    """Return where block b lies: some whole runs, or a piece of one, or of the valid positions."""
    cdef Block block
    if job.runs != NULL:
        block.first_row, block.end_row, block.first = 0, 1, b * BLOCK
        block.length = min(job.valid_count - block.first, <Py_ssize_t>BLOCK)
        return block
    block.first_row = b // pieces_of_run(job) * rows_of_block(job)
    block.end_row = min(block.first_row + rows_of_block(job), job.outer)
    block.first = b % pieces_of_run(job) * BLOCK
    block.length = min(job.inner - block.first, <Py_ssize_t>BLOCK)
    return block


cdef inline double size_of(Block block) noexcept nogil:
    return <double>block.length * (block.end_row - block.first_row)


cdef inline double* sums_of(Walk* w, Py_ssize_t channel, Py_ssize_t index) noexcept nogil:
    """Return the two sums of a channel's block."""
    return w.sums + 2 * ((channel - w.panel.begin) * w.blocks + index)


cdef Py_ssize_t choose_tile(Walk* w) noexcept nogil:
    """Return how many channels a tile has.

    Each example adds one segment. Long segments are straight lines through memory. All segments of
    a tile should fit in a cache, and each thread needs several tiles. With a residual two streams
    are read, so segments are twice as long.
    """
    cdef Py_ssize_t twice = 1 if w.job.residual == NULL else 2
    cdef Py_ssize_t least = SEGMENT // 16, run = w.job.inner * w.job.itemsize
    cdef Py_ssize_t segment = twice * min(SEGMENT, TILE // w.job.outer)
    if w.threads > 1:
        segment = min(segment, ceil_div(w.job.channels, 4 * w.threads) * run)
    return max(1, max(segment, least) // run)


cdef void sum_long_runs(
    Walk* w, Py_ssize_t begin, Py_ssize_t end, Block block, bint shifted, double k, double* sums
) noexcept nogil:
    """Sum a block of some channels, or a part of one, run by run; sums are those of the first."""
    cdef Job* job = w.job
    cdef Py_ssize_t first
    cdef Runs runs
    if job.runs != NULL:
        first = job.valid_before + block.first
        w.loops.sum_valid(
            job[0], run_of_valid(job, first), first, first + block.length, begin, end - begin,
            shifted, k, sums, 2 * w.blocks,
        )
        return
    runs.start = (block.first_row * job.channels + begin) * job.inner + block.first
    runs.channels, runs.next_channel = end - begin, job.inner
    runs.rows, runs.next_row = block.end_row - block.first_row, job.channels * job.inner
    runs.length, runs.ahead = block.length, RUNS_AHEAD // job.itemsize
    w.loops.sum_runs(job[0], runs, shifted, k, sums, 2 * w.blocks)


cdef double center_of_block(Walk* w, Py_ssize_t c, Block block) noexcept nogil:
    """Return a number near the mean of a block: that of its first values."""
    cdef double first
    cdef double sums[2]
    first = w.loops.value_at(
        w.job.x, place_of(w.job, c, block.first_row * w.job.inner + block.first)
    )
    block.end_row, block.length = block.first_row + 1, min(block.length, <Py_ssize_t>SOME)
    sum_long_runs(w, c, c + 1, block, True, first, sums)
    return first + sums[0] / block.length


cdef void sum_short_runs(
    Walk* w, Py_ssize_t begin, Py_ssize_t end, Block block, Py_ssize_t index
) noexcept nogil:
    """Sum whole rows of short runs position by position, then the positions of each channel."""
    cdef Job* job = w.job
    cdef double a[COLUMNS]
    cdef double b[COLUMNS]
    cdef double* sums
    cdef Columns columns
    cdef Py_ssize_t c
    columns.start = (block.first_row * job.channels + begin) * job.inner
    columns.width = (end - begin) * job.inner
    columns.rows, columns.next_row = block.end_row - block.first_row, job.channels * job.inner
    columns.side = SIDE if job.dy == NULL else SIDE // 2
    columns.ahead, columns.ahead_in_columns = 0, columns.side * columns.next_row
    columns.added = False
    w.loops.sum_columns(job[0], columns, NULL, a, b)
    for c in range(end - begin):
        sums = sums_of(w, begin + c, index)
        sums[0] = sum_values(a + c * job.inner, job.inner)
        sums[1] = sum_values(b + c * job.inner, job.inner)


cdef void finish_block(Walk* w, Py_ssize_t c, Block block, Py_ssize_t index) noexcept nogil:
    """Sum a block again where that is needed; make moments of sums of x."""
    cdef Job* job = w.job
    cdef double* sums = sums_of(w, c, index)
    cdef double k = 0, n = size_of(block)
    if job.dy != NULL:
        if not w.loops.exact_products or w.shifts[c] != 0:
            sum_long_runs(w, c, c + 1, block, True, w.shifts[c], sums)
        return
    if not w.loops.exact_products:
        k = sums[0]
        sum_long_runs(w, c, c + 1, block, True, k, sums)
    if sums[1] - sums[0] * sums[0] / n < sums[1] * w.cancelled:
        # Rounded to the precision of x. Then d * d is exact, except for float64.
        k = rounded(k + sums[0] / n, w.loops.wide)
        sum_long_runs(w, c, c + 1, block, True, k, sums)
    sums[1] -= sums[0] * sums[0] / n
    sums[0] = (k - w.loops.value_at(job.x, place_of(job, c, 0))) + sums[0] / n


cdef void sum_tile(
    Walk* w, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t first_block, Py_ssize_t end_block
) noexcept nogil:
    """Sum some blocks of a tile."""
    cdef Job* job = w.job
    cdef Py_ssize_t index, c, upto = begin
    # How many channels to take at once. Runs longer than a block are summed one channel at a time,
    # so that memory is read in a straight line.
    cdef Py_ssize_t at_once = end - begin if job.inner <= BLOCK else 1
    cdef Py_ssize_t least = SHORT if job.dy == NULL else SHORT // 2
    cdef bint in_columns = job.inner < least and job.outer >= SIDE and job.runs == NULL
    cdef Py_ssize_t side_by_side = COLUMNS // job.inner if in_columns else <Py_ssize_t>MOST_RUNS
    if job.runs != NULL:
        side_by_side = MOST_CHANNELS
    cdef Block block
    while upto < end:
        begin, upto = upto, min(upto + at_once, end)
        for index in range(first_block, end_block):
            block = block_of_runs(job, index)
            if w.loops.exact_products:
                for c from begin <= c < upto by side_by_side:
                    if in_columns:
                        sum_short_runs(w, c, min(c + side_by_side, upto), block, index)
                    else:
                        sum_long_runs(
                            w, c, min(c + side_by_side, upto), block, False, 0, sums_of(w, c, index)
                        )
            elif job.dy == NULL:
                for c in range(begin, upto):
                    sums_of(w, c, index)[0] = center_of_block(w, c, block)
            for c in range(begin, upto):
                finish_block(w, c, block, index)


cdef void finish_runs(Walk* w, Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
    """Put the blocks of some channels together, in order, and make their coefficients."""
    cdef Job* job = w.job
    cdef Py_ssize_t c, s, i
    cdef double* sums
    cdef bint careful = not w.loops.exact_products
    cdef Merged all
    for c in range(begin, end):
        s = statistic_of(job, c)
        all = Merged(0, 0, 0, 0, 0)
        for i in range(w.blocks):
            sums = sums_of(w, c, i)
            if job.operation == FORWARD:
                merge(&all, sums[0], sums[1], size_of(block_of_runs(job, i)), careful)
            else:
                add(&all.mean, &all.mean_low, sums[0], careful)
                add(&all.m2, &all.m2_low, sums[1], careful)
        all.mean += all.mean_low
        all.m2 += all.m2_low
        if job.operation == FORWARD:
            job.mean[s], job.var[s] = all.mean, all.m2
            job.mean_low[s] = w.loops.value_at(job.x, place_of(job, c, 0))
        else:
            job.dbeta[s], job.dgamma[s] = all.mean, all.m2
    make_coefficients(w, begin, end)


cdef void write_tile(Walk* w, Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
    """Write the results of some channels, from the last example to the first."""
    cdef Job* job = w.job
    cdef Py_ssize_t stride = job.channels * job.inner, row, first, size = job.itemsize
    cdef Table table = table_of(w, w.panel.begin)
    for row in range(job.outer - 1, -1, -1):
        first = row * stride
        # The first and last cache lines of a segment are shared with its neighbours, so fetch them
        # before writing.
        if job.past_cache and row:
            prefetch_to_write(<char*>job.out + (first - stride + begin * job.inner) * size)
            prefetch_to_write(<char*>job.out + (first - stride + end * job.inner) * size)
        w.loops.write_runs(
            job[0], table, first + begin * job.inner, first + end * job.inner
        )


cdef void chunk_of_tiles(void* walk, Py_ssize_t chunk) noexcept nogil:
    """Sum and write some tiles."""
    cdef Walk* w = <Walk*>walk
    cdef Py_ssize_t first = chunk * w.per_chunk, tile, begin, end
    cdef Py_ssize_t tiles = ceil_div(w.panel.end - w.panel.begin, w.tile)
    for tile in range(first, min(first + w.per_chunk, tiles)):
        begin = w.panel.begin + tile * w.tile
        end = min(begin + w.tile, w.panel.end)
        sum_tile(w, begin, end, 0, w.blocks)
        finish_runs(w, begin, end)
        if w.job.out != NULL:
            write_tile(w, begin, end)
    if w.job.past_cache:
        fence()


cdef void chunk_of_blocks(void* walk, Py_ssize_t chunk) noexcept nogil:
    """Sum some blocks of a tile."""
    cdef Walk* w = <Walk*>walk
    cdef Py_ssize_t begin = w.panel.begin + chunk // w.per_tile * w.tile
    cdef Py_ssize_t first = chunk % w.per_tile * w.per_chunk
    sum_tile(
        w, begin, min(begin + w.tile, w.panel.end), first, min(first + w.per_chunk, w.blocks)
    )


cdef void chunk_of_positions(void* walk, Py_ssize_t chunk) noexcept nogil:
    """Write some positions of the panel."""
    cdef Walk* w = <Walk*>walk
    cdef Py_ssize_t stride = w.job.channels * w.job.inner, first = chunk * w.per_chunk
    cdef Py_ssize_t segment = (w.panel.end - w.panel.begin) * w.job.inner, row, begin, skipped
    cdef Py_ssize_t end = min(first + w.per_chunk, w.job.outer * segment)
    if segment == stride:
        segment *= w.job.outer  # all values lie together
    while end > first:
        row = (end - 1) // segment
        begin = max(first, row * segment)
        skipped = row * (stride - segment) + w.panel.begin * w.job.inner
        w.loops.write_runs(
            w.job[0], table_of(w, w.panel.begin), begin + skipped, end + skipped
        )
        end = begin
    if w.job.past_cache:
        fence()


cdef void walk_runs(Walk* w) noexcept nogil:
    """Sum and write some channels at a time, as many as there is scratch memory for."""
    cdef Py_ssize_t tile = choose_tile(w)
    w.panel.end = 0
    while w.panel.end < w.job.channels:
        w.panel.begin, w.panel.end = w.panel.end, min(w.panel.end + w.row, w.job.channels)
        w.tile = tile
        if w.row < w.job.channels and w.threads > 1:
            w.tile = min(tile, ceil_div(w.row, 4 * w.threads))
        walk_panel_of_runs(w)


cdef void walk_panel_of_runs(Walk* w) noexcept nogil:
    """Sum and write tile by tile, or first sum blocks and then write, in pieces for threads."""
    cdef Job* job = w.job
    cdef Py_ssize_t channels = w.panel.end - w.panel.begin
    cdef Py_ssize_t tiles = ceil_div(channels, w.tile)
    if not takes_sums(job):
        make_coefficients(w, w.panel.begin, w.panel.end)
    elif w.threads == 1 or tiles >= 4 * w.threads:
        w.per_chunk = ceil_div(tiles, CHUNKS_PER_THREAD * w.threads) if w.threads > 1 else tiles
        share_out(chunk_of_tiles, w, ceil_div(tiles, w.per_chunk), w.threads)
        return
    else:
        w.per_chunk = ceil_div(w.blocks, ceil_div(CHUNKS_PER_THREAD * w.threads, tiles))
        w.per_tile = ceil_div(w.blocks, w.per_chunk)
        share_out(chunk_of_blocks, w, tiles * w.per_tile, w.threads)
        finish_runs(w, w.panel.begin, w.panel.end)
    if job.out != NULL:
        tiles = cut_into_chunks(w, job.outer * channels * job.inner, 64)  # lines of the cache
        share_out(chunk_of_positions, w, tiles, w.threads)
