import copy
import pickle

import pytest

from fastbn.hooks import HookList


def test_hooks_run_in_order_of_registration():
    seen = []
    hooks = HookList()
    hooks.register(lambda owner: seen.append(("a", owner)))
    hooks.register(lambda owner: seen.append(("b", owner)))
    hooks.run(7)
    assert seen == [("a", 7), ("b", 7)]
    assert len(hooks) == 2


def test_remove_takes_one_registration_away_and_may_be_repeated():
    seen = []
    hooks = HookList()
    first = hooks.register(seen.append)
    hooks.register(seen.append)
    assert first.remove() is None
    first.remove()
    hooks.run(1)
    assert seen == [1]


def test_a_hook_may_remove_itself():
    seen = []
    hooks = HookList()

    def once(owner):
        seen.append(owner)
        handle.remove()

    handle = hooks.register(once)
    hooks.register(seen.append)
    hooks.run(1)
    hooks.run(2)
    assert seen == [1, 1, 2]


def test_a_hook_removed_during_a_run_is_not_called():
    seen = []
    hooks = HookList()
    hooks.register(lambda _: later.remove())
    later = hooks.register(seen.append)
    hooks.run(1)
    assert seen == []


def test_a_hook_registered_during_a_run_waits_for_the_next():
    seen = []
    hooks = HookList()
    first = hooks.register(lambda _: hooks.register(seen.append))
    hooks.run(1)
    assert seen == []
    first.remove()
    hooks.run(2)
    assert seen == [2]


def test_refuses_what_cannot_be_called():
    hooks = HookList()
    with pytest.raises(TypeError, match="hook: expected a callable, got int"):
        hooks.register(3)
    assert len(hooks) == 0


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))]
)
def test_copies_have_no_hooks_and_leave_the_original_alone(duplicate):
    seen = []
    hooks = HookList()
    hooks.register(lambda owner: seen.append(owner))
    twin = duplicate(hooks)
    twin.run(1)
    assert seen == []
    assert len(twin) == 0
    hooks.run(2)
    assert seen == [2]
    twin.register(lambda owner: seen.append(-owner))
    twin.run(3)
    assert seen == [2, -3]
