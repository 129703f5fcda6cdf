"""Train and evaluate torchvision's ResNet-18 with PyTorch's norms, ours, and ours fused.

The three take turns, minibatch by minibatch, so that noise falls on all. Run it on a quiet machine,
where torch and torchvision fit each other: `python bench/resnet18.py [--threads 1] [--size 64]`.
"""

import argparse
import copy
import os
from statistics import median
from time import perf_counter

import torch
import torchvision
from torch import nn

import fastbn.torch

FORMS = {
    "torch": lambda model: model,
    "convert": fastbn.torch.convert,
    "fuse": lambda model: fastbn.torch.convert(model, fuse=True),
}


def minibatches(count, batch, size):
    """Return images in ten classes, each of which has a pattern of its own, and noise."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(10, 3, size, size, generator=generator)
    labels = torch.randint(10, (count, batch), generator=generator)
    noise = torch.randn(count, batch, 3, size, size, generator=generator)
    return list(zip(patterns[labels] + noise, labels, strict=True))


def step(model, optimizer, x, labels):
    """Train on a minibatch; return how long it took, and the loss."""
    start = perf_counter()
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), labels)
    loss.backward()
    optimizer.step()
    return perf_counter() - start, loss.item()


@torch.no_grad()
def evaluate(model, x):
    start = perf_counter()
    model(x)
    return perf_counter() - start


def show(name, seconds):
    base = median(seconds["torch"])
    for form, each in seconds.items():
        print(f"{name} {form:8} {1e3 * median(each):7.1f} ms  {base / median(each):.2f}x")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--channels-last", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    first = torchvision.models.resnet18(num_classes=10).to(memory_format=layout)
    models = {form: change(copy.deepcopy(first)) for form, change in FORMS.items()}
    optimizers = {
        form: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        for form, model in models.items()
    }
    training = {form: [] for form in FORMS}
    evaluation = {form: [] for form in FORMS}
    losses = {form: [] for form in FORMS}
    order = list(FORMS)
    data = minibatches(options.steps, options.batch, options.size)
    for x, labels in data:
        x = x.contiguous(memory_format=layout)
        for form in order:
            seconds, loss = step(models[form], optimizers[form], x, labels)
            training[form].append(seconds)
            losses[form].append(loss)
        order.append(order.pop(0))
    for model in models.values():
        model.eval()
    for x, _ in data:
        x = x.contiguous(memory_format=layout)
        for form in order:
            evaluation[form].append(evaluate(models[form], x))
        order.append(order.pop(0))
    show("training step", training)
    show("evaluation   ", evaluation)
    apart = {
        form: max(abs(a - b) for a, b in zip(losses[form], losses["torch"], strict=True))
        for form in FORMS
    }
    curve = ", ".join(f"{loss:.4f}" for loss in losses["torch"][:: max(options.steps // 5, 1)])
    print(f"losses of torch: {curve}, ..., {losses['torch'][-1]:.4f}; the others are apart from it")
    print(", ".join(f"{form}: {apart[form]:.1e} at most" for form in FORMS if form != "torch"))
    print(
        f"torch {torch.__version__}, {options.threads} thread(s) of {os.cpu_count()} CPUs, "
        f"load {os.getloadavg()[0]:.1f}; batch {options.batch}, {options.size} x {options.size}"
    )


if __name__ == "__main__":
    main()
