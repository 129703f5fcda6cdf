"""The modules: subclasses of PyTorch's, so all but the computation is PyTorch's own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastbn import checks
from fastbn.functional import Activation, entry
from fastbn.torch.functional import batch_norm, instance_norm, is_watched


class _Norm(nn.Module):
    """What the modules share: an activation that follows."""

    activation: Activation = None

    def __init__(self, *args: Any, activation: Activation = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if activation is not None:
            self.activation = checks.activation(activation)

    def extra_repr(self) -> str:
        rest = "" if self.activation is None else f", activation={self.activation!r}"
        return f"{super().extra_repr()}{rest}"


class _BatchNorm(_Norm):
    _batch_norm = staticmethod(batch_norm)  # SyncBatchNorm has another

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:  # noqa: A002
        self._check_input_dim(input)
        mean, var, weight = self.running_mean, self.running_var, self.momentum
        own = self.training or (mean is None and var is None)
        if self.training:
            if not self.track_running_stats:
                mean = var = None
            elif self.num_batches_tracked is not None:
                tracked = self.num_batches_tracked
                # add_ takes as long as a small norm, but what watches operators has to see it.
                if is_watched() or not entry.count_up(tracked):
                    tracked.add_(1)
                if weight is None:
                    weight = 1.0 / float(tracked)
        return self._batch_norm(
            input, mean, var, self.weight, self.bias, own, 0.0 if weight is None else weight,
            self.eps, activation=self.activation, residual=residual,
        )  # fmt: skip


class _InstanceNorm(_Norm):
    def _apply_instance_norm(self, input: Tensor) -> Tensor:  # noqa: A002
        return instance_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias,
            self.training or not self.track_running_stats,
            0.0 if self.momentum is None else self.momentum, self.eps, activation=self.activation,
        )  # fmt: skip


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d`."""


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d`."""


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d`."""


class InstanceNorm1d(_InstanceNorm, nn.InstanceNorm1d):
    """`torch.nn.InstanceNorm1d`."""


class InstanceNorm2d(_InstanceNorm, nn.InstanceNorm2d):
    """`torch.nn.InstanceNorm2d`."""


class InstanceNorm3d(_InstanceNorm, nn.InstanceNorm3d):
    """`torch.nn.InstanceNorm3d`."""


class LazyBatchNorm1d(_BatchNorm, nn.LazyBatchNorm1d):
    """`torch.nn.LazyBatchNorm1d`."""

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(_BatchNorm, nn.LazyBatchNorm2d):
    """`torch.nn.LazyBatchNorm2d`."""

    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(_BatchNorm, nn.LazyBatchNorm3d):
    """`torch.nn.LazyBatchNorm3d`."""

    cls_to_become = BatchNorm3d


class LazyInstanceNorm1d(_InstanceNorm, nn.LazyInstanceNorm1d):
    """`torch.nn.LazyInstanceNorm1d`."""

    cls_to_become = InstanceNorm1d


class LazyInstanceNorm2d(_InstanceNorm, nn.LazyInstanceNorm2d):
    """`torch.nn.LazyInstanceNorm2d`."""

    cls_to_become = InstanceNorm2d


class LazyInstanceNorm3d(_InstanceNorm, nn.LazyInstanceNorm3d):
    """`torch.nn.LazyInstanceNorm3d`."""

    cls_to_become = InstanceNorm3d
