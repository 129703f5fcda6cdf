# Rows (inner < 16): lanes go across the channels.


cdef void choose_rows(Work* w, Py_ssize_t begin) noexcept nogil:
    """Choose the panel that begins at a channel, and describe its rows."""
    cdef Job* job = w.job
    cdef Py_ssize_t narrow = job.channels * job.inner, fold
    fold = max(1, min(MIN_WIDTH // narrow, job.outer))
    w.begin, w.end = begin, min(begin + ceil_div(PANEL, job.inner), job.channels)
    w.stride = fold * narrow
    w.width = fold * (w.end - begin) * job.inner
    w.full_rows = job.outer // fold
    w.tail = (job.outer - w.full_rows * fold) * narrow
    w.block_rows = max(LEAST_ROWS, min(BLOCK_OF_ROWS // w.stride, <Py_ssize_t>MOST_ROWS))
    # No constant: where the compiler unrolls by it, loads of x and dy that lie alike in their pages
    # get in each other's way, which took backward up to 1.6 times as long.
    w.side = SUM_ROWS if job.dy == NULL else SUM_ROWS // 2
    w.blocks = ceil_div(w.full_rows, w.block_rows)
    w.padded = ceil_div(w.width, LANES) * LANES
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
    return w.k + whole_lines(w.job.channels)


cdef inline void add_rows(
    Job* job, const real* x, const real* dy, Py_ssize_t stride, Py_ssize_t rows, int lanes,  # IN
    Pack[double] k, bint shifted,
    Pack[double]* a, Pack[double]* b,                                              # IN/OUT
) noexcept nogil:
    """Add a column of packs, in the order in which whole rows are added."""
    cdef Py_ssize_t row
    for row from 0 <= row < rows by SUM_ROWS:
        add_packs(
            job, x + row * stride, at(dy, row * stride),
            min(rows - row, <Py_ssize_t>SUM_ROWS), stride, lanes, k, shifted, a, b,
        )


cdef void moments_of_rows(
    const real* x, const real* block, Work* w, Py_ssize_t rows,  # IN: the panel, its block
    double* a, double* b,                                        # IN/OUT: sums, moments
) noexcept nogil:
    """Turn the sums of a block into its moments, after summing it again where they cancel."""
    cdef Pack[double] one = fill(1.0), zero = fill(0.0), limit = fill(w.cancelled)
    cdef Pack[double] per_row = fill(1.0 / rows), sa, sb, k, m2
    cdef double rounded[LANES]
    cdef Py_ssize_t j
    cdef int lanes
    for j from 0 <= j < w.width by LANES:
        lanes = min(w.width - j, <Py_ssize_t>LANES)
        sa, sb = load(<const double*>a + j, LANES), load(<const double*>b + j, LANES)
        k = load_wide(block + j, lanes) if real is double else zero
        m2 = sb - sa * sa * per_row
        if sum_lanes(where_less(m2, sb * limit, one, zero)) > 0:
            # Rounded, so that d * d is exact, where x is no float64.
            sa = put_values(x, rounded, 0, k + sa * per_row, LANES)
            k = where_less(m2, sb * limit, sa, k)
            sa = sb = zero
            add_rows(w.job, block + j, <const real*>NULL, w.stride, rows, lanes, k, True, &sa, &sb)
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
    cdef Py_ssize_t rows = min(w.full_rows - first_row, w.block_rows)
    cdef Pack[double] sa, sb, shift = fill(0.0)
    cdef int lanes
    cdef Py_ssize_t values_in_line = LINE // sizeof(real)
    for j in range(2 * w.padded):
        a[j] = 0
    for row from 0 <= row < rows by w.side:
        for j from 0 <= j < w.width by LANES:
            i = (first_row + row) * w.stride + j
            lanes = min(w.width - j, <Py_ssize_t>LANES)
            sa, sb = load(<const double*>a + j, LANES), load(<const double*>b + j, LANES)
            if dy != NULL:
                if w.shifted:
                    shift = load(<const double*>k + j, LANES)
                add_packs(
                    w.job, x + i, dy + i, min(rows - row, w.side), w.stride, lanes, shift,
                    w.shifted, &sa, &sb,
                )
            else:
                if real is double:
                    shift = load_wide(x + first_row * w.stride + j, lanes)
                add_packs(
                    w.job, x + i, dy, min(rows - row, w.side), w.stride, lanes, shift,
                    False, &sa, &sb,
                )
            store(a + j, sa, LANES)
            store(b + j, sb, LANES)
            for t in range(w.side * LANES // values_in_line):
                i = (first_row + row) * w.stride + j * w.side + t * values_in_line
                i += PREFETCH_DISTANCE
                prefetch(x + i)
                if dy != NULL:
                    prefetch(dy + i)
    if dy == NULL:
        moments_of_rows(x, x + first_row * w.stride, w, rows, a, b)


cdef void merge_lanes(Work* w, Py_ssize_t block) noexcept nogil:
    """Take a block into the sums or moments of those before it, all lanes side by side."""
    cdef double* into = w.sums
    cdef const double* sums = w.sums + 2 * block * w.padded
    cdef double n = <double>block * w.block_rows
    cdef double block_n = min(w.full_rows - block * w.block_rows, w.block_rows)
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
    cdef const real* last_x = x + w.full_rows * w.stride
    cdef const real* last_dy
    cdef Py_ssize_t bit
    cdef double n, block_n, distance, g
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
                        distance = value_of(last_x + j) - value_of(x + j)
                        merge(&a[j], &b[j], w.full_rows, distance, 0, 1)
                    block_n = w.full_rows + (j < w.tail)
                    merge(
                        &first[c], &second[c], n, value_of(x + j) - job.mean_low[c] + a[j], b[j],
                        block_n,
                    )
                    n += block_n
                    continue
                first[c] += a[j]
                second[c] += b[j]
                if j < w.tail:
                    last_dy = dy + w.full_rows * w.stride + j
                    g = value_of(last_dy)
                    if job.signs != NULL:
                        bit = job.first_bit + (last_dy - <const real*>job.dy)
                        g = leaky_relu_one(last_dy, get_bits(job.signs, bit) & 1, job.slope)
                    first[c] += g
                    second[c] += g * (value_of(last_x + j) - k[j])


cdef inline void write_pack_of_row(
    const real* x, const real* dy, real* out, Py_ssize_t i, int lanes,   # IN, IN or NULL, OUT
    Work* w, Py_ssize_t lane, bint fused, Fusion f, bint past_cache,     # lane: of value i
) noexcept nogil:
    write_result(
        x, dy, out, i, lanes, fused, f, past_cache,
        load_values(x, w.lanes, CENTER * w.wrapped + lane),
        load_values(x, w.lanes, SCALE * w.wrapped + lane),
        load_values(x, w.lanes, SHIFT * w.wrapped + lane),
        load_values(x, w.lanes, SLOPE * w.wrapped + lane),
        load_values(x, w.lanes, LEVEL * w.wrapped + lane),
    )


cdef inline void write_line_of_rows(
    const real* x, const real* dy, real* out,           # IN, IN (NULL: normalise), OUT
    Work* w, Py_ssize_t lane, Py_ssize_t length,        # lane: of the first value
    bint fused,
) noexcept nogil:
    """Write contiguous values, whose lanes begin again and again, from the end."""
    cdef Py_ssize_t head = min(length, <Py_ssize_t>lanes_to_line(out)), i, j, t
    cdef int tail = (length - head) % LANES
    cdef bint past_cache = w.job.past_cache
    cdef Fusion f = fusion_of(w, out - <real*>w.job.out)
    i = length - tail
    j = (lane + i) % w.width
    if tail:
        write_pack_of_row(x, dy, out, i, tail, w, j, fused, f, False)
    for t in range((i - head) // LANES):
        i -= LANES
        j -= LANES
        while j < 0:
            j += w.width
        write_pack_of_row(x, dy, out, i, LANES, w, j, fused, f, past_cache)
    if head:
        write_pack_of_row(x, dy, out, 0, <int>head, w, lane % w.width, fused, f, False)


cdef void write_rows(
    const real* x, const real* dy, real* out, Work* w, Py_ssize_t lane, Py_ssize_t length
) noexcept nogil:
    if w.fused and dy == NULL:
        write_line_of_rows(x, <const real*>NULL, out, w, lane, length, True)
    elif w.fused:
        write_line_of_rows(x, dy, out, w, lane, length, True)
    elif dy == NULL:
        write_line_of_rows(x, <const real*>NULL, out, w, lane, length, False)
    else:
        write_line_of_rows(x, dy, out, w, lane, length, False)


cdef void unit_of_rows(
    const real* x, const real* dy, real* out, Work* w, Py_ssize_t unit
) noexcept nogil:
    cdef Job* job = w.job
    cdef Py_ssize_t first = unit * w.per_unit, end, i
    cdef Py_ssize_t whole = job.outer * job.channels * job.inner
    if w.step == SUM:
        sum_rows(x, dy, w, unit)
    elif w.width == w.stride:  # a unit is some values
        end = min(first + w.per_unit, whole)
        write_rows(x + first, at(dy, first), out + first, w, first % w.width, end - first)
    else:  # a unit is some rows of the panel
        end = min(first + w.per_unit, w.full_rows)
        i = end * w.stride
        while i > first * w.stride:
            i -= w.stride
            write_rows(x + i, at(dy, i), out + i, w, 0, w.width)


cdef inline void* row_of(const real* type, void* values, Py_ssize_t i) noexcept nogil:
    return <char*>values + i * element_size(type)


cdef void run_rows(const real* x, Work* w) noexcept nogil:
    cdef Job* job = w.job
    cdef const real* dy = <const real*>job.dy
    cdef Py_ssize_t row, first, end = 0
    while end < job.channels:
        choose_rows(w, end)
        end = w.end
        first = w.begin * job.inner  # the panel begins there
        if job.operation != INFERENCE and job.operation != APPLY:
            w.step = SUM
            if dy != NULL:
                spread(<const double*>NULL, w, w.k + w.begin, lane_shifts(w), w.padded)
            run_units(do_unit, w, w.blocks, w.threads)
            finish_rows(x + first, at(dy, first), w)
        if w.width == w.end - w.begin:  # a lane is a channel
            w.table, w.row = w.lanes, w.wrapped
        if job.operation == FORWARD:
            finish_moments(job, w.begin, w.end)
        if dy != NULL:
            gradient_coefficients(x, w, w.begin, w.end)
        elif job.out != NULL:
            affine_coefficients(x, w, w.begin, w.end)
        if job.out == NULL:
            continue
        for row in range(TABLE if dy != NULL else SHIFT + 1):
            spread(x, w, row_of(x, w.table, row * w.row), row_of(x, w.lanes, row * w.wrapped),
                   w.wrapped)
        write_all(w, job.outer * job.channels * job.inner if w.width == w.stride else w.full_rows)
