"""Train the demo's residual network with fused layers, and with norm, addition and ReLU in steps.

Both take turns, minibatch by minibatch, so that noise falls on both. Run it on a quiet machine:
`python bench/train_fused.py [--data mnist5k] [--epochs 5] [--hidden 16,32]`.
"""

import argparse
import os
from operator import truediv
from statistics import median
from time import perf_counter

import numpy as np
from threadpoolctl import threadpool_limits

from fastbn import BatchNorm, runtime_info
from fastbn.demo.config import configure
from fastbn.demo.data import load
from fastbn.demo.layers import ReLU, softmax_cross_entropy
from fastbn.demo.network import Container
from fastbn.demo.train import Trainer


class Steps(Container):
    """Norm, addition and ReLU, one pass over memory or more each."""

    def forward(self, x, residual=None):
        return self.children["relu"].forward(self.children["norm"].forward(x), residual)

    def backward(self, dy):
        dx = self.children["relu"].backward(dy)
        if isinstance(dx, tuple):
            return self.children["norm"].backward(dx[0]), dx[1]
        return self.children["norm"].backward(dx)


def take_apart(network):
    """Replace each fused layer in a network by its steps."""
    for name, child in network.children.items():
        if isinstance(child, Container):
            take_apart(child)
        elif isinstance(child, BatchNorm) and child.activation:
            child.activation = None
            network.children[name] = Steps(norm=child, relu=ReLU())


def step(trainer, rows):
    """Train on a minibatch; return how long it took."""
    x, y = (part[rows] for part in trainer.data.train)
    start = perf_counter()
    _, dlogits = softmax_cross_entropy(trainer.network.forward(x), y)
    trainer.network.backward(dlogits)
    trainer.optimizer.step()
    return perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="mnist5k")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--hidden", default="16,32")
    options = parser.parse_args()
    hidden = tuple(map(int, options.hidden.split(",")))
    config = configure({"model": "resnet", "data": options.data, "hidden": hidden})
    data = load(config.data)
    trainers = {name: Trainer(config, data) for name in ("fused", "steps")}
    take_apart(trainers["steps"].network)
    order, count = list(trainers), len(data.train[0]) // config.batch_size
    ratios = []
    with threadpool_limits(1, user_api="blas"):  # as the demo has it
        for epoch in range(1, options.epochs + 1):
            for trainer in trainers.values():
                trainer.network.train()
            seconds = {name: [] for name in trainers}
            rows = np.random.default_rng(epoch).permutation(len(data.train[0]))
            for batch in rows[: count * config.batch_size].reshape(count, -1):
                for name in order:
                    seconds[name].append(step(trainers[name], batch))
                order.reverse()
            ratios += map(truediv, seconds["steps"], seconds["fused"])
            # By the median: a minibatch that somebody else interrupted says nothing.
            times = (f"{name} {count * median(each):.2f} s" for name, each in seconds.items())
            print(f"epoch {epoch}", *times, sep="  ", flush=True)
    for name, trainer in trainers.items():
        loss, accuracy = trainer.evaluate(data.test)
        print(f"{name}: test loss {loss:.4f}, accuracy {accuracy:.4f}")
    parts = (list(trainer.network.state_dict().values()) for trainer in trainers.values())
    same = "the same" if all(map(np.array_equal, *parts)) else "other"
    about = runtime_info()
    print(
        f"both end with {same} bits; of {len(ratios)} minibatches, steps took longer on"
        f" {np.mean(np.array(ratios) > 1):.0%}, by the median {median(ratios) - 1:+.1%};"
        f" {os.cpu_count()} CPUs, {about['isa']}, {about['threads']} threads,"
        f" load {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main()
