# The walk over rows (inner < 16): lanes go across the channels. Behind a mask inner is 1, and rows
# are made of valid positions.


cdef void choose_panel(Walk* w, Py_ssize_t begin) noexcept nogil:
    """Choose the panel that begins at a channel, and describe its rows."""
    cdef Job* job = w.job
    cdef Panel* panel = &w.panel
    cdef Py_ssize_t narrow = job.channels * job.inner
    cdef Py_ssize_t outer = job.outer if job.runs == NULL else job.valid_count
    panel.fold = max(1, min(MIN_WIDTH // narrow, outer))
    panel.begin, panel.end = begin, min(begin + ceil_div(PANEL, job.inner), job.channels)
    panel.start = begin * job.inner
    panel.stride = panel.fold * narrow
    panel.width = panel.fold * (panel.end - panel.begin) * job.inner
    panel.full_rows = outer // panel.fold
    panel.tail = (outer - panel.full_rows * panel.fold) * narrow
    panel.block_rows = max(LEAST_ROWS, min(BLOCK_OF_ROWS // panel.stride, <Py_ssize_t>MOST_ROWS))
    panel.padded = ceil_div(panel.width, LANES) * LANES
    if job.runs != NULL:
        panel.padded += LANES  # sums of a pack may begin at any lane
    panel.wrapped = panel.padded + LANES
    w.blocks = ceil_div(panel.full_rows, panel.block_rows)


cdef inline Py_ssize_t place_of_lane(Walk* w, Py_ssize_t row, Py_ssize_t lane) noexcept nogil:
    """Return where in memory the value of a row and a lane of the panel is."""
    cdef Panel* panel = &w.panel
    cdef Py_ssize_t each = panel.end - panel.begin
    if w.job.runs == NULL:
        return panel.start + row * panel.stride + lane
    return place_of(w.job, panel.begin + lane % each, row * panel.fold + lane // each)


cdef void read_row(Walk* w, Py_ssize_t row, Py_ssize_t width, double* into) noexcept nogil:
    """Read the first lanes of a row of the panel; into has room for a pack more."""
    cdef Panel* panel = &w.panel
    cdef Py_ssize_t each = width if w.job.runs == NULL else panel.end - panel.begin, i
    for i from 0 <= i < width by each:
        w.loops.widen_into(into + i, w.job.x, place_of_lane(w, row, i), min(each, width - i))


cdef inline Py_ssize_t rows_of_block_of_panel(const Panel* panel, Py_ssize_t index) noexcept nogil:
    return min(panel.full_rows - index * panel.block_rows, panel.block_rows)


cdef void sum_rows(
    Walk* w, Columns columns, Py_ssize_t row, Py_ssize_t lane, const double* k, double* a, double* b
) noexcept nogil:
    """Sum columns of some rows, which begin at a row and a lane of the panel.

    Behind a mask a row is made of `fold` valid positions, so it may be in pieces.
    """
    cdef Job* job = w.job
    cdef Panel* panel = &w.panel
    cdef Py_ssize_t each = panel.end - panel.begin, f = 0, length, whole, count, first, last, at
    cdef Py_ssize_t index = job.valid_before + row * panel.fold
    cdef Py_ssize_t end = index + columns.rows * panel.fold, end_lane = lane + columns.width
    cdef const Run* run
    if job.runs == NULL:
        columns.start = panel.start + row * panel.stride + lane
        w.loops.sum_columns(job[0], columns, k, a, b)
        return
    memset(a, 0, ceil_div(columns.width, LANES) * LANES * sizeof(double))
    memset(b, 0, ceil_div(columns.width, LANES) * LANES * sizeof(double))
    columns.added = True
    run = run_of_valid(job, index)
    while index < end:
        # Take the rest of a row, or whole rows, or the beginning of one.
        length = min(run[1].before, end) - index
        whole = length // panel.fold if f == 0 else 0
        count = panel.fold if whole else min(length, panel.fold - f)
        columns.rows = max(whole, 1)
        first, last = max(f * each, lane), min((f + count) * each, end_lane)
        if first < last:
            at = run.position - job.first_position + (index - run.before)
            columns.start = panel.start + at * job.channels + first - f * each
            columns.width = last - first
            first -= lane
            w.loops.sum_columns(
                job[0], columns, <const double*>NULL if k == NULL else k + first, a + first,
                b + first
            )
        f = (f + count) % panel.fold
        index += count * columns.rows
        run += index == run[1].before


cdef void sum_block(
    Walk* w, Columns columns, Py_ssize_t row, Py_ssize_t lane, const double* k, double* a, double* b
) noexcept nogil:
    """Do as sum_rows; of float64 (a strip at most) in steps, with what their sums lose."""
    # 544 is STRIP and 2 * LANES; Cython does not accept the names as an array size here.
    cdef double part_a[544]
    cdef double part_b[544]
    cdef double low_a[544]
    cdef double low_b[544]
    cdef Py_ssize_t rows = columns.rows, padded = ceil_div(columns.width, LANES) * LANES, r, j
    if w.loops.exact_products or rows <= STEP_OF_ROWS:
        sum_rows(w, columns, row, lane, k, a, b)
        return
    for j in range(padded):
        a[j] = b[j] = low_a[j] = low_b[j] = 0
    for r from 0 <= r < rows by STEP_OF_ROWS:
        columns.rows = min(rows - r, <Py_ssize_t>STEP_OF_ROWS)
        sum_rows(w, columns, row + r, lane, k, part_a, part_b)
        for j in range(padded):
            add(&a[j], &low_a[j], part_a[j], True)
        for j in range(padded):
            add(&b[j], &low_b[j], part_b[j], True)
    for j in range(padded):
        a[j] += low_a[j]
        b[j] += low_b[j]


cdef void choose_centers(
    Walk* w, Columns columns, Py_ssize_t row, Py_ssize_t lane, double* k
) noexcept nogil:
    """Choose numbers near the mean of each lane: the means of its first rows in a block."""
    cdef double a[544]
    cdef double b[544]
    cdef Py_ssize_t j
    if lane == 0:
        read_row(w, row, columns.width, k)
    else:
        w.loops.widen_into(k, w.job.x, place_of_lane(w, row, lane), columns.width)
    columns.rows = min(columns.rows, <Py_ssize_t>SIDE)
    sum_rows(w, columns, row, lane, k, a, b)
    for j in range(columns.width):
        k[j] += a[j] / columns.rows


cdef void moments_of_block(
    Walk* w, Columns columns, Py_ssize_t row, Py_ssize_t first, const double* centers, double* a,
    double* b,
) noexcept nogil:
    """Turn the sums of a block into its moments, after summing it again where they cancel.

    The lanes begin at the first; centers, or NULL, is what was subtracted from their values.
    """
    cdef double per_row = 1.0 / columns.rows, limit = w.cancelled, m2
    cdef double k[32]
    cdef const double* origins = w.origins + first
    cdef Py_ssize_t j, width = columns.width
    cdef int lane
    cdef bint cancelled
    columns.ahead = columns.ahead_in_columns = 0
    for j from 0 <= j < width by LANES:
        for lane in range(LANES):
            k[lane] = 0
        columns.width = min(width - j, <Py_ssize_t>LANES)
        if centers != NULL:
            memcpy(k, centers + j, columns.width * sizeof(double))
        cancelled = False
        for lane in range(LANES):
            m2 = b[j + lane] - a[j + lane] * a[j + lane] * per_row
            cancelled |= m2 < b[j + lane] * limit
        if cancelled:
            for lane in range(LANES):
                m2 = b[j + lane] - a[j + lane] * a[j + lane] * per_row
                if m2 < b[j + lane] * limit:
                    # Shift by the mean, rounded to the precision of x. Then d * d is exact,
                    # except for float64.
                    k[lane] = rounded(k[lane] + a[j + lane] * per_row, w.loops.wide)
            sum_block(w, columns, row, first + j, k, a + j, b + j)
        for lane in range(LANES):
            b[j + lane] -= a[j + lane] * a[j + lane] * per_row
            a[j + lane] = (k[lane] - origins[j + lane]) + a[j + lane] * per_row


cdef void chunk_of_panel_blocks(void* walk, Py_ssize_t index) noexcept nogil:
    """Sum one block of the panel, whose number is that of the chunk."""
    cdef Walk* w = <Walk*>walk
    cdef Panel* panel = &w.panel
    cdef double* a = w.sums + 2 * index * panel.padded
    cdef double* b = a + panel.padded
    cdef double centers[544]
    cdef double* k = w.lane_shifts if w.shifted else NULL
    cdef Py_ssize_t row = index * panel.block_rows, j
    cdef Py_ssize_t strip = panel.width if w.loops.exact_products else <Py_ssize_t>STRIP
    cdef Columns columns
    columns.rows, columns.next_row = rows_of_block_of_panel(panel, index), panel.stride
    columns.side = SIDE if w.job.dy == NULL else SIDE // 2
    columns.ahead = AHEAD if panel.width <= strip else 0
    columns.ahead_in_columns, columns.added = 0, False
    for j from 0 <= j < panel.width by strip:
        columns.width = min(strip, panel.width - j)
        if w.job.dy == NULL and not w.loops.exact_products:
            k = centers
            choose_centers(w, columns, row, j, k)
        elif w.shifted:
            k = w.lane_shifts + j
        sum_block(w, columns, row, j, k, a + j, b + j)
        if w.job.dy == NULL:
            moments_of_block(w, columns, row, j, k, a + j, b + j)


cdef void merge_block(Walk* w, Py_ssize_t index) noexcept nogil:
    """Merge a block into the sums or moments of the blocks before it, lane by lane."""
    cdef Py_ssize_t padded = w.panel.padded, j
    cdef double* a = w.sums
    cdef double* b = w.sums + padded
    cdef const double* block_a = w.sums + 2 * index * padded
    cdef const double* block_b = block_a + padded
    cdef double n = <double>index * w.panel.block_rows, delta
    cdef double block_n = rows_of_block_of_panel(&w.panel, index)
    cdef double weight = block_n / (n + block_n), both = n * weight
    cdef double* low_a = w.lows
    cdef double* low_b = w.lows + padded
    if w.job.operation == FORWARD and not w.loops.exact_products:
        for j in range(padded):
            delta = (block_a[j] - a[j]) - low_a[j]
            add(&a[j], &low_a[j], delta * weight, True)
            add(&b[j], &low_b[j], block_b[j] + delta * delta * both, True)
    elif w.job.operation == FORWARD:
        for j in range(padded):
            delta = block_a[j] - a[j]
            a[j] += delta * weight
            b[j] += block_b[j] + delta * delta * both
    else:
        for j in range(padded):
            a[j] += block_a[j]
            b[j] += block_b[j]


cdef void merge_lanes(Walk* w, Py_ssize_t channel) noexcept nogil:
    """Put the lanes of a channel together: their sums, or their moments.

    The last row may be shorter. Its lanes have one value more.
    """
    cdef Job* job = w.job
    cdef Panel* panel = &w.panel
    cdef double* a = w.sums
    cdef double* b = a + panel.padded
    cdef Py_ssize_t f, i, lane, s = statistic_of(job, channel)
    cdef Py_ssize_t first = (channel - panel.begin) * job.inner
    cdef Py_ssize_t tail
    cdef double sum_a = 0, sum_b = 0, x, g
    cdef bint careful = not w.loops.exact_products
    cdef Merged each, all = Merged(0, 0, 0, 0, 0)
    for f in range(panel.fold):
        for i in range(job.inner):
            lane = f * (panel.end - panel.begin) * job.inner + first + i
            if job.operation == FORWARD:
                each = Merged(panel.full_rows, a[lane], 0, b[lane], 0)
                if lane < panel.tail:
                    tail = place_of_lane(w, panel.full_rows, lane)
                    x = w.loops.value_at(job.x, tail) - w.origins[lane]
                    merge(&each, x, 0, 1, careful)
                x = w.origins[lane] - w.origins[first] + (each.mean + each.mean_low)
                merge(&all, x, each.m2 + each.m2_low, each.n, careful)
            else:
                sum_a += a[lane]
                sum_b += b[lane]
                if lane < panel.tail:
                    tail = place_of_lane(w, panel.full_rows, lane)
                    x = w.loops.value_at(job.x, tail) - w.lane_shifts[lane]
                    g = w.loops.gradient_at(job[0], tail)
                    sum_a += g
                    sum_b += g * x
    if job.operation == FORWARD:
        job.mean[s], job.var[s] = all.mean + all.mean_low, all.m2 + all.m2_low
        job.mean_low[s] = w.origins[first]
    else:
        job.dbeta[s], job.dgamma[s] = sum_a, sum_b


cdef void copy_lanes(Walk* w) noexcept nogil:
    """Do as merge_lanes for each channel, where a lane is a channel."""
    cdef Job* job = w.job
    cdef bint forward = job.operation == FORWARD
    cdef Py_ssize_t s = statistic_of(job, w.panel.begin), size = w.panel.width * sizeof(double)
    memcpy((job.mean if forward else job.dbeta) + s, w.sums, size)
    memcpy((job.var if forward else job.dgamma) + s, w.sums + w.panel.padded, size)
    if forward:
        memcpy(job.mean_low + s, w.origins, size)


cdef void sum_panel(Walk* w) noexcept nogil:
    """Sum the blocks of the panel and put them together, in order, and the lanes of a channel."""
    cdef Job* job = w.job
    cdef Panel* panel = &w.panel
    cdef Py_ssize_t channels = panel.end - panel.begin, index, c
    if job.dy != NULL:
        spread(w.shifts + panel.begin, w.lane_shifts, channels, job.inner, panel.padded)
    else:
        read_row(w, 0, panel.width, w.origins)
    share_out(chunk_of_panel_blocks, w, w.blocks, w.threads)
    if job.operation == FORWARD and not w.loops.exact_products:
        memset(w.lows, 0, 2 * panel.padded * sizeof(double))
    for index in range(1, w.blocks):
        merge_block(w, index)
    if job.operation == FORWARD and not w.loops.exact_products and w.blocks > 1:
        for c in range(2 * panel.padded):
            w.sums[c] += w.lows[c]
    if panel.width == channels:
        copy_lanes(w)
    else:
        for c in range(panel.begin, panel.end):
            merge_lanes(w, c)


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


cdef void write_positions(Walk* w, Py_ssize_t first, Py_ssize_t end, bint valid) noexcept nogil:
    """Write the panel's part of some positions: their results, or zeros."""
    cdef Panel* panel = &w.panel
    cdef Py_ssize_t channels = w.job.channels, width = panel.end - panel.begin, count = 1, start
    if width == channels:
        count = end - first  # at once
    while end > first:
        end -= count
        start = panel.start + end * channels
        if valid:
            w.loops.write_rows(
                w.job[0], w.lanes, panel.wrapped, panel.width, start, count * width, 0
            )
        else:
            clear(w.job, start, count * width)


cdef void chunk_of_valid(void* walk, Py_ssize_t chunk) noexcept nogil:
    """Write some positions behind a mask."""
    cdef Walk* w = <Walk*>walk
    cdef Job* job = w.job
    cdef Py_ssize_t base = job.first_position, first = base + chunk * w.per_chunk
    cdef Py_ssize_t end = min(first + w.per_chunk, base + job.outer), begin, upto
    cdef const Run* run = job.runs + run_of_position(job, end)
    while end > first:
        begin = upto = first
        if run > job.runs:
            run -= 1
            begin = max(first, run.position)
            upto = max(first, min(end, run.position + run[1].before - run.before))
        write_positions(w, upto - base, end - base, False)
        write_positions(w, begin - base, upto - base, True)
        end = begin
    if job.past_cache:
        fence()


cdef void walk_rows(Walk* w) noexcept nogil:
    """Sum and write panel by panel."""
    cdef Job* job = w.job
    cdef Panel* panel = &w.panel
    cdef Py_ssize_t chunks
    panel.end = 0
    while panel.end < job.channels:
        choose_panel(w, panel.end)
        if takes_sums(job):
            sum_panel(w)
        make_coefficients(w, panel.begin, panel.end)
        if job.out == NULL:
            continue
        w.loops.spread_table(
            table_of(w, 0), w.lanes, panel.end - panel.begin, job.inner, panel.wrapped
        )
        if job.runs != NULL:
            share_out(chunk_of_valid, w, cut_into_chunks(w, job.outer, 1), w.threads)
        elif panel.width == panel.stride:
            chunks = cut_into_chunks(w, job.outer * job.channels * job.inner, 64)
            share_out(chunk_of_values, w, chunks, w.threads)
        else:
            share_out(chunk_of_panel_rows, w, cut_into_chunks(w, panel.full_rows, 1), w.threads)
