"""fastbn.torch where PyTorch is absent, and what it shares with the process: threads."""

import importlib.util

import pytest
from support import python


def test_without_torch_the_extra_is_named():
    code = "import sys; sys.modules['torch'] = None; import fastbn; import fastbn.torch"
    found = python(code)
    assert found.returncode == 1
    assert "ImportError: fastbn.torch: expected PyTorch" in found.stderr
    assert 'pip install "fastbn[torch]"' in found.stderr


FOLLOWED = """
import torch, fastbn, fastbn.torch
{before}
torch.set_num_threads(3)
fastbn.torch.batch_norm(torch.randn(4, 3), None, None, training=True)
print(fastbn.get_num_threads())
torch.set_num_threads(2)
fastbn.torch.batch_norm(torch.randn(4, 3), None, None, training=True)
print(fastbn.get_num_threads())
"""


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
@pytest.mark.parametrize(
    ("before", "environment", "seen"),
    [
        ("", {"FASTBN_NUM_THREADS": None}, ["3", "2"]),
        ("", {"FASTBN_NUM_THREADS": "5"}, ["5", "5"]),
        ("fastbn.set_num_threads(4)", {"FASTBN_NUM_THREADS": None}, ["4", "4"]),
    ],
)
def test_threads_follow_torch_unless_they_were_set(before, environment, seen):
    found = python(FOLLOWED.format(before=before), **environment)
    assert found.stdout.split() == seen, found.stderr


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
def test_threads_that_threadpoolctl_has_set_stay(monkeypatch):
    pytest.importorskip("threadpoolctl")
    code = (
        "import torch, threadpoolctl, fastbn, fastbn.torch\n"
        "torch.set_num_threads(3)\n"
        "norm = lambda: fastbn.torch.batch_norm(torch.randn(4, 3), None, None, training=True)\n"
        "norm()\n"
        "with threadpoolctl.threadpool_limits(1, user_api='fastbn'):\n"
        "    norm()\n"
        "    print(fastbn.get_num_threads())\n"
        "norm()\n"
        "print(fastbn.get_num_threads())"
    )
    found = python(code, FASTBN_NUM_THREADS=None)
    assert found.stdout.split() == ["1", "3"], found.stderr
