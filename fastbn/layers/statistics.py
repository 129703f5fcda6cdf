"""Exact running statistics over a data set."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from fastbn import checks, functional
from fastbn.functional import Moments
from fastbn.functional.parts import merge_packed, packed
from fastbn.layers.base import Array, Norm
from fastbn.layers.batch_norm import BatchNorm
from fastbn.layers.collective import Communicator, Row, exchange


def update_statistics(
    layers: Sequence[Any], batches: Iterable[Any], forward: Callable[[Any], object] | None = None,
    *, comm: Communicator | None = None,
) -> None:  # fmt: skip
    """Replace running statistics by the exact ones over a data set ("precise batch norm").

    Each minibatch goes through the network with its norms in training mode, normalised by itself.
    Means and variances of what the batch norms saw are pooled (`merge_moments`), instead of fading
    away as new minibatches come. Nothing else of the norms changes, neither modes nor other running
    statistics nor what `backward` goes back through.

    Parameters
    ----------
    layers : sequence of layers
        The network. Those of type `BatchNorm` that keep running statistics are updated, unless they
        are frozen.
    batches : iterable
        What goes into the network, minibatch by minibatch.
    forward : callable, optional
        ``forward(batch)`` runs the network. By default the layers are called one after the other.
    comm : communicator, optional
        The batches of all its ranks count, and all get the same bits. By default the communicator
        of the layers, where they have one. A rank whose layers have none may have no batches.

    Raises
    ------
    TypeError, ValueError
        If an argument is no iterable, there are no batches, no layer is such a `BatchNorm`, or the
        network leaves one of them out. Nothing is changed then, nor if `forward` fails.
    RuntimeError
        If it failed on another rank.

    References
    ----------
    .. [1] Y. Wu, J. Johnson, "Rethinking 'Batch' in BatchNorm", 2021,
       https://arxiv.org/abs/2105.07576

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> bn = fastbn.BatchNorm(1)
    >>> fastbn.update_statistics([bn], [np.array([[1.0], [3.0]]), np.array([[5.0], [7.0]])])
    >>> bn.running_mean, bn.running_var
    (array([4.]), array([6.66666667]))
    """
    layers = list(checks.iterator("layers", layers))
    batches = checks.iterator("batches", batches)
    norms = [
        n for n in layers if isinstance(n, BatchNorm) and n.track_running_stats and not n.frozen
    ]
    if not norms:
        frozen = " that is not frozen" if any(getattr(n, "frozen", False) for n in layers) else ""
        words = "a BatchNorm with running statistics"
        raise ValueError(f"layers: expected {words}, got none{frozen}")

    def one_after_the_other(batch: Any) -> None:
        for layer in layers:
            batch = layer(batch) if callable(layer) else layer.forward(batch)

    def collect() -> list[list[Moments]]:
        """Return what each of the norms saw."""
        keeping = [n for n in layers if isinstance(n, Norm)]  # no other norm must move either
        before = [(norm.training, norm._keeps, norm._pass, norm._seen) for norm in keeping]
        try:
            for norm in keeping:
                norm._seen = []
                norm.train()
            for batch in batches:
                (forward or one_after_the_other)(batch)
            return [norm._seen or [] for norm in norms]
        finally:
            for norm, state in zip(keeping, before, strict=True):
                norm.training, norm._keeps, norm._pass, norm._seen = state

    if comm is None:
        comm = next((norm.comm for norm in norms if norm.comm is not None), None)
    if comm is None:
        seen, targets = collect(), [_targets(norm) for norm in norms]
        counts = [len(moments) for moments in seen]
        _refuse_unseen(counts)
        merged = [functional.merge_moments(*moments) for moments in seen]
    else:
        sizes = [3 * norm.num_features + 2 for norm in norms]
        with exchange(checks.communicator("comm", comm), sum(sizes)) as gather:
            seen, targets = collect(), [_targets(norm) for norm in norms]
            own = [_packed(*each) for each in zip(norms, seen, strict=True)]
            rows = gather(np.concatenate(own))
        of_norms = np.split(rows, np.cumsum(sizes)[:-1], axis=1)
        counts = [round(each[:, 0].sum()) for each in of_norms]
        _refuse_unseen(counts)
        merged = [merge_packed(each[:, 1:]) for each in of_norms]
    for norm, arrays, tracked, moments in zip(norms, targets, counts, merged, strict=True):
        mean, var, count = moments
        arrays["running_mean"][...] = mean
        arrays["running_var"][...] = var * (count / (count - 1))
        norm.num_batches_tracked = tracked


def _targets(norm: BatchNorm) -> dict[str, Array]:
    return norm._writeable("running_mean", "running_var")


def _refuse_unseen(counts: Sequence[int]) -> None:
    if not all(counts):
        words = "one or more that go through every BatchNorm in layers"
        raise ValueError(f"batches: expected {words}, got {counts} for the {len(counts)} of them")


def _packed(norm: BatchNorm, seen: Sequence[Moments]) -> Row:
    """Return this rank's moments, behind how many minibatches they are of.

    All ranks that share a minibatch count it, each for its share.
    """
    nothing = np.zeros(norm.num_features)
    moments = functional.merge_moments(Moments(nothing, nothing, 0), *seen)
    minibatches = len(seen) / (1 if norm.comm is None else norm.comm.size)
    return np.concatenate([[minibatches], packed(moments)])
