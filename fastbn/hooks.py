"""Lists of functions to call at some point, each removable through the handle it was given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Handle:
    """Takes back what was registered."""

    def __init__(self, undo: Callable[[], object]) -> None:
        self._undo = undo

    def remove(self) -> None:
        """Take back what was registered; do nothing if that has been done."""
        self._undo()


class HookList:
    """Hooks in the order of their registration; a copy (`copy.deepcopy`, pickle) has none."""

    def __init__(self) -> None:
        self._hooks: dict[Handle, Callable[[Any], object]] = {}

    def register(self, hook: Callable[[Any], object]) -> Handle:
        """Append a hook and return the handle that removes it; a hook may be there twice."""
        if not callable(hook):
            raise TypeError(f"hook: expected a callable, got {type(hook).__name__}")
        handle = Handle(lambda: self._hooks.pop(handle, None))
        self._hooks[handle] = hook
        return handle

    def run(self, owner: object) -> None:
        """Call every hook with `owner`; one registered meanwhile waits for the next run."""
        for handle, hook in list(self._hooks.items()):
            if handle in self._hooks:  # a hook may have removed it
                hook(owner)

    def __len__(self) -> int:
        return len(self._hooks)

    def __reduce__(self) -> tuple[type[HookList], tuple[()]]:
        # Hooks are often lambdas, which cannot be pickled, or methods of what is not copied.
        return HookList, ()
