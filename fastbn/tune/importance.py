"""How much each hyper-parameter mattered."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from fastbn.demo import require
from fastbn.tune.rounds import Record
from fastbn.tune.space import Scale


def importances(trials: Sequence[Record], scales: Mapping[str, Scale]) -> dict[str, float]:
    """Return how much of the order of the trials each hyper-parameter explains.

    Functional analysis of variance over the ranks of the values: a few trials that diverged would
    else explain everything. Trials that were stopped count with their last value. The shares add up
    to 1; where there are no differences to explain there are none.

    References
    ----------
    Hutter, Hoos, Leyton-Brown, An efficient approach for assessing hyperparameter importance,
    ICML 2014.
    """
    optuna = require("optuna", "tune")
    seen = [record for record in trials if record.value is not None]
    order = sorted({record.sort_value for record in seen})
    if len(order) < 2:
        return {}
    study = optuna.create_study()
    for record in seen:
        study.add_trial(
            optuna.create_trial(
                value=float(order.index(record.sort_value)),
                params={name: scale.encode(record.params[name]) for name, scale in scales.items()},
                distributions={name: scale.distribution() for name, scale in scales.items()},
            )
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about trees of few trials
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {name: float(found.get(name, 0.0)) for name in scales}
