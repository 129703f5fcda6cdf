# The walk over rows (inner < 16): lanes go across the channels.


cdef void choose_panel(Walk* w, Py_ssize_t begin) noexcept nogil:
    """Choose the panel that begins at a channel, and describe its rows."""
    cdef Job* job = w.job
    cdef Panel* panel = &w.panel
    cdef Py_ssize_t narrow = job.channels * job.inner
    panel.fold = max(1, min(MIN_WIDTH // narrow, job.outer))
    panel.begin, panel.end = begin, min(begin + ceil_div(PANEL, job.inner), job.channels)
    panel.start = begin * job.inner
    panel.stride = panel.fold * narrow
    panel.width = panel.fold * (panel.end - panel.begin) * job.inner
    panel.full_rows = job.outer // panel.fold
    panel.tail = (job.outer - panel.full_rows * panel.fold) * narrow
    panel.block_rows = max(LEAST_ROWS, min(BLOCK_OF_ROWS // panel.stride, <Py_ssize_t>MOST_ROWS))
    panel.padded = ceil_div(panel.width, LANES) * LANES
    panel.wrapped = panel.padded + LANES
    w.blocks = ceil_div(panel.full_rows, panel.block_rows)


cdef inline Py_ssize_t rows_of_block_of_panel(const Panel* panel, Py_ssize_t index) noexcept nogil:
    return min(panel.full_rows - index * panel.block_rows, panel.block_rows)


cdef void moments_of_block(Walk* w, Columns columns, double* a, double* b) noexcept nogil:
    """Turn the sums of a block into its moments, after summing it again where they cancel."""
    cdef Wide one = fill(1.0), zero = fill(0.0), limit = fill(w.cancelled)
    cdef Wide per_row = fill(1.0 / columns.rows), sa, sb, k, m2
    cdef double shifts[16]
    cdef double again_a[16]
    cdef double again_b[16]
    cdef Py_ssize_t j, i, start = columns.start, width = columns.width
    cdef int lanes, lane
    columns.ahead = 0
    for j from 0 <= j < width by LANES:
        lanes = min(width - j, <Py_ssize_t>LANES)
        sa, sb = load(a + j, LANES), load(b + j, LANES)
        k = zero if w.loops.exact_products else w.loops.load_at(w.job.x, start + j, lanes)
        m2 = sb - sa * sa * per_row
        if sum_lanes(where_less(m2, sb * limit, one, zero)) > 0:
            # Shifted by the mean, rounded so that d * d is exact, where x is no float64.
            store(shifts, k + sa * per_row, LANES)
            for lane in range(LANES):
                shifts[lane] = w.loops.rounded(shifts[lane])
            k = where_less(m2, sb * limit, load(shifts, LANES), k)
            store(shifts, k, LANES)
            columns.start, columns.width = start + j, lanes
            w.loops.sum_columns(w.job[0], columns, shifts, again_a, again_b)
            sa, sb = load(again_a, LANES), load(again_b, LANES)
            m2 = sb - sa * sa * per_row
        store(a + j, (k - load(w.origins + j, LANES)) + sa * per_row, LANES)
        store(b + j, m2, LANES)


cdef void chunk_of_panel_blocks(void* walk, Py_ssize_t index) noexcept nogil:
    """Sum one block of the panel, whose number is that of the chunk."""
    cdef Walk* w = <Walk*>walk
    cdef Panel* panel = &w.panel
    cdef double* a = w.sums + 2 * index * panel.padded
    cdef double* b = a + panel.padded
    cdef Columns columns
    columns.start = panel.start + index * panel.block_rows * panel.stride
    columns.width = panel.width
    columns.rows, columns.next_row = rows_of_block_of_panel(panel, index), panel.stride
    columns.side = SIDE if w.job.dy == NULL else SIDE // 2
    columns.ahead = AHEAD
    w.loops.sum_columns(w.job[0], columns, w.lane_shifts if w.shifted else NULL, a, b)
    if w.job.dy == NULL:
        moments_of_block(w, columns, a, b)


cdef void merge_block(Walk* w, Py_ssize_t index) noexcept nogil:
    """Take a block into the sums or moments of those before it, all lanes side by side."""
    cdef Py_ssize_t padded = w.panel.padded, j
    cdef double* into = w.sums
    cdef const double* sums = w.sums + 2 * index * padded
    cdef double n = <double>index * w.panel.block_rows
    cdef double block_n = rows_of_block_of_panel(&w.panel, index)
    cdef Wide weight = fill(block_n / (n + block_n)), both = fill(n) * weight, a, b, delta
    for j from 0 <= j < padded by LANES:
        a, b = load(into + j, LANES), load(into + padded + j, LANES)
        if w.job.operation == FORWARD:
            delta = load(sums + j, LANES) - a
            a = a + delta * weight
            b = b + (load(sums + padded + j, LANES) + delta * delta * both)
        else:
            a = a + load(sums + j, LANES)
            b = b + load(sums + padded + j, LANES)
        store(into + j, a, LANES)
        store(into + padded + j, b, LANES)


cdef void merge_lanes(Walk* w, Py_ssize_t channel) noexcept nogil:
    """Put the lanes of a channel together: their sums, or their moments.

    Some lanes have one value more, in the shorter row at the end.
    """
    cdef Job* job = w.job
    cdef Panel* panel = &w.panel
    cdef double* a = w.sums
    cdef double* b = a + panel.padded
    cdef Py_ssize_t f, i, lane, s = statistic_of(job, channel)
    cdef Py_ssize_t first = (channel - panel.begin) * job.inner
    cdef Py_ssize_t last_row = panel.start + panel.full_rows * panel.stride
    cdef double n = 0, lane_n, x, g
    if job.operation == FORWARD:
        job.mean[s], job.var[s], job.mean_low[s] = 0, 0, w.origins[first]
    else:
        job.dbeta[s] = job.dgamma[s] = 0
    for f in range(panel.fold):
        for i in range(job.inner):
            lane = f * (panel.end - panel.begin) * job.inner + first + i
            if job.operation == FORWARD:
                lane_n = panel.full_rows
                if lane < panel.tail:
                    x = w.loops.value_at(job.x, last_row + lane) - w.origins[lane]
                    merge(&a[lane], &b[lane], lane_n, x, 0, 1)
                    lane_n += 1
                x = w.origins[lane] - job.mean_low[s] + a[lane]
                merge(&job.mean[s], &job.var[s], n, x, b[lane], lane_n)
                n += lane_n
            else:
                job.dbeta[s] += a[lane]
                job.dgamma[s] += b[lane]
                if lane < panel.tail:
                    x = w.loops.value_at(job.x, last_row + lane) - w.lane_shifts[lane]
                    g = w.loops.gradient_at(job[0], last_row + lane)
                    job.dbeta[s] += g
                    job.dgamma[s] += g * x


cdef void copy_lanes(Walk* w) noexcept nogil:
    """Do as merge_lanes for each channel, where a lane is a channel."""
    cdef Job* job = w.job
    cdef double* first = job.mean if job.operation == FORWARD else job.dbeta
    cdef double* second = job.var if job.operation == FORWARD else job.dgamma
    cdef Py_ssize_t j, s
    cdef int lanes
    for j from 0 <= j < w.panel.width by LANES:
        lanes, s = min(w.panel.width - j, <Py_ssize_t>LANES), statistic_of(job, w.panel.begin + j)
        store(first + s, load(w.sums + j, lanes), lanes)
        store(second + s, load(w.sums + w.panel.padded + j, lanes), lanes)
        if job.operation == FORWARD:
            store(job.mean_low + s, load(w.origins + j, lanes), lanes)


cdef void sum_panel(Walk* w) noexcept nogil:
    """Sum the blocks of the panel and put them together, in order, and the lanes of a channel."""
    cdef Panel* panel = &w.panel
    cdef Py_ssize_t j, index, c
    if w.job.dy != NULL:
        spread_doubles(
            w.shifts + panel.begin, w.lane_shifts, panel.fold, panel.end - panel.begin,
            w.job.inner, panel.padded,
        )
    else:
        for j from 0 <= j < panel.width by LANES:
            store(
                w.origins + j,
                w.loops.load_at(
                    w.job.x, panel.start + j, min(panel.width - j, <Py_ssize_t>LANES)
                ),
                LANES,
            )
    share_out(chunk_of_panel_blocks, w, w.blocks, w.threads)
    for index in range(1, w.blocks):
        merge_block(w, index)
    if panel.width == panel.end - panel.begin:
        copy_lanes(w)
    else:
        for c in range(panel.begin, panel.end):
            merge_lanes(w, c)


cdef void spread_coefficients(Walk* w) noexcept nogil:
    """Put the coefficients of its channel into each lane of the panel."""
    cdef Panel* panel = &w.panel
    cdef Py_ssize_t size = 8 if w.loops.wide else 4, i
    for i in range(COEFFICIENTS if w.job.dy != NULL else SHIFT + 1):
        w.loops.spread(
            <char*>w.table + i * w.row * size, <char*>w.lanes + i * panel.wrapped * size,
            panel.fold, panel.end - panel.begin, w.job.inner, panel.wrapped,
        )


cdef void chunk_of_values(void* walk, Py_ssize_t chunk) noexcept nogil:
    """Write some values of whole rows."""
    cdef Walk* w = <Walk*>walk
    cdef Panel* panel = &w.panel
    cdef Py_ssize_t first = chunk * w.per_chunk
    cdef Py_ssize_t end = min(first + w.per_chunk, w.job.outer * w.job.channels * w.job.inner)
    w.loops.write_rows(
        w.job[0], w.lanes, panel.wrapped, panel.width, first, end - first, first % panel.width
    )
    if w.job.past_cache:
        fence()


cdef void chunk_of_panel_rows(void* walk, Py_ssize_t chunk) noexcept nogil:
    """Write some rows of a panel that has not all channels."""
    cdef Walk* w = <Walk*>walk
    cdef Panel* panel = &w.panel
    cdef Py_ssize_t first = chunk * w.per_chunk, row
    for row in range(min(first + w.per_chunk, panel.full_rows) - 1, first - 1, -1):
        w.loops.write_rows(
            w.job[0], w.lanes, panel.wrapped, panel.width, panel.start + row * panel.stride,
            panel.width, 0,
        )
    if w.job.past_cache:
        fence()


cdef void walk_rows(Walk* w) noexcept nogil:
    """Sum and write panel by panel."""
    cdef Job* job = w.job
    cdef Panel* panel = &w.panel
    panel.end = 0
    while panel.end < job.channels:
        choose_panel(w, panel.end)
        w.first = panel.begin
        if panel.width == panel.end - panel.begin:  # a lane is a channel
            w.row = panel.wrapped
        if takes_sums(job):
            sum_panel(w)
        make_coefficients(w, panel.begin, panel.end)
        if job.out == NULL:
            continue
        spread_coefficients(w)
        if panel.width == panel.stride:
            share_out(
                chunk_of_values, w, cut(w, job.outer * job.channels * job.inner), w.threads
            )
        else:
            share_out(chunk_of_panel_rows, w, cut(w, panel.full_rows), w.threads)
