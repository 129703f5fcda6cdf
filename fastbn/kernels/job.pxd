"""What `functional` asks of a kernel: a description of the work, and the function that does it."""

from libc.stdint cimport uint16_t

cdef enum Type:
    FLOAT32
    FLOAT64
    FLOAT16
    BFLOAT16

cdef enum Operation:
    FORWARD    # by the minibatch's own statistics; without out: only those
    INFERENCE  # by given statistics
    BACKWARD   # gradients of FORWARD; without out: only dgamma and dbeta
    BACKWARD_FIXED  # gradients of INFERENCE
    APPLY      # dx of FORWARD by given dgamma and dbeta

cdef struct Job:
    Operation operation
    Type type              # of x, dy, residual and the results
    Py_ssize_t itemsize    # of that
    Py_ssize_t examples
    Py_ssize_t outer       # of these in a group, which has statistics of its own; the last group
    Py_ssize_t channels    # has what is left
    Py_ssize_t inner
    double count           # values of a channel that the statistics are of; set here for groups
    const void* x          # IN
    const void* dy         # IN, backward
    void* out              # OUT: y or dx; may be x, dy or residual itself
    const void* residual   # IN, may be NULL
    void* dresidual        # OUT, backward, may be NULL
    bint activated         # whether y = (a > 0 ? a : slope * a) follows
    double slope
    uint16_t* signs        # OUT (may be NULL), IN backward: a bit for each value, whether a > 0;
    Py_ssize_t first_bit   # of the first value; full packs of out lie in one word
    const double* gamma    # IN; here and below one value a channel
    const double* beta     # IN, not in backward
    double eps
    double* mean           # OUT of FORWARD, IN otherwise; here and below each group has its own
    double* mean_low       # what rounding took from mean
    double* var
    double* dgamma         # OUT, backward; IN of APPLY, the sums over all that count counts
    double* dbeta
    bint past_cache        # the kernel's own: whether results are written past the cache

# Returns 0, or -1 where there is no memory for partial sums; nothing is written then.
ctypedef int (*KernelFunction)(Job*) noexcept nogil
