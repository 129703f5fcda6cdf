"""The layers of a small network, each a forward and a backward pass in NumPy.

One minibatch of m examples lies in rows: x has the shape (m, n), images (m, C, H, W). The course
writes the same with columns, A of shape (n, m); so its Z = W A is ``x @ W.T`` here, W (n_out, n_in)
being the same. A layer that batch norm follows has no bias b: the mean takes it away again, and
beta does its work.

``forward`` remembers what ``backward`` needs. ``backward`` takes dL/dy, fills ``grads`` (the same
keys as ``params``) and returns dL/dx.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array: TypeAlias = NDArray[Any]


class Layer(ABC):
    """What every layer has; a layer with parameters sets ``params`` and fills ``grads``."""

    def __init__(self) -> None:
        self.params: dict[str, Array] = {}
        self.grads: dict[str, Array] = {}
        self.training = True
        self.sums: DTypeLike | None = None  # in which gradients are summed over the minibatch

    @abstractmethod
    def forward(self, x: Array) -> Array:
        """Compute y from x."""

    @abstractmethod
    def backward(self, dy: Array) -> Array:
        """Compute dL/dx from dL/dy and fill ``grads``."""

    def __call__(self, x: Array) -> Array:
        """Do as ``forward``."""
        return self.forward(x)

    def train(self, mode: bool = True) -> None:
        """Change to training mode (``mode=False``: to evaluation mode)."""
        self.training = mode

    def eval(self) -> None:
        """Change to evaluation mode."""
        self.train(False)

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the parameters."""
        return {name: value.copy() for name, value in self.params.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned.

        Raises
        ------
        ValueError
            If an entry is missing or unknown or has another shape or type; nothing changes then.
        """
        self._check(state)
        for name, value in self.params.items():
            value[...] = state[name]

    def _check(self, state: Mapping[str, Any]) -> None:
        expected, given = _describe(self.state_dict()), _describe(state)
        for name in sorted(expected.keys() | given.keys()):
            if given.get(name) != expected.get(name):
                wanted, got = expected.get(name, "no such entry"), given.get(name, "nothing")
                raise ValueError(f"{name}: expected {wanted}, got {got}")


class Linear(Layer):
    """y = x W^T + b, from shape (m, n_in) to (m, n_out).

    Parameters
    ----------
    n_in, n_out : int
    bias : bool
        Whether there is a b; set it to False in front of batch norm.
    rng : numpy.random.Generator
        Draws W after He et al., with the variance 2 / n_in. b starts at zero.
    dtype : data-type
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        *,
        bias: bool,
        rng: np.random.Generator,
        dtype: DTypeLike = np.float32,
    ) -> None:
        super().__init__()
        self.params["weight"] = he_normal((n_out, n_in), n_in, rng, dtype)
        if bias:
            self.params["bias"] = np.zeros(n_out, dtype)

    def forward(self, x: Array) -> Array:
        """Compute y, shape (m, n_out), from x, shape (m, n_in)."""
        self.x = x
        y = x @ self.params["weight"].T
        if "bias" in self.params:
            y += self.params["bias"]
        return y

    def backward(self, dy: Array) -> Array:
        """Compute dL/dx, shape (m, n_in); dW = dy^T x, db = the sum of dy over the minibatch."""
        self.grads["weight"] = np.matmul(dy.T, self.x, dtype=self.sums)
        if "bias" in self.params:
            self.grads["bias"] = dy.sum(axis=0, dtype=self.sums)
        return dy @ self.params["weight"]


class Conv2d(Layer):
    """Convolution of (m, C, H, W) to (m, O, H', W') as one matrix product, by im2col.

    Each output pixel sees a patch of C * k * k input values. With all patches as columns of one
    matrix A, shape (C * k * k, m * H' * W'), convolution is the course's Z = W A. A border of
    k // 2 zeros keeps H' = H and W' = W at stride 1 (k is odd).

    Parameters
    ----------
    c_in, c_out : int
        Channels C and O.
    kernel, stride : int
        Side length k of the patches, and how far apart they lie.
    bias : bool
        Whether there is one bias a channel; set it to False in front of batch norm.
    rng : numpy.random.Generator
        Draws W after He et al., with the variance 2 / (C * k * k). The bias starts at zero.
    dtype : data-type
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int = 3,
        *,
        stride: int = 1,
        bias: bool,
        rng: np.random.Generator,
        dtype: DTypeLike = np.float32,
    ) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        shape = (c_out, c_in, kernel, kernel)
        self.params["weight"] = he_normal(shape, c_in * kernel * kernel, rng, dtype)
        if bias:
            self.params["bias"] = np.zeros(c_out, dtype)

    def forward(self, x: Array) -> Array:
        """Compute y, shape (m, O, H', W'), from x, shape (m, C, H, W)."""
        self.x_shape = x.shape
        self.columns, h, w = im2col(x, self.kernel, self.stride)
        weight = self.params["weight"]
        y = weight.reshape(len(weight), -1) @ self.columns  # (O, m * H' * W')
        if "bias" in self.params:
            y += self.params["bias"][:, None]
        # Copied into NCHW order, so that the layers after it walk through memory in a line.
        return np.ascontiguousarray(y.reshape(len(weight), -1, h, w).swapaxes(0, 1))

    def backward(self, dy: Array) -> Array:
        """Compute dL/dx, shape (m, C, H, W); with Z = W A, dW = dZ A^T and dA = W^T dZ."""
        weight = self.params["weight"]
        dz = dy.swapaxes(0, 1).reshape(len(weight), -1)  # (O, m * H' * W')
        dweight = np.matmul(dz, self.columns.T, dtype=self.sums)
        self.grads["weight"] = dweight.reshape(weight.shape)
        if "bias" in self.params:
            self.grads["bias"] = dz.sum(axis=1, dtype=self.sums)
        dcolumns = weight.reshape(len(weight), -1).T @ dz
        return col2im(dcolumns, self.x_shape, self.kernel, self.stride)


class ReLU(Layer):
    """y = max(x, 0), or max(x + residual, 0), as `fastbn.BatchNorm` does it after the norm."""

    def forward(self, x: Array, residual: Array | None = None) -> Array:
        """Compute y, of x's shape."""
        self.added = residual is not None
        y: Array = np.maximum(x if residual is None else x + residual, 0)
        self.positive = y > 0
        return y

    def backward(self, dy: Array) -> Any:
        """Compute dL/dx, which is dy where y was positive and 0 elsewhere.

        After a forward pass with a residual: the pair of dL/dx and dL/dresidual, which is the same.
        """
        dx = dy * self.positive
        return (dx, dx) if self.added else dx


