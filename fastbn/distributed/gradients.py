"""Gradients averaged over the ranks before each step of an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn import checks
from fastbn.layers.collective import exchange
from fastbn.optim import Optimizer

BUCKET = 1 << 20  # values that are sent at a time; two more arrays of that size are there meanwhile


def average_gradients(
    comm: Any, examples: Callable[[], int] | None = None
) -> Callable[[Optimizer], None]:
    """Return a step pre-hook that replaces gradients by their average over all ranks.

    With g_i the gradients of rank i, which has n_i of the examples::

        g = sum g_i / sum n_i

    The sums are float64, in the order of ranks, so that all ranks get the same bits. Each rank adds
    up its share of the values and sends the result to all: as little is sent as in a ring.

    Parameters
    ----------
    comm : communicator
        Of mpi4py, or any object with `rank`, `size`, ``Allgather(send, recv)`` and
        ``Alltoall(send, recv)``.
    examples : callable, optional
        ``examples()`` is n_i: the loss whose gradients this rank has is the *sum* over so many
        examples, 0 or more. This is right for uneven parts too. By default n_i is 1: the loss is
        the mean over the examples of a rank, and all ranks have equally many.

    Returns
    -------
    callable
        To be given to ``optimizer.register_step_pre_hook``, before hooks that need the average
        (`WeightDecay`, `GradientClipping`). It sends the gradients of all layers of the step
        together: of all in ``step()``, of one layer under ``attach()``.

    Raises
    ------
    TypeError, ValueError
        If comm is no communicator; when a step runs, if a gradient is no array that can be written
        to, or there are no examples, or the ranks have gradients of other sizes. No gradient is
        changed then.
    RuntimeError
        When a step runs: if it failed on another rank.

    Notes
    -----
    A mean over uneven parts is not the average of the means, and with synchronised batch norm
    (`comm` of `BatchNorm`) its gradients are wrong before they get here: each rank would go back
    from another loss. So take the sum over the examples as the loss.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> from fastbn.distributed import average_gradients
    >>> class Alone:  # a communicator of one rank; `mpi4py.MPI.COMM_WORLD` is one of more
    ...     rank, size = 0, 1
    ...     def Allgather(self, send, recv):
    ...         recv[...] = send
    ...     Alltoall = Allgather
    >>> bn = fastbn.BatchNorm(2)
    >>> bn.grads["beta"][:] = 6, 8
    >>> sgd = fastbn.optim.SGD(bn, lr=1.0)
    >>> handle = sgd.register_step_pre_hook(average_gradients(Alone(), lambda: 2))
    >>> sgd.step()
    >>> bn.beta
    array([-3., -4.], dtype=float32)
    """
    checks.communicator("comm", comm, "Alltoall")
    if examples is not None and not callable(examples):
        raise TypeError(f"examples: expected a callable, got {type(examples).__name__}")

    def average(optimizer: Optimizer) -> None:
        with exchange(comm, 1 + len(checks.FLOATS)) as gather:
            named = [
                (f"grads[{name!r}]", layer.grads[name])
                for layer in optimizer.stepping
                for name in layer.params
            ]
            for name, grad in named:
                checks.ndarray(name, grad, checks.FLOATS)
                if not grad.flags.writeable:
                    raise ValueError(f"{name}: expected a writeable array, got a read-only one")
            weight = 1 if examples is None else checks.integer("examples()", examples(), 0)
            of_type = [[g for _, g in named if g.dtype == dtype] for dtype in checks.FLOATS]
            sizes = [sum(g.size for g in grads) for grads in of_type]
            rows = gather(np.array([weight, *sizes], np.float64))
        if (rows[:, 1:] != sizes).any():
            found = rows[:, 1:].sum(axis=1).astype(int).tolist()
            raise ValueError(f"grads: expected as many values on each rank, got {found}")
        total = rows[:, 0].sum()
        if total == 0:
            raise ValueError("examples(): expected some on all ranks together, got 0")
        for grads in filter(None, of_type):
            values = np.concatenate([g.ravel() for g in grads])
            for start in range(0, values.size, BUCKET):
                _average(comm, values[start : start + BUCKET], total)
            for g in grads:
                g[...], values = values[: g.size].reshape(g.shape), values[g.size :]

    return average


def _average(comm: Any, values: NDArray[Any], total: float) -> None:
    """Replace the values by their sum over the ranks, divided by a total."""
    share = -(-values.size // comm.size)
    shares = np.zeros((comm.size, share), values.dtype)
    shares.ravel()[: values.size] = values
    received = np.empty_like(shares)
    comm.Alltoall(shares, received)
    mine = np.zeros(share)
    with np.errstate(over="ignore", invalid="ignore"):  # a NaN, or what becomes one, stays visible
        for row in received:
            mine += row
        comm.Allgather((mine / total).astype(values.dtype), shares)
    values[...] = shares.ravel()[: values.size]
