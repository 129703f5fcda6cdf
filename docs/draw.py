"""The pictures that Sphinx needs and git does not have: `conf.py` draws them into `docs/drawn/`.

`python docs/draw.py` draws them without Sphinx.
"""

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

import fastbn
from fastbn import reference

FOLDER = Path(__file__).parent / "drawn"
STYLE = {"figure.facecolor": "white", "font.size": 10, "svg.hashsalt": "fastbn"}

# The way of x, as architecture.md tells it: room, hop, what happens there.
WAY = [
    ("layers", "call", "BatchNorm.forward takes the mode's statistics"),
    ("functional", "function", "batch_norm in Python: the arguments as they came"),
    ("checks", "checks", "what an argument must be, or an error that names it"),
    ("functional", "plan", "shape and axis become (outer, channels, inner)"),
    ("functional", "entry", "finds memory for y, fills in a Job; large calls release the GIL"),
    ("kernels", "kernel", "compute: picks the loops of the type, once"),
    ("kernels", "groups", "examples that share statistics"),
    ("kernels", "walk", "runs (NCHW) or rows (NHWC, NC)"),
    ("kernels", "tile or panel", "channels that a walk takes at a time"),
    ("kernels", "loop", "sum a run, write a segment, write a row"),
]
COLORS = {
    "layers": "#2f5f9e",
    "functional": "#2e7d5b",
    "checks": "#666666",
    "kernels": "#a85a17",
}
USES = {"entry": "uses runtime/memory", "groups": "uses runtime/pool", "walk": "uses runtime/pool"}


def way():
    """Draw the hops below each other, in the colour of their room."""
    step, width = 1.0, 10.0
    figure = Figure(figsize=(5.2, 7.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlim=(-0.1, width + 0.1), ylim=(-(len(WAY) + 0.55) * step, 1.0))
    axes.axis("off")
    arrow = {"arrowstyle": "-|>", "color": "#555555", "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}

    def place(row, text, note, color, beside):
        y = -row * step
        axes.add_patch(
            FancyBboxPatch(
                (0, y - 0.38), width, 0.68, boxstyle="round,pad=0,rounding_size=0.15",
                facecolor=color, edgecolor="none",
            )
        )  # fmt: skip
        axes.text(0.25, y + 0.1, text, color="white", weight="bold", va="center")
        axes.text(0.25, y - 0.2, note, color="white", va="center", fontsize=8.5)
        axes.text(
            width - 0.25, y + 0.1, beside, color="white", va="center", ha="right", fontsize=8.5
        )

    axes.text(width / 2, 0.72, "x", ha="center", va="center", weight="bold", fontsize=12)
    for row, (room, hop, note) in enumerate(WAY):
        place(row, hop, note, COLORS[room], USES.get(hop, ""))
        y = -row * step
        axes.annotate(
            "", (width / 2, y + 0.3), (width / 2, y + (0.62 if row else 0.58)), arrowprops=arrow
        )
    y = -len(WAY) * step
    axes.annotate("", (width / 2, y + 0.26), (width / 2, y + 0.62), arrowprops=arrow)
    axes.text(width / 2, y + 0.05, "y", ha="center", va="center", weight="bold", fontsize=12)
    for place_of, (room, color) in enumerate(COLORS.items()):
        axes.text(
            (0.5 + place_of) * width / len(COLORS),
            y - 0.42,
            f"{room}/",
            ha="center",
            color=color,
            weight="bold",
        )
    return figure


def errors():
    """Draw the error of y over the mean, for fastbn and for two ways in NumPy."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((16, 8, 32, 32))
    axis, eps = (0, 2, 3), np.float32(1e-5)

    def two_passes(x):
        return (x - x.mean(axis, keepdims=True)) / np.sqrt(x.var(axis, keepdims=True) + eps)

    def one_pass(x):
        mean = x.mean(axis, keepdims=True)
        var = np.maximum((x * x).mean(axis, keepdims=True) - mean * mean, 0)
        return (x - mean) / np.sqrt(var + eps)

    ways = {
        "NumPy, E[x²] - E[x]²": one_pass,
        "NumPy, two passes": two_passes,
        "fastbn": lambda x: fastbn.batch_norm(x)[0],
    }
    means = [0, *10.0 ** np.arange(0, 7)]
    found = {name: [] for name in ways}
    for mean in means:
        x = (mean + noise).astype(np.float32)
        exact = reference.batch_norm(x.astype(np.float64))[0]
        for name, normalise in ways.items():
            error = abs(normalise(x) - exact).max() / abs(exact).max()
            found[name].append(error / np.finfo(np.float32).eps)
    figure = Figure(figsize=(5.6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for (name, values), color in zip(found.items(), ("#b5651d", "#3d8f6e", "#2f5f9e"), strict=True):
        axes.plot(range(len(means)), values, marker="o", label=name, color=color)
    axes.axhline(2, color="gray", linestyle=":")
    axes.set(yscale="log", xlabel="mean / standard deviation", ylabel="error of y, float32 eps")
    axes.set_xticks(range(len(means)), ["0", "1", *(f"$10^{n}$" for n in range(1, 7))])
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def draw():
    """Write the pictures."""
    FOLDER.mkdir(exist_ok=True)
    with mpl.rc_context(STYLE):
        for picture in (way, errors):
            picture().savefig(FOLDER / f"{picture.__name__}.svg", metadata={"Date": None})


if __name__ == "__main__":
    draw()