class Flatten(Layer):
    """From (m, ...) to (m, n)."""

    def forward(self, x: Array) -> Array:
        """Compute y, shape (m, n)."""
        self.x_shape = x.shape
        return x.reshape(len(x), -1)

    def backward(self, dy: Array) -> Array:
        """Compute dL/dx, of x's shape."""
        return dy.reshape(self.x_shape)


class GlobalAveragePool(Layer):
    """The mean of each channel of each image, from (m, C, H, W) to (m, C)."""

    def forward(self, x: Array) -> Array:
        """Compute y, shape (m, C)."""
        self.x_shape = x.shape
        y: Array = x.mean(axis=(2, 3))
        return y

    def backward(self, dy: Array) -> Array:
        """Compute dL/dx, shape (m, C, H, W): each pixel has an equal share in the mean."""
        h, w = self.x_shape[2:]
        return np.broadcast_to((dy / (h * w))[:, :, None, None], self.x_shape).copy()


def he_normal(
    shape: tuple[int, ...], fan_in: int, rng: np.random.Generator, dtype: DTypeLike
) -> Array:
    """Draw weights of variance 2 / fan_in, which keeps the variance through a ReLU network."""
    weights: Array = rng.standard_normal(shape) * np.sqrt(2 / fan_in)
    return weights.astype(dtype)


def im2col(x: Array, kernel: int, stride: int) -> tuple[Array, int, int]:
    """Lay the patches of x, shape (m, C, H, W), out as columns.

    Returns
    -------
    columns : ndarray
        Shape (C * kernel * kernel, m * H' * W').
    h, w : int
        H' and W'.
    """
    pad = kernel // 2
    padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    patches = np.lib.stride_tricks.sliding_window_view(padded, (kernel, kernel), axis=(2, 3))
    patches = patches[:, :, ::stride, ::stride]  # (m, C, H', W', kernel, kernel)
    m, c, h, w = patches.shape[:4]
    return patches.transpose(1, 4, 5, 0, 2, 3).reshape(c * kernel * kernel, m * h * w), h, w


def col2im(columns: Array, shape: tuple[int, ...], kernel: int, stride: int) -> Array:
    """Add the columns of `im2col` up where they came from: the gradient of `im2col`.

    ``shape`` is the shape of the x that `im2col` was given, and of the result.
    """
    m, c, height, width = shape
    pad = kernel // 2
    h, w = (height - 1) // stride + 1, (width - 1) // stride + 1
    patches = columns.reshape(c, kernel, kernel, m, h, w)
    dx = np.zeros((m, c, height + 2 * pad, width + 2 * pad), columns.dtype)
    for i in range(kernel):
        for j in range(kernel):
            rows, cols = slice(i, i + stride * h, stride), slice(j, j + stride * w, stride)
            dx[:, :, rows, cols] += patches[:, i, j].swapaxes(0, 1)
    return dx[:, :, pad : pad + height, pad : pad + width]


def softmax_cross_entropy(
    logits: Array, labels: NDArray[np.int64], *, mean: bool = True
) -> tuple[float, Array]:
    """Compute the mean loss -log softmax(logits)[label], or the sum, and its gradient.

    Parameters
    ----------
    logits : ndarray of shape (m, K)
    labels : ndarray of shape (m,)
        Integers of 0 to K - 1.

    Returns
    -------
    loss : float
    dlogits : ndarray of shape (m, K)
        (softmax(logits) - one_hot(labels)) / m; of the sum without / m.
    """
    rows = np.arange(len(logits))
    shifted = logits - logits.max(axis=1, keepdims=True)  # exp then cannot overflow
    exponentials = np.exp(shifted)
    sums = exponentials.sum(axis=1, keepdims=True)
    losses = np.log(sums[:, 0]) - shifted[rows, labels]
    dlogits = exponentials / sums
    dlogits[rows, labels] -= 1
    if mean:
        return float(np.mean(losses)), dlogits / len(logits)
    return float(np.sum(losses, dtype=np.float64)), dlogits


def _describe(state: Mapping[str, Any]) -> dict[str, str]:
    """Return shape and type of each entry."""
    arrays = {name: np.asarray(value) for name, value in state.items()}
    return {name: f"{array.dtype} of shape {array.shape}" for name, array in arrays.items()}
