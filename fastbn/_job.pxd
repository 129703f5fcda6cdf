"""What `functional` asks of a kernel: one description of the work, and the function that does it."""

cdef enum Type:
    FLOAT32
    FLOAT64
    FLOAT16
    BFLOAT16

cdef enum Operation:
    FORWARD    # by the minibatch's own statistics
    INFERENCE  # by given statistics
    BACKWARD   # gradients of FORWARD
    BACKWARD_FIXED  # gradients of INFERENCE

cdef struct Job:
    Operation operation
    Type type              # of x, dy and out
    Py_ssize_t outer
    Py_ssize_t channels
    Py_ssize_t inner
    const void* x          # IN
    const void* dy         # IN, backward
    void* out              # OUT: y or dx; may be x or dy itself
    const double* gamma    # IN; here and below one value a channel
    const double* beta     # IN, not in backward
    double eps
    double* mean           # OUT of FORWARD, IN otherwise; so are the next two
    double* mean_low       # what rounding took from mean
    double* var
    double* dgamma         # OUT, backward
    double* dbeta          # OUT, backward

# Returns 0, or -1 where there is no memory for partial sums; nothing is written then.
ctypedef int (*Run)(Job*) noexcept nogil
