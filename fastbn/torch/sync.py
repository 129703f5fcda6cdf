"""SyncBatchNorm: one minibatch, whose parts lie in several processes, on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable

from fastbn.functional import Activation, entry
from fastbn.functional.parts import merge_packed, packed
from fastbn.runtime.pool import follow_num_threads
from fastbn.torch.arrays import as_tensor, gradient, update_running, wide
from fastbn.torch.functional import batch_norm, followed_by
from fastbn.torch.modules import _BatchNorm

Row = NDArray[np.float64]


class SyncBatchNorm(_BatchNorm, nn.modules.batchnorm._BatchNorm):
    """`torch.nn.SyncBatchNorm` for tensors on the CPU as well, by Gloo, MPI or another backend.

    In training each process normalises its part of the minibatch by the statistics of all parts.
    The parts may differ in size, or be empty. In evaluation, and in one process alone, it is
    `BatchNorm2d` for any number of dimensions. On other devices it is PyTorch's module.

    It is no subclass of `torch.nn.SyncBatchNorm`, because `DistributedDataParallel` refuses those
    on the CPU.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, process_group, device, dtype, bias
        As of `torch.nn.SyncBatchNorm`. Processes of one group have one minibatch; None: all have.
    activation : None, "relu" or "leaky_relu"
        What follows, as in `fastbn.batch_norm`.

    Raises
    ------
    ValueError
        In training, if all parts together have less than two values per channel.
    TypeError
        In training on the CPU, if input or parameters are not what the kernels take: PyTorch has
        no function for those.

    Notes
    -----
    Each process sends one message forward (count, mean, variance) and one backward (two sums), of
    float64. All merge them in the order of ranks, so each has the same bits. Gradients of weight
    and bias are those of the part, as PyTorch has it: `DistributedDataParallel` averages them.
    """

    _check_input_dim = nn.SyncBatchNorm._check_input_dim
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, **kwargs
        )
        self.process_group = process_group

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:  # noqa: A002
        """Normalise; in training on the CPU by what all processes have."""
        if not input.is_cpu:
            y = nn.SyncBatchNorm.forward(self, input)
            return followed_by(y, residual, self.activation)
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        return super().forward(input, residual)

    def _batch_norm(  # type: ignore[override]
        self, x: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None,
        bias: Tensor | None, own: bool, momentum: float, eps: float, *, activation: Activation,
        residual: Tensor | None,
    ) -> Tensor:  # fmt: skip
        group = None
        if self.training and distributed.is_available() and distributed.is_initialized():
            group = self.process_group or distributed.group.WORLD
        if group is None or distributed.get_world_size(group) < 2:
            return batch_norm(
                x, mean, var, weight, bias, own, momentum, eps, activation=activation,
                residual=residual,
            )  # fmt: skip
        return _normalize(x, mean, var, weight, bias, momentum, eps, activation, residual, group)


def _gathered(row: Row, group: Any) -> Row:
    """Return the rows of all processes, in the order of their ranks."""
    rows = torch.empty((distributed.get_world_size(group), row.size), dtype=torch.float64)
    distributed.all_gather(list(rows), torch.from_numpy(row), group)
    result: Row = rows.numpy()
    return result


def _normalize(
    x: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, momentum: float, eps: float, activation: Activation,
    residual: Tensor | None, group: Any,
) -> Tensor:  # fmt: skip
    """Normalise x by the statistics of all processes of a group, and update mean and var."""
    found = entry.arrays_of(x, None, weight, bias, mean, var)
    if found is None:
        raise TypeError(
            "input: expected a dense tensor of float16, bfloat16, float32 or float64, and "
            f"parameters of its dtype or float32, got {x.dtype} of {x.layout}"
        )
    array, gamma, beta = found[0], *map(wide, found[2:4])
    addend = None if residual is None else entry.array_of(residual)
    if residual is not None and (
        addend is None or addend.shape != array.shape or addend.dtype != array.dtype
    ):  # what PyTorch may add, by its own rules
        y = _normalize(x, mean, var, weight, bias, momentum, eps, None, None, group)
        return followed_by(y, residual, activation)
    follow_num_threads(torch.get_num_threads())
    moments = merge_packed(_gathered(packed(entry.moments_of(array, 1)), group))
    if moments.count < 2:  # in all processes alike
        raise ValueError(
            f"Expected more than 1 value per channel when training, got {moments.count} in all "
            f"processes together, here input size {x.size()}"
        )
    keep = torch.is_grad_enabled()
    y, cache = entry.forward(
        array, moments, gamma, beta, 1, eps, activation, addend, None, None, None, keep
    )
    if mean is not None and var is not None:
        update_running(cache, mean, var, momentum)
    if not keep:
        return as_tensor(y)
    done = as_tensor(y), cache.state, group
    result: Tensor = _Synchronised.apply(x, weight, bias, residual, done)
    return result


class _Synchronised(torch.autograd.Function):
    """What has been computed, as a node of the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Any) -> Tensor:
        y, ctx.state, ctx.group = others[-1]
        ctx.save_for_backward(x)
        result: Tensor = y
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,), needed = ctx.saved_tensors, ctx.needs_input_grad
        follow_num_threads(torch.get_num_threads())
        array: Any = entry.array_of(x)
        cache, given = entry.restored(array, 1, None, ctx.state), gradient(dy, x)
        dgamma, dbeta = sums = entry.backward_reduce(given, cache)
        if needed[0]:  # in all processes or in none, as the others wait for the message
            sums = _gathered(np.concatenate(sums), ctx.group).sum(axis=0).reshape(2, -1)
        results = entry.backward_apply(given, cache, sums[0], sums[1], None)
        dx, dresidual = results if isinstance(results, tuple) else (results, None)
        return (
            as_tensor(dx) if needed[0] else None,
            torch.from_numpy(dgamma) if needed[1] else None,
            torch.from_numpy(dbeta) if needed[2] else None,
            None if dresidual is None else as_tensor(dresidual),
            None,
        )
