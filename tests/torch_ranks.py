"""One of three processes that share minibatches, started by tests/test_torch_sync.py.

`python torch_ranks.py RANK FOLDER` writes what it found to RANK.npz.
"""

import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch import distributed, nn

import fastbn.torch

STEPS = 3
CASES = {  # shape of the whole minibatch, where it is cut for 2 and for 3 processes, options
    "uneven": ((11, 5, 6, 7), [3], [3, 4], {}),
    "empty": ((6, 5, 4, 4), [6], [0, 4], {}),
    "single": ((3, 5), [2], [1, 2], {"momentum": None}),
    "last": ((7, 5, 6, 7), [4], [1, 6], {"memory_format": torch.channels_last}),
    "fused": ((9, 5, 33), [5], [5, 5], {"activation": "relu", "residual": True}),
    "constant": ((8, 5, 4, 4), [3], [2, 5], {"affine": False, "track_running_stats": False}),
    "double": ((8, 5, 4, 4), [3], [2, 5], {"dtype": torch.float64}),
    "bfloat16": ((8, 5, 4, 4), [3], [2, 5], {"kind": torch.bfloat16}),
}


def arrays_of(name):
    """Return x, dy and the residual of all steps of a case, for all processes."""
    shape = CASES[name][0]
    rng = np.random.default_rng(sum(map(ord, name)))
    x, dy, residual = rng.standard_normal((3, STEPS, *shape))
    mean = 3 if name == "bfloat16" else 1e3
    return [torch.from_numpy(a.astype(np.float32)) for a in (x + mean, dy, residual)]


def parameters(module):
    """Give a module's weight and bias, if any, values that are not ones and zeros."""
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter += torch.linspace(-0.4, 0.4 + i, parameter.numel())
    return module


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 16, 2),
    )  # fmt: skip


def train(model, x, labels):
    """Train some steps; return the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def images():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, 3, 6, 6, generator=generator)
    return x, (x.mean((1, 2, 3)) > 0).long()


def synchronised(name, rank, count, group):
    """Return what a case gives to one process of a group of 2 or 3."""
    shape, *cuts, _ = CASES[name]
    ends = [0, *cuts[count - 2], shape[0]]
    part = slice(ends[rank], ends[rank + 1])
    x, dy, residual = arrays_of(name)
    options = dict(CASES[name][3])
    layout = options.pop("memory_format", torch.contiguous_format)
    kind = options.pop("kind", options.get("dtype", torch.float32))
    with_residual = options.pop("residual", False)
    norm = parameters(fastbn.torch.SyncBatchNorm(5, process_group=group, **options))
    found = {}
    for step in range(STEPS):
        mine, gradient, addend = (
            a[step][part].to(kind).contiguous(memory_format=layout) for a in (x, dy, residual)
        )
        mine.requires_grad_()
        addend.requires_grad_()
        y = norm(mine, addend if with_residual else None)
        y.backward(gradient)
        found |= {f"y{step}": y, f"dx{step}": mine.grad}
        if with_residual:
            found[f"dresidual{step}"] = addend.grad
    found |= {f"d{key}": p.grad for key, p in norm.named_parameters()}
    found |= dict(norm.named_buffers())
    return {
        f"{count}.{name}.{key}": value.detach().to(
            torch.float64 if value.is_floating_point() else None
        )
        for key, value in found.items()
    }


def refused(found, rank):
    """Try what is refused in all processes alike."""
    norm = fastbn.torch.SyncBatchNorm(2)
    for name, x in {
        "alone": torch.ones(int(rank == 0), 2),
        "integers": torch.ones(3, 2, dtype=torch.int32),
    }.items():
        try:
            norm(x)
        except (TypeError, ValueError) as error:
            found[name] = str(error)
    assert (norm.running_mean == 0).all()
    if rank == 0:  # which waits for nobody
        torch.testing.assert_close(norm.eval()(torch.ones(1, 2)), torch.ones(1, 2))


def main(rank, folder):
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    pair = distributed.new_group([0, 1])
    found = {}
    for name in CASES:
        found |= synchronised(name, rank, 3, None)
        if rank < 2:
            found |= synchronised(name, rank, 2, pair)
    refused(found, rank)
    x, labels = images()
    model = fastbn.torch.convert(network(), sync=True)
    wrapped = nn.parallel.DistributedDataParallel(model)
    found["losses"] = train(wrapped, x[rank::3], labels[rank::3])
    found |= {f"model.{key}": value for key, value in model.state_dict().items()}
    np.savez(Path(folder, f"{rank}.npz"), **{key: np.asarray(v) for key, v in found.items()})
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
