# Masks: which positions count, as runs of neighbours (see Run in job.hpp). Statistics are those of
# an array that has the valid positions alone, to the bit, and no such array is made.


cdef Py_ssize_t run_of_position(const Job* job, Py_ssize_t position) noexcept nogil:
    """Return the first run that begins at a position or behind it."""
    cdef Py_ssize_t low = 0, high = job.run_count, middle
    while low < high:
        middle = (low + high) // 2
        if job.runs[middle].position < position:
            low = middle + 1
        else:
            high = middle
    return low


cdef const Run* run_of_valid(const Job* job, Py_ssize_t index) noexcept nogil:
    """Return the run that has a valid position, given its number among them."""
    cdef Py_ssize_t low = 0, high = job.run_count, middle
    while high - low > 1:
        middle = (low + high) // 2
        if job.runs[middle].before <= index:
            low = middle
        else:
            high = middle
    return job.runs + low


cdef Py_ssize_t position_of(const Job* job, Py_ssize_t index) noexcept nogil:
    """Return which position of the group is its valid position of this number."""
    cdef const Run* run
    index += job.valid_before
    run = run_of_valid(job, index)
    return run.position - job.first_position + (index - run.before)


cdef Py_ssize_t place_of(const Job* job, Py_ssize_t channel, Py_ssize_t index) noexcept nogil:
    """Return where in memory the value of a channel at a position is, by the position's number."""
    cdef Py_ssize_t position = index if job.runs == NULL else position_of(job, index)
    cdef Py_ssize_t row = position // job.inner
    return (row * (job.channels - 1) + channel) * job.inner + position


cdef void count_valid(Job* job, Py_ssize_t first_position) noexcept nogil:
    """Fill in which of the valid positions are those of this group."""
    cdef Py_ssize_t first = run_of_position(job, first_position)
    cdef Py_ssize_t end = run_of_position(job, first_position + job.outer * job.inner)
    job.first_position, job.valid_before = first_position, job.runs[first].before
    job.valid_count = job.runs[end].before - job.valid_before
    job.count = job.valid_count


cdef void clear(const Job* job, Py_ssize_t first, Py_ssize_t count) noexcept nogil:
    """Write zeros where the results of some values would be."""
    cdef Py_ssize_t bytes = count * job.itemsize
    if bytes:
        memset(<char*>job.out + first * job.itemsize, 0, bytes)
    if bytes and job.dresidual != NULL:
        memset(<char*>job.dresidual + first * job.itemsize, 0, bytes)


cdef void finish_without_values(Job* job) noexcept nogil:
    """Write the results of a group whose positions are all masked: zeros."""
    cdef Py_ssize_t s = job.first_statistic, bytes = job.channels * sizeof(double)
    if job.operation == FORWARD:
        memset(job.mean + s, 0, bytes)
        memset(job.mean_low + s, 0, bytes)
        memset(job.var + s, 0, bytes)
    elif takes_sums(job):
        memset(job.dgamma + s, 0, bytes)
        memset(job.dbeta + s, 0, bytes)
    if job.out != NULL:
        clear(job, 0, job.outer * job.channels * job.inner)
