"""SyncBatchNorm: several processes give what one gives, and each the same bits."""

import copy
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this PyTorch has no Gloo", allow_module_level=True)

import torch_ranks  # noqa: E402
from test_docs import blocks_of  # noqa: E402
from torch_ranks import CASES, STEPS, arrays_of, parameters  # noqa: E402

import fastbn.torch  # noqa: E402

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
if Path("/sys/class/net/lo").exists():
    ENVIRONMENT["GLOO_SOCKET_IFNAME"] = "lo"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Return what each of three processes has found."""
    folder = tmp_path_factory.mktemp("ranks")
    processes = [
        subprocess.Popen(
            [sys.executable, torch_ranks.__file__, str(rank), folder],
            env=ENVIRONMENT, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(3)
    ]  # fmt: skip
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert not any(process.returncode for process in processes), "\n".join(errors)
    return [dict(np.load(folder / f"{rank}.npz")) for rank in range(3)]


def of_one_process(name):
    """Return what PyTorch's norm in float64 gives to the whole minibatch of a case."""
    options = {
        key: value
        for key, value in CASES[name][3].items()
        if key in ("affine", "momentum", "track_running_stats")
    }
    x, dy, residual = arrays_of(name)
    if name == "bfloat16":
        x, dy = x.bfloat16(), dy.bfloat16()
    norm = parameters(torch.nn.SyncBatchNorm(5, dtype=torch.float64, **options))
    found = {}
    for step in range(STEPS):
        whole, addend = (a[step].double().requires_grad_() for a in (x, residual))
        y = norm(whole)
        y = torch.relu(y + addend) if name == "fused" else y
        y.backward(dy[step].double())
        found |= {f"y{step}": y, f"dx{step}": whole.grad, f"dresidual{step}": addend.grad}
    found |= {f"d{key}": p.grad for key, p in norm.named_parameters()}
    found |= dict(norm.named_buffers())
    return {key: value.detach().numpy() for key, value in found.items() if value is not None}


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_parts_give_what_the_whole_gives(ranks, name, count):
    error = 1e-2 if name == "bfloat16" else 1e-12 if name == "double" else 2e-6
    wanted = of_one_process(name)
    about = f"{count}.{name}."
    found = [
        {key.removeprefix(about): value for key, value in each.items() if key.startswith(about)}
        for each in ranks[:count]
    ]
    assert found[0].keys() - {"num_batches_tracked"} <= wanted.keys()
    assert ("dresidual0" in found[0]) == (name == "fused")
    assert ("running_var" in found[0]) == ("dweight" in found[0]) == (name != "constant")
    for key in found[0]:
        parts = [each[key] for each in found]
        if key == "num_batches_tracked":
            assert parts == [STEPS] * len(parts)
        elif key.startswith("running"):
            for part in parts:
                np.testing.assert_array_equal(part, parts[0])  # to the bit
            np.testing.assert_allclose(parts[0], wanted[key], rtol=max(error, 1e-7))
        elif key in ("dweight", "dbias"):
            np.testing.assert_allclose(np.sum(parts, 0), wanted[key], atol=error * STEPS * 10)
        else:
            np.testing.assert_allclose(np.concatenate(parts), wanted[key], rtol=0, atol=error * 3)


def test_too_few_values_in_all_processes_are_refused_in_each(ranks):
    for each in ranks:
        assert "Expected more than 1 value per channel when training, got 1" in str(each["alone"])


def test_what_could_not_be_synchronised_is_refused(ranks):
    for each in ranks:
        assert str(each["integers"]).startswith("input: expected a dense tensor of float16")


def test_ddp_trains_a_converted_model_as_one_process_trains_it(ranks):
    model = torch_ranks.network()
    losses = torch_ranks.train(model, *torch_ranks.images())
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(np.mean([each["losses"] for each in ranks], 0), losses, rtol=1e-5)
    for key, value in model.state_dict().items():
        for each in ranks:
            np.testing.assert_array_equal(each[f"model.{key}"], ranks[0][f"model.{key}"])
        np.testing.assert_allclose(ranks[0][f"model.{key}"], value, atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4), (6, 3, 4, 5), (6, 3, 2, 4, 5)])
def test_in_one_process_it_is_batch_norm(shape):
    x = torch.randn(shape)
    ours, torchs = fastbn.torch.SyncBatchNorm(3), torch.nn.SyncBatchNorm(3)
    for _ in range(2):
        torch.testing.assert_close(ours(x), torchs(x))
    torch.testing.assert_close(ours.state_dict(), torchs.state_dict())
    torch.testing.assert_close(ours.eval()(x), torchs.eval()(x))


def test_it_looks_like_that_of_torch():
    ours = fastbn.torch.SyncBatchNorm(3, 1e-3, None, affine=True, dtype=torch.float64)
    torchs = torch.nn.SyncBatchNorm(3, 1e-3, None, affine=True, dtype=torch.float64)
    assert repr(ours) == repr(torchs)
    assert "activation='relu'" in repr(fastbn.torch.SyncBatchNorm(3, activation="relu"))
    assert isinstance(ours, torch.nn.modules.batchnorm._BatchNorm)
    torchs.load_state_dict(ours.state_dict())
    for duplicate in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert repr(duplicate) == repr(ours)
    converted = torch.nn.SyncBatchNorm.convert_sync_batchnorm(ours)
    assert type(converted) is torch.nn.SyncBatchNorm
    assert converted.weight is ours.weight


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(3), "expected at least 2D input \\(got 1D input\\)"),
        (torch.ones(3, 0), "number of input channels should be non-zero"),
        (torch.ones(1, 3), "Expected more than 1 value per channel when training"),
    ],
)
def test_wrong_inputs_raise_as_those_of_torch_do(x, message):
    for norm in (fastbn.torch.SyncBatchNorm(3), torch.nn.SyncBatchNorm(3)):
        with pytest.raises(ValueError, match=message):
            norm(x)


def test_the_script_of_the_page_runs_under_torchrun(tmp_path):
    page = Path(__file__).parent.parent / "docs" / "torch.md"
    (tmp_path / "train.py").write_text(blocks_of(page, "python")[1], encoding="utf-8")
    [command] = re.findall("^    torchrun (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *command.split()],
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = dict(re.findall(r"process (\d): (\S+)", done.stdout))
    assert found.keys() == {"0", "1"}
    assert found["0"] == found["1"]
