"""The golden bits: hashes of what every operation gives, on inputs made of integers alone.

`python tests/golden.py` writes golden.json anew. That is done only where a change of numerics is
meant, and CHANGELOG.md says why. `test_golden.py` compares, in every kernel variant and at every
thread count. Inputs are integers times powers of two, so that no platform's libm takes part: the
hashes are those of every machine, and of every version since.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

import fastbn

try:
    from ml_dtypes import bfloat16
except ImportError:
    bfloat16 = None

FILE = Path(__file__).with_suffix(".json")

DTYPES = ["float32", "float64", "float16", "bfloat16"]
# Bits of the integers, and powers of two that they are divided by, at most. Sums of products of
# these do not fit into float64: the order of the additions shows.
BITS = {"float32": (24, 12), "float64": (46, 12), "float16": (11, 13), "bfloat16": (8, 40)}

# name: shape, axis. Each is there for a way of walking memory (see fastbn/kernels/README.md).
LAYOUTS = {
    "NCHW, runs of several blocks": ((3, 5, 70, 70), 1),
    "NCHW": ((8, 20, 28, 28), 1),
    "NCHW, blocks of several runs": ((40, 3, 20, 20), 1),
    "NCHW, short runs": ((12, 70, 7, 7), 1),
    "NCHW, one channel": ((9, 1, 11, 13), 1),
    "NCHW, tiny images": ((33, 40, 2, 2), 1),
    "NHWC": ((6, 9, 9, 24), -1),
    "NHWC, three channels": ((5, 17, 16, 3), -1),
    "NC": ((300, 70), 1),
    "NC, several blocks": ((1300, 48), 1),
    "NC, wider than a panel": ((9, 4500), 1),
    "CM": ((20, 500), 0),
    "NCHW, on several threads": ((16, 64, 28, 28), 1),
    "NC, on several threads": ((6000, 96), 1),
}
LARGE = {"NCHW, past the cache": ((32, 64, 40, 40), 1), "NHWC, past the cache": ((51200, 64), 1)}

FORMS = {
    "plain": {},
    "relu": {"activation": "relu"},
    "leaky_relu": {"activation": "leaky_relu"},
    "residual": {"residual": True},
    "residual, relu": {"residual": True, "activation": "relu"},
    "residual, leaky_relu": {"residual": True, "activation": "leaky_relu"},
}


def integers(shape, low, high, seed):
    """Return integers from low to high: counted numbers, mixed as splitmix64 does."""
    state = np.arange(1, np.prod(shape, dtype=int) + 1, dtype=np.uint64) + np.uint64(seed << 32)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
    mixed = (state >> np.uint64(16)) % np.uint64(high - low + 1)
    return low + mixed.astype(np.int64).reshape(shape)


def floats(shape, dtype, seed):
    """Return numbers of many sizes, up to 1, which dtype has exactly."""
    bits, powers = BITS[dtype]
    numbers = integers(shape, 1 - 2**bits, 2**bits - 1, seed)
    return np.ldexp(numbers.astype(np.float64), -bits - integers(shape, 0, powers, seed + 100))


def floats_around_one(shape, dtype, seed):
    """Return numbers between 1 and 1.25, whose mean is large beside their standard deviation."""
    bits = BITS[dtype][0] - 1
    return 1 + np.ldexp(integers(shape, 0, 2 ** (bits - 2), seed).astype(np.float64), -bits)


def digest(array):
    """Hash the values in their order, whatever that of memory; 64 bits are enough to tell."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def inputs(dtype, layout, make=floats):
    """Return x, gamma, beta, dy, residual and the axis of a layout."""
    shape, axis = {**LAYOUTS, **LARGE}[layout]
    wide = "float64" if dtype == "float64" else "float32"
    storage = np.dtype(bfloat16 if dtype == "bfloat16" else dtype)
    x = make(shape, dtype, 1).astype(storage)
    dy, residual = (floats(shape, dtype, seed).astype(storage) for seed in (2, 3))
    gamma, beta = (floats(shape[axis], wide, seed).astype(wide) for seed in (4, 5))
    return x, gamma, beta, dy, residual, axis


def there_and_back(forward, backward, x, dy, residual, form):
    options = {**form, "residual": residual} if "residual" in form else form
    y, cache = forward(x, **options)
    names = ("dx", "dgamma", "dbeta", "dresidual")
    results = {"y": y, "mean": cache.mean, "var": cache.var}
    return results | dict(zip(names, backward(dy, cache), strict=False))


