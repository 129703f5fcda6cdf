"""The tuning process: a search for hyper-parameters, random on the right scales, coarse to fine.

For example::

    from fastbn.tune import log_uniform, one_minus_log_uniform, search

    def objective(params):
        return validation_loss_after_training_with(**params)

    space = {"lr": log_uniform(1e-4, 1), "momentum": one_minus_log_uniform(0.9, 0.999)}
    if __name__ == "__main__":
        print(search(objective, space, trials=40, workers=2).best)

It needs the extra: ``pip install "fastbn[tune]"``.
"""

from fastbn.tune.search import Result, search
from fastbn.tune.space import choice, integer, log_uniform, one_minus_log_uniform, uniform

__all__ = [
    "Result",
    "choice",
    "integer",
    "log_uniform",
    "one_minus_log_uniform",
    "search",
    "uniform",
]
