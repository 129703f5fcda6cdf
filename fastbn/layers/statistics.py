"""Exact running statistics over a data set."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fastbn import checks, functional
from fastbn.layers.base import Norm
from fastbn.layers.batch_norm import BatchNorm


def update_statistics(
    layers: Sequence[Any], batches: Iterable[Any], forward: Callable[[Any], object] | None = None
) -> None:
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

    Raises
    ------
    TypeError, ValueError
        If an argument is no iterable, there are no batches, no layer is such a `BatchNorm`, or the
        network leaves one of them out. Nothing is changed then, nor if `forward` fails.

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

    keeping = [n for n in layers if isinstance(n, Norm)]  # no other norm must move either
    before = [(norm.training, norm._keeps, norm._pass, norm._seen) for norm in keeping]
    try:
        for norm in keeping:
            norm._seen = []
            norm.train()
        for batch in batches:
            (forward or one_after_the_other)(batch)
        seen = [norm._seen or [] for norm in norms]
    finally:
        for norm, state in zip(keeping, before, strict=True):
            norm.training, norm._keeps, norm._pass, norm._seen = state
    if not all(seen):
        words = "one or more that go through every BatchNorm in layers"
        got = f"{[len(moments) for moments in seen]} for the {len(norms)} of them"
        raise ValueError(f"batches: expected {words}, got {got}")
    targets = [norm._writeable("running_mean", "running_var") for norm in norms]
    merged = [functional.merge_moments(*moments) for moments in seen]
    for norm, arrays, moments, (mean, var, count) in zip(norms, targets, seen, merged, strict=True):
        arrays["running_mean"][...] = mean
        arrays["running_var"][...] = var * (count / (count - 1))
        norm.num_batches_tracked = len(moments)