def results_of_functions(dtype, layout):
    """Yield (name of the case, results) of every function in every form."""
    x, gamma, beta, dy, residual, axis = inputs(dtype, layout)
    channels = gamma.size

    def norm(z, **options):
        return fastbn.batch_norm(z, gamma, beta, axis=axis, **options)

    def instance(z, **options):
        return fastbn.instance_norm(z, gamma, beta, axis=axis, **options)

    back = fastbn.batch_norm_backward
    if layout in LARGE:
        for name in ("plain", "residual, relu"):
            yield name, there_and_back(norm, back, x, dy, residual, FORMS[name])
        return
    mean, var = floats(channels, "float64", 6), abs(floats(channels, "float64", 7))
    for name, form in FORMS.items():
        yield name, there_and_back(norm, back, x, dy, residual, form)
        options = {**form, "residual": residual} if "residual" in form else form
        given = fastbn.batch_norm_inference(x, mean, var, gamma, beta, axis=axis, **options)
        yield f"inference, {name}", {"y": given}
        if name in ("plain", "residual, relu") and x.ndim > 1:
            groups = {**form, "virtual_batch_size": 5}
            yield f"virtual batches, {name}", there_and_back(norm, back, x, dy, residual, groups)
            if layout not in ("NC, wider than a panel", "NC, on several threads"):
                yield (
                    f"instance norm, {name}",
                    there_and_back(instance, back, x, dy, residual, form),
                )
    shifted = inputs(dtype, layout, floats_around_one)[0]
    for name in ("plain", "leaky_relu"):
        yield (
            f"large mean, {name}",
            there_and_back(norm, back, shifted, dy, residual, FORMS[name]),
        )
    valid = integers([n for i, n in enumerate(x.shape) if i != axis % x.ndim], 0, 3, 8) > 0
    yield "mask", there_and_back(norm, back, x, dy, residual, {"mask": valid, "activation": "relu"})
    # The same values in another order of memory, and with gaps.
    for name, view in (
        ("fortran", np.asfortranarray(x)),
        ("gaps", np.repeat(x, 2, axis=-1)[..., ::2]),
        ("big endian", x if dtype == "bfloat16" else x.astype(x.dtype.newbyteorder(">"))),
    ):
        yield name, there_and_back(norm, back, view, dy, residual, {})
    yield "parts", results_of_parts(x, gamma, beta, dy, axis)


def results_of_parts(x, gamma, beta, dy, axis):
    """Return what the functions for minibatches in parts give, together."""
    along = 0 if axis else 1
    parts, dys = (np.array_split(array, 3, axis=along) for array in (x, dy))
    each = [fastbn.batch_moments(part, axis=axis) for part in parts]
    moments = fastbn.merge_moments(*each)
    results = {f"mean {i}": m.mean for i, m in enumerate(each)}
    results |= {f"var {i}": m.var for i, m in enumerate(each)}
    results |= {"mean": moments.mean, "mean_low": moments.mean_low, "var": moments.var}
    made = [fastbn.normalize(p, moments, gamma, beta, axis=axis) for p in parts]
    sums = [
        fastbn.batch_norm_backward_reduce(g, cache) for g, (_, cache) in zip(dys, made, strict=True)
    ]
    dgamma, dbeta = (sum(s[i] for s in sums) for i in (0, 1))
    for i, (g, (y, cache)) in enumerate(zip(dys, made, strict=True)):
        results[f"y {i}"] = y
        results[f"dx {i}"] = fastbn.batch_norm_backward_apply(g, cache, dgamma, dbeta)
    return results | {"dgamma": dgamma, "dbeta": dbeta}


