"""The updates of the optimizers: one pass over each parameter, in place.

Each function walks a parameter p, its gradient g and its state once, element by element, in the
precision of p. There are no temporaries and no sums across elements, so what happens to an element
is a chain of IEEE operations. Neither the width of the vectors nor the alignment of the memory nor
the length of the array can change it: the same bits everywhere. The sum of squares for gradient
clipping, the only reduction, keeps eight partial sums on every machine for that reason.

The loops are plain; the compiler vectorises them, square roots and divisions included. There are
no variants for wider instruction sets: SGD waits for memory anyway, and Adam, whose roots and
divisions count (4M float32 values: 6 ms, 4.5 with AVX2), is a small part of a training step.

Combinations of hyper-parameters come as doubles and are rounded to p's precision once. In formulas
d is g + weight_decay * p. A weight decay of 0 and a keep of 1 change no finite value, so they need
no loops of their own. Arrays that are `const` are read, the others are updated. All arrays of one
call have the same length; the caller sees to that.
"""

cdef extern from "<cmath>" nogil:
    # The overloads of C++: sqrt from libc.math would take a float by way of double.
    float root "std::sqrt"(float)
    double root "std::sqrt"(double)

ctypedef fused real:
    float
    double


def sgd(
    real[::1] p, const real[::1] g, real[::1] velocity,
    double lr, double momentum, bint nesterov, double weight_decay,
):
    """velocity = momentum * velocity + d; p -= lr * velocity, or with Nesterov's look ahead."""
    cdef real rate = <real>lr, mu = <real>momentum, decay = <real>weight_decay, d, u
    cdef Py_ssize_t i
    with nogil:
        if momentum == 0:  # velocity is not touched: it takes no memory then
            for i in range(p.shape[0]):
                p[i] -= rate * (g[i] + decay * p[i])
        else:
            for i in range(p.shape[0]):
                d = g[i] + decay * p[i]
                u = mu * velocity[i] + d
                velocity[i] = u
                p[i] -= rate * (d + mu * u if nesterov else u)


def rmsprop(
    real[::1] p, const real[::1] g, real[::1] v, real[::1] velocity,
    double lr, double alpha, double eps, double momentum, double weight_decay,
):
    """v = alpha * v + (1 - alpha) * d**2; with d / (sqrt(v) + eps) instead of d as sgd."""
    cdef real rate = <real>lr, old = <real>alpha, new = <real>(1 - alpha)
    cdef real epsilon = <real>eps, mu = <real>momentum, decay = <real>weight_decay, d, s, u
    cdef Py_ssize_t i
    with nogil:
        if momentum == 0:
            for i in range(p.shape[0]):
                d = g[i] + decay * p[i]
                s = old * v[i] + new * (d * d)
                v[i] = s
                p[i] -= rate * (d / (root(s) + epsilon))
        else:
            for i in range(p.shape[0]):
                d = g[i] + decay * p[i]
                s = old * v[i] + new * (d * d)
                u = mu * velocity[i] + d / (root(s) + epsilon)
                v[i] = s
                velocity[i] = u
                p[i] -= rate * u


def adam(
    real[::1] p, const real[::1] g, real[::1] m, real[::1] v,
    double rate, double beta1, double beta2, double correction, double eps,
    double weight_decay, double keep,
):
    """m and v move towards d and d**2; p = keep * p - rate * m / (correction * sqrt(v) + eps).

    rate is lr / (1 - beta1**step), correction is 1 / sqrt(1 - beta2**step).
    keep is 1, except in AdamW.
    """
    cdef real r = <real>rate, new1 = <real>(1 - beta1), old2 = <real>beta2
    cdef real new2 = <real>(1 - beta2), c = <real>correction, epsilon = <real>eps
    cdef real decay = <real>weight_decay, k = <real>keep, d, s, u
    cdef Py_ssize_t i
    with nogil:
        for i in range(p.shape[0]):
            d = g[i] + decay * p[i]
            u = m[i] + new1 * (d - m[i])
            s = old2 * v[i] + new2 * (d * d)
            m[i] = u
            v[i] = s
            p[i] = k * p[i] - r * (u / (c * root(s) + epsilon))


def sum_of_squares(const real[::1] g):
    """Return the sum of g**2 in float64."""
    cdef double[8] sums
    cdef double value
    cdef Py_ssize_t i, lane, count = g.shape[0], whole = count - count % 8
    with nogil:
        for lane in range(8):
            sums[lane] = 0
        for i in range(0, whole, 8):
            for lane in range(8):
                value = g[i + lane]
                sums[lane] += value * value
        for i in range(whole, count):
            value = g[i]
            sums[i - whole] += value * value
    return (((sums[0] + sums[1]) + (sums[2] + sums[3]))
            + ((sums[4] + sums[5]) + (sums[6] + sums[7])))
