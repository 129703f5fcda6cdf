"""The functions: what `torch.nn.functional` has, with its signatures."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from fastbn import checks
from fastbn.functional import Activation, entry
from fastbn.runtime.pool import follow_num_threads
from fastbn.torch import arrays, library

PLAIN = (Tensor, torch.nn.Parameter)

is_exporting = getattr(torch.compiler, "is_exporting", bool)  # from PyTorch 2.7 on


def batch_norm(
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: Activation = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Do as `torch.nn.functional.batch_norm`."""
    return _normalize(
        torch.nn.functional.batch_norm, False, input, running_mean, running_var, weight, bias,
        training, momentum, eps, activation, residual,
    )  # fmt: skip


def instance_norm(
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: Activation = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Do as `torch.nn.functional.instance_norm`."""
    return _normalize(
        torch.nn.functional.instance_norm, True, input, running_mean, running_var, weight, bias,
        use_input_stats, momentum, eps, activation, residual,
    )  # fmt: skip


def _normalize(
    of_torch: Callable[..., Tensor], each: bool, x: Tensor, mean: Tensor | None,
    var: Tensor | None, weight: Tensor | None, bias: Tensor | None, own: bool, momentum: float,
    eps: float, activation: Activation, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    """Normalise x by its own statistics (those of each example) or by mean and var."""
    if activation is not None:
        checks.activation(activation)
    if residual is not None and not isinstance(residual, Tensor):
        raise TypeError(f"residual: expected a Tensor or None, got {type(residual).__name__}")
    each = each and own
    given = mean is not None and var is not None
    ours = momentum is not None and (given or (own and mean is None and var is None))
    if is_watched():
        compiling = torch.compiler.is_dynamo_compiling()  # which cannot ask for a trace
        ours = ours and not is_exporting() and (compiling or not torch._C._is_tracing())
        ours = ours and fits(x, residual, weight, bias, mean, var)
        if ours and has_enough(x, own, each) and 0 < eps < inf:
            return library.normalize(
                x, weight, bias, mean, var, residual, own, each, momentum, eps, activation
            )
    elif ours and not (  # torch.func or forward mode, whose tensors stand for others
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    ):
        follow_num_threads(torch.get_num_threads())
        found = entry.forward_tensors(
            x, weight, bias, mean, var, residual, own, each, eps, activation,
            torch.is_grad_enabled(), momentum,
        )  # fmt: skip
        if found is not None:
            result: Tensor = found[0] if found[1] is None else _apply(
                found, x, weight, bias, residual
            )  # fmt: skip
            return result
    y = of_torch(x, mean, var, weight, bias, own, momentum, eps)
    return followed_by(y, residual, activation)


def is_watched() -> bool:
    """Whether somebody has to see the operators: torch.compile, a mode or a trace."""
    watched: bool = (
        torch.compiler.is_dynamo_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_tracing()
    )
    return watched


def followed_by(y: Tensor, residual: Tensor | None, activation: Activation) -> Tensor:
    """Return what comes behind a norm of PyTorch's own."""
    if residual is not None:
        y = y + residual
    if activation is not None:
        y = getattr(torch.nn.functional, activation)(y)
    return y


def has_enough(x: Tensor, own: bool, each: bool) -> bool:
    """Whether there are values, and more than one for each statistic of their own."""
    size: int = x.numel()
    return size > (x.shape[1] * (x.shape[0] if each else 1) if own else 0)


def fits(x: Tensor, residual: Tensor | None, *values: Tensor | None) -> bool:
    """Do as `entry.arrays_of`, for tensors that torch.compile traces: tell whether all fit."""
    given = [value for value in values if value is not None]
    tensors = (x, *given) if residual is None else (x, residual, *given)
    kinds = {value.dtype for value in given}
    return bool(
        all(type(t) in PLAIN and t.is_cpu and t.layout is torch.strided for t in tensors)
        and x.dim() >= 2
        and x.dtype in arrays.FLOATS
        and (residual is None or (residual.dtype == x.dtype and residual.shape == x.shape))
        and all(value.shape == (x.shape[1],) for value in given)
        and (kinds <= {x.dtype} or (kinds == {torch.float32} and x.element_size() == 2))
    )


class _Norm(torch.autograd.Function):
    """What has been computed, as a node of the graph."""

    @staticmethod
    def forward(ctx: Any, done: Any, x: Tensor, *_: Tensor | None) -> Tensor:
        y: Tensor
        y, ctx.done = done
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        # once_differentiable alone costs as much as a small norm.
        function = _once if torch.is_grad_enabled() else _backward
        gradients: tuple[Tensor | None, ...] = function(ctx, dy, x)
        return gradients


def _backward(ctx: Any, dy: Tensor, x: Tensor) -> tuple[Tensor | None, ...]:
    return entry.backward_tensors(dy, x, ctx.done, ctx.needs_input_grad)


_once = once_differentiable(_backward)
# Without what torch.autograd.Function.apply does for torch.func, which is not active here.
_apply = super(torch.autograd.Function, _Norm).apply
