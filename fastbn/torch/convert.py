"""convert and revert: the norms of a whole model, in place."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from fastbn.torch import fuse as fusion
from fastbn.torch import modules
from fastbn.torch.sync import SyncBatchNorm

M = TypeVar("M", bound=nn.Module)

NAMES = [
    f"{lazy}{kind}{n}d"
    for lazy in ("", "Lazy")
    for kind in ("BatchNorm", "InstanceNorm")
    for n in (1, 2, 3)
]
OURS = {getattr(nn, name): getattr(modules, name) for name in NAMES}
OURS[nn.SyncBatchNorm] = SyncBatchNorm
TORCHS = {ours: torchs for torchs, ours in OURS.items()}


def convert(module: M, sync: bool = False, process_group: Any = None, fuse: bool = False) -> M:
    """Make the norms of a model those of `fastbn.torch`, in place.

    The modules stay the same objects and only change their class. So parameters, buffers, hooks,
    optimizers, modules in several places and the training flag stay as they are. Modules of other
    classes, subclasses of PyTorch's norms among them, are left alone.

    Parameters
    ----------
    module : torch.nn.Module
        A model, or a norm itself.
    sync : bool
        Make `SyncBatchNorm` of batch norms.
    process_group
        For these norms, as of `SyncBatchNorm`.
    fuse : bool
        Let a norm do the ReLU behind it as well, or the addition and the ReLU behind it (as at the
        end of a residual block). `torch.fx` traces the modules that call norms, so their forward
        must not depend on the type of its arguments. Those that cannot be traced, do otherwise in
        training than in evaluation, or have optional arguments, are left alone; so are norms and
        ReLUs that have hooks or are called twice. Results change by rounding alone.

    Returns
    -------
    torch.nn.Module
        module itself.

    Raises
    ------
    TypeError, ValueError
        If `module` is no module, or there is a process group without `sync`, or a lazy batch norm
        to be synchronised that has not seen an input yet. Nothing has been changed then.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    >>> fastbn.torch.convert(model)[1]
    BatchNorm2d(8, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)
    """
    _check(module)
    if process_group is not None and not sync:
        raise ValueError("process_group: expected None without sync=True, got one")
    batch_norms = {}
    for name, each in module.named_modules():
        torchs = TORCHS.get(type(each), type(each))
        if sync and torchs in OURS and isinstance(each, nn.modules.batchnorm._BatchNorm):
            if torchs.__name__.startswith("Lazy"):
                raise ValueError(
                    f"module: expected batch norms that know their number of channels, got lazy "
                    f"{name!r}; call the module once before sync=True"
                )
            batch_norms[each] = torchs
    for each in module.modules():
        if each in batch_norms:
            if batch_norms[each] is not nn.SyncBatchNorm:
                each._converted_from = batch_norms[each]
            each.__class__ = SyncBatchNorm
            each.process_group = process_group
        elif type(each) in OURS:
            each.__class__ = OURS[type(each)]
    if fuse:
        fusion.fuse(module)
    return module


def revert(module: M) -> M:
    """Make the norms of a model PyTorch's again, in place: the opposite of `convert`.

    What `convert` has fused is taken apart.

    Parameters
    ----------
    module : torch.nn.Module
        A model, or a norm itself.

    Returns
    -------
    torch.nn.Module
        module itself.

    Raises
    ------
    TypeError, ValueError
        If `module` is no module, or has norms that were made with an activation, which PyTorch's
        norms lack. Nothing has been changed then.
    """
    _check(module)
    fused = fusion.fused_norms(module)
    for name, each in module.named_modules():
        if type(each) in TORCHS and each.activation is not None and each not in fused:
            raise ValueError(
                f"module: expected norms without an activation of their own, got {name!r}: {each}"
            )
    fusion.separate(module)
    for each in module.modules():
        if type(each) in TORCHS:
            each.__class__ = each.__dict__.pop("_converted_from", TORCHS[type(each)])
            if type(each) is not nn.SyncBatchNorm:
                each.__dict__.pop("process_group", None)
    return module


def _check(module: Any) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected torch.nn.Module, got {type(module).__name__}")
