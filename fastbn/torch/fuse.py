"""Norms that do the addition and the ReLU behind them as well, found by torch.fx.

A module that calls such norms (a residual block, say) gets a subclass of its class, with a forward
that torch.fx has written. So it stays the same object, with all that it has.
"""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from collections.abc import Container
from typing import Any

import torch
from torch import fx, nn

from fastbn.torch.modules import _BatchNorm, _Norm

RELUS = {"relu", "relu_", torch.relu, torch.relu_, nn.functional.relu, nn.functional.relu_}
SUMS = {"add", torch.add, operator.add}
SUMS_IN_PLACE = {"add_", operator.iadd}
PRODUCTS = (nn.Linear, nn.modules.conv._ConvNd)  # whose results are new tensors


class _Fused(nn.Module):
    """What the subclasses share. Copies and pickles name the class before, and are traced again."""

    _fused: frozenset[str]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _not_yet_fused, (_class_before(self),), self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if _fuse_calls(self, self._fused) != self._fused:
            raise RuntimeError(f"{type(self).__name__}: torch.fx does not find what was fused")


def _class_before(module: _Fused) -> type:
    return type(module).__bases__[1]


def _subclass(of: type, **members: Any) -> type:
    return type(of.__name__, (_Fused, of), members)


def _not_yet_fused(of: type) -> nn.Module:
    module: nn.Module = object.__new__(_subclass(of))
    return module


def fuse(model: nn.Module) -> None:
    """Fuse, in a whole model, norms with what follows them."""
    owners = Counter(child for each in model.modules() for child in each.children())
    for each in list(model.modules()):
        norms = {
            name
            for name, norm in each.named_modules()
            if isinstance(norm, _Norm) and norm.activation is None and not _has_hooks(norm)
            and owners[norm] < 2
        }  # fmt: skip
        if norms and not isinstance(each, _Norm | _Fused):
            _fuse_calls(each, norms)


def fused_norms(model: nn.Module) -> set[nn.Module]:
    """Return the norms of a model that do more than they did."""
    return {
        each.get_submodule(name)
        for each in model.modules()
        if isinstance(each, _Fused)
        for name in each._fused
    }


def separate(model: nn.Module) -> None:
    """Undo `fuse`."""
    for norm in fused_norms(model):
        del norm.activation
    for each in model.modules():
        if isinstance(each, _Fused):
            each.__class__ = _class_before(each)
            del each._fused


def _has_hooks(module: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, *_: Any) -> bool:
        return True


def _traced(module: nn.Module) -> fx.Graph | None:
    """Return what the forward of a module does, if it is the same for all inputs and modes."""
    if "forward" in module.__dict__:  # in the way of what its class has
        return None
    parameters = inspect.signature(module.forward).parameters.values()
    plain = inspect.Parameter.POSITIONAL_OR_KEYWORD
    if any(p.kind != plain or p.default is not p.empty for p in parameters):
        return None
    before, graphs, members = module.training, [], dict(module.__dict__)
    try:
        for mode in (True, False):
            module.training = mode
            graphs.append(_Tracer().trace(module))
    except Exception:  # whatever code that meets a Proxy for a tensor raises
        return None
    finally:
        module.training = before
        changed = {*map(id, module.__dict__.values())} != {*map(id, members.values())}
        module.__dict__.clear()  # of what forward may have kept
        module.__dict__.update(members)
    return graphs[0] if str(graphs[0]) == str(graphs[1]) and not changed else None


def _fuse_calls(module: nn.Module, norms: Container[str]) -> set[str]:
    """Fuse what the forward of a module calls, of these norms; return those where it could."""
    graph = _traced(module)
    if graph is None:
        return set()
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    fused = set()
    for node in list(graph.nodes):
        once = node.op == "call_module" and calls[node.target] == 1
        if once and node.target in norms and _fuse_call(module, node):
            fused.add(node.target)
    if fused:
        for name in fused:
            module.get_submodule(name).activation = "relu"
        before = _class_before(module) if isinstance(module, _Fused) else type(module)
        forward = type(fx.GraphModule(module, graph)).forward
        module._fused = frozenset(fused)
        module.__class__ = _subclass(before, forward=forward)
    return fused


def _fuse_call(module: nn.Module, norm: fx.Node) -> bool:
    """Let a call of a norm stand for the ReLU behind it, or for addition and ReLU; tell if so."""
    if len(norm.args) != 1 or norm.kwargs:
        return False
    [x] = norm.args
    total = _only_user(norm)
    addend = _addend(module, norm, total)
    relu = total if addend is None else _only_user(total)
    if relu is None or not _is_relu(module, relu):
        return False
    if addend is None:
        relu.replace_all_uses_with(norm)
        norm.graph.erase_node(relu)
        return True
    with norm.graph.inserting_before(relu):
        relu.replace_all_uses_with(norm.graph.call_module(norm.target, (x, addend)))
    for node in (relu, total, norm):
        norm.graph.erase_node(node)
    return True


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_relu(module: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        relu = module.get_submodule(node.target)
        return type(relu) is nn.ReLU and not _has_hooks(relu)
    return node.target in RELUS


def _addend(module: nn.Module, norm: fx.Node, total: fx.Node | None) -> fx.Node | None:
    """Return what is added to the result of a norm, if the norm can be called that late."""
    if total is None or total.op == "call_module" or total.target not in SUMS | SUMS_IN_PLACE:
        return None
    if len(total.args) != 2 or total.kwargs:
        return None
    first, second = total.args
    addend = second if first is norm else first
    if not isinstance(addend, fx.Node) or addend is norm:
        return None
    if first is not norm and total.target in SUMS_IN_PLACE:
        return None
    # Nothing else may have changed x meanwhile.
    x = norm.args[0]
    late = (
        x.op == "call_module"
        and isinstance(module.get_submodule(x.target), PRODUCTS)
        and len(x.users) == 1
    )
    batch_norm = isinstance(module.get_submodule(norm.target), _BatchNorm)
    return addend if late and batch_norm else None
