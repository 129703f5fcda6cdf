"""Batch normalisation as one writes it in NumPy: what fastbn has to beat."""

import numpy as np


def forward(x, gamma, beta, eps=1e-5):
    """Return y and what backward needs; the channels are on axis 1."""
    axes = (0, *range(2, x.ndim))
    shape = (1, -1) + (1,) * (x.ndim - 2)
    mean = x.mean(axes, keepdims=True)
    rstd = 1 / np.sqrt(x.var(axes, keepdims=True) + np.float32(eps))
    z_hat = (x - mean) * rstd
    return gamma.reshape(shape) * z_hat + beta.reshape(shape), (z_hat, gamma.reshape(shape) * rstd)


def backward(dy, cache):
    """Return dx, dgamma, dbeta."""
    z_hat, scale = cache
    axes = (0, *range(2, dy.ndim))
    count = np.float32(dy.size // dy.shape[1])
    dbeta = dy.sum(axes, keepdims=True)
    dgamma = (dy * z_hat).sum(axes, keepdims=True)
    dx = scale * (dy - dbeta / count - z_hat * (dgamma / count))
    return dx, dgamma.ravel(), dbeta.ravel()
