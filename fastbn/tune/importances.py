"""How much each hyper-parameter matters, by the trials of a search."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastbn.demo import require
from fastbn.tune.rounds import Box, Record

FEWEST = 10  # trials; of fewer a fifth is too few to check a model with
FOLDS = 5
DRAWN, GRID = 256, 16  # points of the mean over the others, and of the scale


def importances(trials: Sequence[Record], boxes: Sequence[Box]) -> dict[str, float]:
    """Return the share of each tuned hyper-parameter; see `fastbn.tune.search.Result`."""
    seen = [record for record in trials if record.value is not None]
    values = np.array([record.sort_value for record in seen])
    if len(seen) < FEWEST or (values == values[0]).all():
        return {}
    names = list(boxes[0])
    x = np.array([[s.middle(r.params[n]) for n, s in boxes[0].items()] for r in seen])
    # Later rounds crowd a part of the space. A trial counts for as much of it as it stands for.
    density = np.zeros(len(seen))
    for index, box in enumerate(boxes, 1):
        share = sum(r.round == index for r in seen) / _volume(boxes[0], box)
        density += [share * all(r.params[n] in box[n] for n in names) for r in seen]
    weights = len(seen) / density
    above = values[:, None] > values, values[:, None] >= values
    ranks = sum(each @ weights for each in above) / (2 * weights.sum())

    models = require("sklearn.ensemble", "tune")
    selection = require("sklearn.model_selection", "tune")
    model = models.GradientBoostingRegressor(max_depth=2, random_state=0)
    folds = selection.KFold(FOLDS, shuffle=True, random_state=0)
    guessed = selection.cross_val_predict(model, x, ranks, cv=folds)
    if np.mean((ranks - guessed) ** 2) >= ranks.var():
        return {}  # it tells trials that it has not seen no better than their mean does
    model.fit(x, ranks, sample_weight=weights)
    drawn = np.random.default_rng(0).random((DRAWN, len(names)))
    grid = (np.arange(GRID) + 0.5) / GRID
    variances = []
    for column in range(len(names)):
        points = np.tile(drawn, (GRID, 1))
        points[:, column] = np.repeat(grid, DRAWN)
        variances.append(model.predict(points).reshape(GRID, DRAWN).mean(axis=1).var())
    total = sum(variances)
    return {n: float(v / total) for n, v in zip(names, variances, strict=True)} if total else {}


def _volume(whole: Box, box: Box) -> float:
    return float(np.prod([scale.width(box[name]) for name, scale in whole.items()]))
