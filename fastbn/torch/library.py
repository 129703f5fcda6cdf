"""The norm as operators of `torch.library`: for torch.compile, which sees them as one step each."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbn.functional import entry
from fastbn.runtime.pool import follow_num_threads
from fastbn.torch import arrays

# each: whether each example has statistics of its own. statistics: the rows of a cache.
torch.library.define(
    "fastbn::normalize",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, Tensor? residual, "
    "bool each, float eps, str? activation) -> (Tensor y, Tensor statistics, Tensor signs)",
)
torch.library.define(
    "fastbn::normalize_backward",
    "(Tensor dy, Tensor x, Tensor statistics, Tensor signs, bool each, bool fixed, bool residual, "
    "float eps, str? activation) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
)
SLOPES = {None: 0.0, "relu": 0.0, "leaky_relu": 0.01}


def _aligned_like(x: Tensor) -> tuple[Tensor, Tensor, Any]:
    """Return x with no gaps, a tensor like it, and that one's memory, where a pack begins."""
    if torch.empty_like(x).stride() != x.stride():
        x = x.clone()
    out = entry.aligned_like(entry.array_of(x))
    return x, arrays.as_tensor(out), out


@torch.library.impl("fastbn::normalize", "CPU")
def _normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None,
    residual: Tensor | None, each: bool, eps: float, activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x, y, out = _aligned_like(x)
    follow_num_threads(torch.get_num_threads())
    if var is not None and (var < 0).any():  # which PyTorch does not refuse
        var = var.masked_fill(var < 0, torch.nan)
    done = entry.forward_tensors(
        x, weight, bias, mean, var, residual, mean is None, each, eps, activation, True,
        None, out,
    )  # fmt: skip
    if done is None or done[1] is None:
        raise ValueError("fastbn::normalize: expected what fastbn.torch.batch_norm passes on")
    statistics, signs, *_ = done[1][1]
    signs = np.empty(0, np.int16) if signs is None else signs.view(np.int16)
    return y, torch.from_numpy(statistics), torch.from_numpy(signs)


@torch.library.register_fake("fastbn::normalize")
def _normalize_fake(
    x: Tensor, _weight: Any, _bias: Any, _mean: Any, _var: Any, _residual: Any, each: bool,
    _eps: float, activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows = 3 * (x.shape[0] if each else 1) + 2
    signs = 0 if activation is None else x.numel() // 16 + 3
    return (
        torch.empty_like(x),
        x.new_empty((rows, x.shape[1]), dtype=torch.float64),
        x.new_empty((signs,), dtype=torch.int16),
    )


@torch.library.impl("fastbn::normalize_backward", "CPU")
def _backward(
    dy: Tensor, x: Tensor, statistics: Tensor, signs: Tensor, each: bool, fixed: bool,
    residual: bool, eps: float, activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    x, dx, out = _aligned_like(x)
    follow_num_threads(torch.get_num_threads())
    count = x.numel() / x.shape[1] / (x.shape[0] if each else 1)
    bits = signs.numpy().view(np.uint16) if activation else None
    state = (
        statistics.numpy(), bits, 0, count, fixed, residual, bool(activation), SLOPES[activation],
        eps,
    )  # fmt: skip
    needed = False, True, True, True, residual
    _, _, dweight, dbias, dresidual = entry.backward_tensors(
        dy, x, (1 if each else None, state), needed, out
    )
    return dx, dweight, dbias, dresidual if residual else x.new_empty(0)


@torch.library.register_fake("fastbn::normalize_backward")
def _backward_fake(
    _dy: Tensor, x: Tensor, _statistics: Tensor, _signs: Tensor, _each: bool, _fixed: bool,
    residual: bool, _eps: float, _activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    kind = torch.float64 if x.dtype is torch.float64 else torch.float32
    sums = x.new_empty((x.shape[1],), dtype=kind)
    dx = torch.empty_like(x)
    dresidual = torch.empty_like(x) if residual else x.new_empty(0)
    return dx, sums, torch.empty_like(sums), dresidual


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, mean, _, residual, each, eps, activation = inputs
    _, statistics, signs = output
    ctx.save_for_backward(x, statistics, signs)
    ctx.mark_non_differentiable(statistics, signs)
    ctx.given = weight is not None, bias is not None, residual is not None
    ctx.rest = each, mean is not None, residual is not None, eps, activation


def _differentiate(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    dx, *others = torch.ops.fastbn.normalize_backward(dy, *ctx.saved_tensors, *ctx.rest)
    weight, bias, residual = (
        each if given else None for each, given in zip(others, ctx.given, strict=True)
    )
    return dx, weight, bias, None, None, residual, None, None, None


torch.library.register_autograd("fastbn::normalize", _differentiate, setup_context=_setup)


def normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None,
    residual: Tensor | None, own: bool, each: bool, momentum: float, eps: float,
    activation: str | None,
) -> Tensor:  # fmt: skip
    """Normalise x by its own statistics, and update mean and var, or by mean and var."""
    given = (None, None) if own else (mean, var)
    y, statistics, _ = torch.ops.fastbn.normalize(
        x, weight, bias, *given, residual, each, eps, activation
    )
    if own and mean is not None and var is not None:
        groups = x.shape[0] if each else 1
        count = x.numel() // (x.shape[1] * groups)
        rows = statistics.detach()[: 3 * groups].unflatten(0, (3, groups)).mean(1)
        unbiased = rows[2] * (count / (count - 1))
        arrays.move(mean, rows[0], momentum)
        arrays.move(var, unbiased, momentum)
    result: Tensor = y
    return result
