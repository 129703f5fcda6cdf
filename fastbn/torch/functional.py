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
from fastbn.functional import Activation
from fastbn.torch import arrays, library

PLAIN = frozenset((Tensor, torch.nn.Parameter))
SHORT = frozenset((torch.float16, torch.bfloat16))
FLOATS = SHORT | {torch.float32, torch.float64}

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
    if not isinstance(residual, Tensor | None):
        raise TypeError(f"residual: expected a Tensor or None, got {type(residual).__name__}")
    each = each and own
    compiling = torch.compiler.is_compiling()
    if not (
        fits(x, own, mean, var, weight, bias, residual)
        and x.numel() > (x.shape[1] * (x.shape[0] if each else 1) if own else 0)
        and 0 < eps < inf
        and not (is_exporting() if compiling else is_transformed())
    ):
        y = of_torch(x, mean, var, weight, bias, own, momentum, eps)
        return followed_by(y, residual, activation)
    if compiling or torch._C._len_torch_dispatch_stack():
        return library.normalize(
            x, weight, bias, mean, var, own, residual, each, momentum, eps, activation
        )
    keep = torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    )
    given = (None, None) if own else (mean, var)
    group = 1 if each else None
    y, out = arrays.result_like(x, arrays.as_array(x))
    cache = arrays.forward(x, weight, bias, *given, residual, group, eps, activation, keep, out)
    if own and mean is not None and var is not None:
        arrays.update_running(cache, mean, var, momentum)
    if keep:
        return _Norm.apply(x, weight, bias, residual, (y, group, cache.state))
    return y


def followed_by(y: Tensor, residual: Tensor | None, activation: Activation) -> Tensor:
    """Add the residual to y, and apply the activation, by PyTorch's own functions."""
    if residual is not None:
        y = y + residual
    return y if activation is None else getattr(torch.nn.functional, activation)(y)


def is_transformed() -> bool:
    """Whether tensors stand for something else: of torch.func, forward mode or a trace."""
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def fits(
    x: Tensor, own: bool, mean: Tensor | None, var: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, residual: Tensor | None,
) -> bool:  # fmt: skip
    """Whether the kernels can take the tensors; where they cannot, PyTorch answers, or raises."""
    if not _is_plain(x) or x.dtype not in FLOATS or x.dim() < 2:
        return False
    if residual is not None and not (
        _is_plain(residual) and residual.shape == x.shape and residual.dtype is x.dtype
    ):
        return False
    if (mean is None) != (var is None) or (mean is None and not own):
        return False
    channels = x.shape[1]
    kind = None
    for each_of in (mean, var, weight, bias):
        if each_of is not None:
            if not _is_plain(each_of) or each_of.shape != (channels,):
                return False
            if kind is None:
                kind = each_of.dtype
            elif each_of.dtype is not kind:
                return False
    return kind is None or kind is x.dtype or (kind is torch.float32 and x.dtype in SHORT)


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in PLAIN and tensor.is_cpu and tensor.layout is torch.strided


class _Norm(torch.autograd.Function):
    """What has been computed, as a node of the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Any, residual: Any, done: Any) -> Tensor:
        y, ctx.group, ctx.state = done
        ctx.save_for_backward(x)
        result: Tensor = y
        return result

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        # once_differentiable costs more than a small norm, and is for those who ask for a graph.
        function = _backward_once if torch.is_grad_enabled() else _backward
        result: tuple[Tensor | None, ...] = function(ctx, dy, *ctx.saved_tensors)
        return result


def _backward(ctx: Any, dy: Tensor, x: Tensor) -> tuple[Tensor | None, ...]:
    dx, out = arrays.result_like(x, arrays.as_array(x))
    rest = arrays.backward(dy.resolve_neg(), x, ctx.group, ctx.state, out)
    weight, bias, residual = (*rest, None)[:3]
    needed = ctx.needs_input_grad
    return dx, weight if needed[1] else None, bias if needed[2] else None, residual, None


_backward_once = once_differentiable(_backward)