def results_of_layers():
    """Yield (name, results) of the layers: what they keep, and evaluation."""
    x, gamma, beta, dy, residual, _ = inputs("float32", "NCHW")
    made = {
        "BatchNorm": fastbn.BatchNorm(20, momentum=0.25),
        "BatchNorm, cumulative": fastbn.BatchNorm(20, momentum=None),
        "BatchNorm, float64": fastbn.BatchNorm(20, momentum=0.5, dtype=np.float64),
        "BatchNorm, virtual batches": fastbn.BatchNorm(20, momentum=0.5, virtual_batch_size=3),
        "BatchNorm, relu": fastbn.BatchNorm(20, momentum=0.5, activation="relu"),
        "InstanceNorm": fastbn.InstanceNorm(
            20, momentum=0.5, affine=True, track_running_stats=True
        ),
    }
    for name, layer in made.items():
        layer.gamma, layer.beta = gamma, beta
        for part in np.array_split(x, 3):
            layer(part) if "virtual" in name else layer(part, residual=part)
        y = layer(x, residual=residual)
        dx, dresidual = layer.backward(dy)
        results = {"y": y, "dx": dx, "dresidual": dresidual}
        results |= {f"d{key}": value.copy() for key, value in layer.grads.items()}
        results |= {"eval": layer.eval()(x), "dx of eval": layer.backward(dy)}
        if name != "InstanceNorm":
            fastbn.update_statistics([layer], np.array_split(x, 2))
            weight, bias = layer.fold_into(floats((20, 7), "float32", 9).astype(np.float32), axis=0)
            results |= {"folded weight": weight, "folded bias": bias}
        yield name, results | layer.state_dict()


class Parameters:
    """A layer for the optimizers: parameters and gradients."""

    def __init__(self, dtype):
        self.params = {
            "W": floats((37, 11), dtype, 1).astype(dtype),
            "gamma": floats((37,), dtype, 2).astype(dtype),
        }
        self.grads = {key: np.zeros_like(value) for key, value in self.params.items()}


def results_of_optimizers(dtype):
    """Yield (name, results) of each optimizer after five steps."""
    betas = (0.5, 0.75)  # powers of these are exact, whatever computes them
    lr = {"lr": 0.0625}
    made = {
        "SGD": (fastbn.optim.SGD, {}),
        "SGD, momentum": (fastbn.optim.SGD, {"momentum": 0.75, "weight_decay": 0.125}),
        "SGD, Nesterov": (fastbn.optim.SGD, {"momentum": 0.75, "nesterov": True}),
        "RMSprop": (fastbn.optim.RMSprop, {"alpha": 0.75, "weight_decay": 0.125}),
        "RMSprop, momentum": (fastbn.optim.RMSprop, {"alpha": 0.75, "momentum": 0.5}),
        "Adam": (fastbn.optim.Adam, {"betas": betas, "weight_decay": 0.125}),
        "AdamW": (fastbn.optim.AdamW, {"betas": betas, "weight_decay": 0.125}),
    }
    for name, (optimizer, options) in made.items():
        layer = Parameters(dtype)
        opt = optimizer([layer], **lr, **options)
        if name == "SGD":
            opt.register_step_pre_hook(fastbn.optim.GradientClipping(8.0))
            opt.register_step_pre_hook(fastbn.optim.WeightDecay(0.125))
        for step in range(5):
            for grad in layer.grads.values():
                grad[...] = floats(grad.shape, dtype, step)
            opt.step()
        state = {k: v for k, v in opt.state_dict().items() if isinstance(v, np.ndarray)}
        yield name, {**layer.params, **state}


def groups():
    """Return the parts that golden.json has, each with what makes its results.

    The key is "dtype / layout", "layers", or "optimizers / dtype".
    """
    found = {
        f"{dtype} / {layout}": lambda dtype=dtype, layout=layout: results_of_functions(
            dtype, layout
        )
        for dtype in DTYPES
        for layout in LAYOUTS
        if dtype != "bfloat16" or bfloat16 is not None
    }
    found |= {
        f"float32 / {layout}": lambda layout=layout: results_of_functions("float32", layout)
        for layout in LARGE
    }
    found["layers"] = results_of_layers
    for dtype in ("float32", "float64"):
        found[f"optimizers / {dtype}"] = lambda dtype=dtype: results_of_optimizers(dtype)
    return found


def hashes(results):
    """Return {case: {result: hash}} of what one of the groups yields."""
    return {
        case: {name: digest(array) for name, array in arrays.items()} for case, arrays in results()
    }


def main():
    """Write golden.json: a line for each case."""
    lines = []
    for group, results in groups().items():
        cases = [f"  {json.dumps(c)}: {json.dumps(h)}" for c, h in hashes(results).items()]
        lines.append(f" {json.dumps(group)}: {{\n" + ",\n".join(cases) + "\n }")
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    if bfloat16 is None:
        raise SystemExit("golden.json needs ml_dtypes, for bfloat16")
    main()
