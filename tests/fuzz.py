"""A differential fuzzer: random calls, each compared with `fastbn.reference`.

    python tests/fuzz.py --seed 1 --calls 1000000

A case is a function of (seed, number) alone, so one that fails can be run again. Shapes of 1 to 5
dimensions, sizes from 0, strides of every kind, types and byte orders, axes, masks, groups, parts,
fused forms, out=, threads and kernel variants are drawn. So are wrong arguments, which must raise
and leave out= as it was. `test_fuzz.py` runs some cases with every test run.
"""

import argparse
import math
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import as_strided
from support import BFLOAT16, DTYPES, KERNELS, finfo

import fastbn
from fastbn import functional, reference
from fastbn.kernels import variants

FORMS = ["plain"] * 4 + ["mask", "groups", "instance", "inference", "parts"]
LARGE = 600_000  # values of a large case: enough for several threads
SLOPES = {None: 1.0, "relu": 0.0, "leaky_relu": 0.01}


class Case:
    """The arguments of some calls, drawn from (seed, number)."""

    def __init__(self, seed, number):
        self.rng = rng = np.random.default_rng((seed, number))
        self.calls = 0
        self.isa = str(rng.choice(list(KERNELS)))
        self.threads = int(rng.choice([1, 2, 3, 7]))
        self.dtype = DTYPES[rng.integers(len(DTYPES))] if rng.random() < 0.5 else np.dtype("f4")
        self.form = str(rng.choice(FORMS))
        self.draw_shape()
        self.channels = self.shape[self.axis]
        self.others = tuple(i for i in range(len(self.shape)) if i != self.axis % len(self.shape))
        self.per_channel = [n if i not in self.others else 1 for i, n in enumerate(self.shape)]
        self.x = self.arrange(self.draw_x())
        self.dy, self.residual = (self.arrange(self.draw_values()) for _ in range(2))
        if rng.random() < 0.7:
            self.residual = None
        self.options = {
            "gamma": self.draw_parameter(),
            "beta": self.draw_parameter(),
            "axis": self.axis,
            # With eps = 0 what the reference makes of the rounding of a constant would count.
            "eps": float(rng.choice([1e-5, 1e-5, 1e-3, 0.5, 0 if self.form == "plain" else 1e-5])),
            "activation": [None, None, "relu", "leaky_relu"][rng.integers(4)],
        }

    def __str__(self):
        options = {name: value for name, value in self.options.items() if np.ndim(value) == 0}
        arrays = [
            f"{name}: {a.dtype.str} {a.shape} strides {a.strides}"
            for name in ("x", "dy", "residual")
            if (a := getattr(self, name)) is not None
        ]
        return f"{self.form}, {self.isa}, {self.threads} threads, {options}, {', '.join(arrays)}"

    # ------------------------------------------------------------------------------- what is drawn

    def draw_shape(self):
        rng = self.rng
        ndim, most, kind = int(rng.integers(1, 6)), int(rng.choice([3, 8, 40])), rng.random()
        shape = [int(n) for n in rng.integers(1, most, ndim)]
        for below, least, end in ((0.03, 0, 1), (0.06, 1000, 6000), (0.065, 50_000, 300_000)):
            if kind < below:
                shape[rng.integers(ndim)] = int(rng.integers(least, end))
                break
        while math.prod(shape) > (LARGE if 0.06 <= kind < 0.065 else 10_000):
            shape[int(rng.integers(ndim))] //= 2
        self.shape, self.axis = tuple(shape), int(rng.integers(-ndim, ndim))

    def draw_values(self, std=1.0, mean=0.0):
        """Return values; in one of eight arrays they overlap, or are few."""
        rng, shape, kind = self.rng, self.shape, self.rng.random()
        if kind < 0.04:  # strides of zero
            held = [n if rng.random() < 0.5 else min(n, 1) for n in shape]
            held[self.axis] = shape[self.axis]
            values = (mean + std * rng.standard_normal(held)).astype(self.dtype)
            return np.broadcast_to(values, shape)
        if kind < 0.08 and math.prod(shape):  # windows
            steps = [int(n) for n in rng.integers(1, 4, len(shape))]
            size = 1 + sum((n - 1) * step for n, step in zip(shape, steps, strict=True))
            values = (np.max(mean) + std * rng.standard_normal(size)).astype(self.dtype)
            return as_strided(values, shape, [step * self.dtype.itemsize for step in steps])
        if kind < 0.12:
            return rng.integers(-1, 2, shape).astype(self.dtype)
        return (mean + std * rng.standard_normal(shape)).astype(self.dtype)

    def draw_x(self):
        rng, size = self.rng, self.dtype.itemsize
        means = [0, 0, 1, 30] if size == 2 else [0, 0, 1, 100, 1e4, -1e6]
        std = rng.choice([1, 1, 1e-3, 50] if size == 2 else [1, 1, 1e-3, 1e8, 1e-20])
        x = self.draw_values(std, rng.choice(means, self.per_channel))
        if self.dtype == np.float64 and rng.random() < 0.1:
            return x.astype(np.int64)  # which the functions take as float64
        if rng.random() < 0.04 and x.size:
            x = x.copy()
            for _ in range(2):
                x[tuple(rng.integers(x.shape))] = rng.choice([np.nan, np.inf, -np.inf])
        return x

    def arrange(self, values):
        """Return the same values in another arrangement of memory."""
        rng, kind = self.rng, self.rng.integers(12)
        if kind == 0:
            return np.asfortranarray(values)
        if kind == 1:
            order = rng.permutation(values.ndim)
            return values.transpose(order).copy().transpose(np.argsort(order))
        if kind == 2:  # gaps, forwards and backwards
            steps = [int(n) for n in rng.choice([1, 2, -1, -2], values.ndim)]
            sizes = [n * abs(step) for n, step in zip(values.shape, steps, strict=True)]
            view = np.zeros(sizes, values.dtype)[tuple(slice(None, None, s) for s in steps)]
            view[...] = values
            return view
        if kind == 3 and values.dtype != BFLOAT16:
            return values.astype(values.dtype.newbyteorder())
        if kind == 4:  # at an odd address
            view = np.ndarray(values.shape, values.dtype, np.empty(values.nbytes + 1, np.uint8), 1)
            view[...] = values
            return view
        if kind == 5:  # inside of a larger array
            pads = [tuple(int(n) for n in pair) for pair in rng.integers(0, 3, (values.ndim, 2))]
            at = (slice(a, a + n) for (a, _), n in zip(pads, values.shape, strict=True))
            return np.pad(values, pads)[tuple(at)]
        return values

    def draw_parameter(self):
        rng, size, kind = self.rng, self.channels, self.rng.integers(12)
        values = rng.standard_normal(size) * rng.choice([1, 1, 30, 1e-4])
        values[rng.random(size) < 0.05] = 0
        if kind < 3:
            return None
        if kind == 3:
            return values.tolist()
        if kind == 4:
            return values.reshape(size, 1, 1)
        if kind == 5:
            return np.repeat(values.astype(np.float32), 2)[::2]
        if kind == 6:
            return values.astype(np.float16)
        return values.astype(np.float32 if self.dtype.itemsize < 8 else np.float64)

    def draw_moments(self):
        values = np.where(np.isfinite(self.x.astype(float)), self.x.astype(float), 0)
        first = values.min(self.others, initial=np.inf)
        mean = np.where(np.isfinite(first), first, 0) + self.rng.standard_normal(self.channels)
        var = self.rng.standard_normal(self.channels) ** 2
        return reference.Moments(mean, var * self.rng.choice([1, 1, 100, 1e-3]), 1)

    def draw_out(self, name):
        """Return where the result may go: nowhere, elsewhere, into what is read, or across it."""
        like, kind = getattr(self, name), self.rng.integers(8)
        if like.dtype.kind == "i" or kind > 2:
            return None
        native = like.dtype.newbyteorder("=")
        if kind == 0:
            return self.arrange(np.zeros(like.shape, native))
        if kind == 1 and like.dtype == native and may_be_written(like):
            return like
        shift = int(self.rng.integers(1, like.size + 2))
        memory = np.zeros(like.size + shift, native)
        source, out = (memory[i : i + like.size].reshape(like.shape) for i in (shift, 0))
        source[...] = like
        setattr(self, name, source)
        return out

    # ------------------------------------------------------------------------------- what is called

    def run(self):
        """Make the calls and compare; raise AssertionError, or what should not have been raised."""
        functional.use_kernels(KERNELS[self.isa])
        fastbn.set_num_threads(self.threads)
        with np.errstate(all="ignore"):
            if self.rng.random() < 0.04:
                self.run_wrong()
            elif self.form == "parts":
                self.run_parts()
            elif self.form == "inference":
                self.run_inference()
            else:
                self.run_whole()

    def run_whole(self):
        """Normalise by the minibatch's own statistics, and go back."""
        rng, batch = self.rng, len(self.shape) - 1 if 0 not in self.others else 0
        groups, forward = {}, fastbn.batch_norm
        if self.form == "mask":
            groups = {"mask": rng.random([self.shape[i] for i in self.others]) < 0.7}
        if self.form in ("groups", "instance") or (self.form == "mask" and rng.random() < 0.3):
            size = int(rng.integers(1, self.shape[batch] + 3))
            groups |= {"virtual_batch_size": size} if self.others else {}
        if self.form == "instance" and self.others:
            forward, groups = fastbn.instance_norm, {"virtual_batch_size": 1}
        own = groups if forward is fastbn.batch_norm else {}
        out = self.draw_out("x")
        arguments = {**self.options, **own, "residual": self.residual, "out": out}
        self.calls += 1
        if not np.any(groups.get("mask", np.ones([self.shape[i] for i in self.others]))):
            self.refused(forward, arguments)
            return
        if not self.channels:  # too empty for the reference
            with suppress(ValueError):
                fastbn.batch_norm_backward(self.dy, forward(self.x, **arguments)[1])
            return
        exact = Exact(self, **groups)
        y, cache = forward(self.x, **arguments)
        exact.compare_y(y, out)
        if "virtual_batch_size" not in groups:
            exact.compare_moments(cache.mean, cache.var)
        self.calls += 1
        exact.go_back(y, self.dy)
        overwritten = out is not None and np.may_share_memory(out, self.x)
        out = self.draw_out("dy")
        try:
            results = fastbn.batch_norm_backward(self.dy, cache, out=out)
        except ValueError:
            if not overwritten:
                raise
        else:
            exact.compare_gradients(*results, out=out)

    def run_inference(self):
        """Normalise by given statistics, and go back as through constants."""
        moments, out = self.draw_moments(), self.draw_out("x")
        exact = Exact(self, moments=moments)
        given = {**self.options, "residual": self.residual}
        self.calls += 3
        y, cache = functional.inference_with_cache(self.x, *moments[:2], **given)
        exact.compare_y(y)
        exact.go_back(y, self.dy)
        exact.compare_gradients(*fastbn.batch_norm_backward(self.dy, cache))
        y = fastbn.batch_norm_inference(self.x, *moments[:2], **given, out=out)
        exact.compare_y(y, out)

    def run_parts(self):
        """Normalise in pieces by the statistics of all of them, and go back."""
        if not self.others or not math.prod(self.shape):
            return
        along = int(self.rng.choice(self.others))
        cuts = sorted(self.rng.integers(0, self.shape[along] + 1, self.rng.integers(4)).tolist())
        split = lambda a: np.split(a, cuts, axis=along)  # noqa: E731
        xs, dys = split(self.x), split(self.dy)
        residuals = [None] * len(xs) if self.residual is None else split(self.residual)
        exact = Exact(self)
        moments = fastbn.merge_moments(*(fastbn.batch_moments(x, axis=self.axis) for x in xs))
        exact.compare_moments(moments.mean, moments.var)
        forward = [
            fastbn.normalize(x, moments, **self.options, residual=residual)
            for x, residual in zip(xs, residuals, strict=True)
        ]
        ys, caches = zip(*forward, strict=True)
        exact.compare_y(y := np.concatenate(ys, axis=along))
        exact.go_back(y, self.dy)
        pairs = list(zip(dys, caches, strict=True))
        sums = sum(np.stack(fastbn.batch_norm_backward_reduce(*pair)) for pair in pairs)
        back = [fastbn.batch_norm_backward_apply(*pair, *sums) for pair in pairs]
        back = back if self.residual is not None else [(dx,) for dx in back]
        dx, *dresidual = (np.concatenate(each, axis=along) for each in zip(*back, strict=True))
        exact.compare_gradients(dx, *sums, *dresidual)
        self.calls += 4 * len(xs) + 1

    def run_wrong(self):
        """Give one wrong argument."""
        self.calls += 1
        n, native = self.channels, self.x.dtype.newbyteorder("=")
        closed = np.zeros(self.shape, native)
        closed.flags.writeable = False
        name, value = wrong = [
            ("gamma", np.ones(n + 1)),
            ("beta", np.ones(n, complex)),
            ("axis", len(self.shape)),
            ("axis", 0.5),
            ("eps", -1e-5),
            ("eps", float("nan")),
            ("activation", "gelu"),
            ("residual", np.zeros((*self.shape, 1), native)),
            ("residual", np.zeros(self.shape, np.complex64)),
            ("mask", np.ones((*self.shape, 2), bool)),
            ("mask", np.ones([self.shape[i] for i in self.others])),
            ("virtual_batch_size", 0),
            ("virtual_batch_size", 1.5),
            ("out", closed),
            ("out", np.zeros((*self.shape, 1), native)),
            ("out", self.shape),
        ][self.rng.integers(16)]
        out = np.zeros(self.shape, np.float64 if self.x.dtype.kind == "i" else native)
        given = {**self.options, "residual": self.residual, "out": out, name: value}
        self.refused(fastbn.batch_norm, given, f": {wrong}")

    def refused(self, function, given, why=""):
        """Expect an error, and out as it was."""
        out = given["out"]
        before = np.array(out)
        try:
            function(self.x, **given)
        except (TypeError, ValueError):
            if not np.array_equal(out, before):
                raise AssertionError("out has changed") from None
        else:
            raise AssertionError(f"{function.__name__}: expected an error, got none{why}")


class Exact:
    """What the reference gives for a case, in float64, and how far a result may be from it.

    The reference gets x less some value of each channel, by which no result but the mean changes:
    so its own float64 rounds little.
    """

    def __init__(self, case, moments=None, **groups):
        self.case, self.moments = case, moments
        options = dict(case.options)
        self.slope = SLOPES[options.pop("activation")]
        for name in ("gamma", "beta"):
            if options[name] is not None:
                options[name] = np.asarray(options[name], np.float64)
        self.x = case.x.astype(np.float64)
        residual = case.residual
        options["residual"] = addend = None if residual is None else residual.astype(np.float64)
        if moments is None:
            counts = np.isfinite(self.x)
            if "mask" in groups:
                counts &= np.expand_dims(groups["mask"], case.axis)
            pivot = np.where(counts, self.x, -np.inf).max(case.others, keepdims=True)
            self.pivot = np.where(np.isfinite(pivot), pivot, 0)
            a, self.cache = reference.batch_norm(self.x - self.pivot, **options, **groups)
        else:
            a, self.cache = reference.normalize(self.x, moments, **options)
        caches, along = getattr(self.cache, "caches", [self.cache]), getattr(self.cache, "batch", 0)
        self.z_hat = np.concatenate([each.z_hat for each in caches], axis=along)
        shapes = [np.broadcast_to(each.rstd, each.x.shape) for each in caches]
        self.rstd = np.concatenate(shapes, axis=along)
        self.valid = np.concatenate([each.valid for each in caches], axis=along)
        self.gamma, self.beta = (
            default if options[name] is None else options[name].reshape(case.per_channel)
            for name, default in (("gamma", 1.0), ("beta", 0.0))
        )
        terms = np.abs(self.gamma * self.z_hat) + np.abs(self.beta)
        self.scale = self.largest(terms + (0 if addend is None else np.abs(addend)))
        self.a, self.y = a, np.where(a <= 0, a * self.slope if self.slope else 0, a)
        if not self.valid.all():
            self.y = np.where(self.valid, self.y, 0)

    def largest(self, terms):
        """Return the largest finite term of each channel."""
        finite = np.where(np.isfinite(terms), terms, 0)
        return finite.max(self.case.others, keepdims=True, initial=0)

    def compare_y(self, y, out=None):
        if out is not None and y is not out:
            raise AssertionError("y: expected out")
        dtype = np.dtype(float) if self.case.x.dtype.kind == "i" else self.case.x.dtype
        if out is None and y.dtype != dtype.newbyteorder("="):
            raise AssertionError(f"y: expected {dtype}, got {y.dtype}")
        self.compare("y", y, self.y, self.scale)

    def compare_moments(self, mean, var):
        exact, eps = self.cache, 2.0**-52
        size = self.largest(np.abs(self.x)).ravel()
        spread = self.largest(np.abs(self.x - self.pivot)).ravel()
        for name, actual, wanted, allowed in (
            ("mean", mean, exact.mean + self.pivot.ravel(), eps * (4 * size + 64 * spread)),
            ("var", var, exact.var, 64 * eps * spread**2),
        ):
            # A NaN or an infinity in x: that one of the two is not finite, is all that is said.
            good = np.isfinite(exact.var) & np.isfinite(exact.mean)
            if (np.isfinite(mean) & np.isfinite(var) & ~good).any():
                raise AssertionError("moments: finite beside a NaN")
            if (np.abs(actual - wanted) > allowed)[good].any():
                raise AssertionError(f"{name}: off by {np.abs(actual - wanted)}, allowed {allowed}")

    def go_back(self, y, dy):
        """Compute the gradients; where a is 0 but for rounding, y tells which side it was on."""
        computed = np.dtype("f8" if y.dtype.itemsize == 8 else "f4")
        doubt = np.abs(self.a) <= self.allowed(computed, self.a, self.scale)
        y = np.asarray(y, np.float64)
        positive = np.where(doubt, y > 0, ~(self.a <= 0))
        dy = np.where(self.valid, dy.astype(np.float64), 0)
        da = np.where(positive, dy, dy * self.slope if self.slope else 0)
        if self.moments is None:
            dx, dgamma, dbeta, *dresidual = reference.batch_norm_backward(da, self.cache)
        else:
            dgamma, dbeta = reference.batch_norm_backward_reduce(da, self.cache)
            dx = self.gamma * self.rstd * da
            dresidual = [] if self.case.residual is None else [da]
        # Where sums cancel, the errors are those of their terms.
        products, share = da * self.z_hat, 1.0 if self.case.dtype.itemsize == 8 else 1e-3
        z_hat = np.where(np.isfinite(self.z_hat), np.abs(self.z_hat), 0)
        terms = np.abs(da) + self.largest(np.abs(da)) + z_hat * self.largest(np.abs(products))
        dgamma, dbeta = dgamma.ravel(), dbeta.ravel()
        sums = [np.abs(products) + share * np.abs(da), np.abs(da)]
        sums = [share * each.sum(self.case.others) for each in sums]
        self.gradients = [
            ("dx", dx, self.largest(np.abs(self.gamma * self.rstd) * terms)),
            ("dgamma", dgamma, np.abs(dgamma) + sums[0]),
            ("dbeta", dbeta, np.abs(dbeta) + sums[1]),
            *(("dresidual", each, np.abs(each)) for each in dresidual),
        ]

    def compare_gradients(self, *actual, out=None):
        if out is not None and actual[0] is not out:
            raise AssertionError("dx: expected out")
        for each, (name, exact, scale) in zip(actual, self.gradients, strict=True):
            self.compare(name, each.reshape(exact.shape), exact, scale)

    def allowed(self, dtype, exact, scale):
        """Return the largest error: 2 eps of the scale, and the rounding to a type of 16 bits."""
        wide = dtype.itemsize == 8 and self.case.dtype.itemsize == 8
        limits = finfo(dtype)
        tiny = np.float64(limits.smallest_subnormal if wide else np.finfo("f4").smallest_subnormal)
        error = np.nan_to_num((64 * 2.0**-52 if wide else 2 * 2.0**-23) * scale, posinf=0) + tiny
        if limits.bits == 16:
            _, exponent = np.frexp(np.where(np.isfinite(exact), exact, 0))
            error = error + np.ldexp(float(limits.eps), np.maximum(exponent, limits.minexp + 1) - 2)
        return error

    def compare(self, name, actual, exact, scale):
        allowed = np.broadcast_to(self.allowed(actual.dtype, exact, scale), actual.shape)
        most, actual = float(finfo(actual.dtype).max), actual.astype(np.float64)
        near = np.abs(actual - exact) <= allowed
        near |= (actual == exact) | (np.isnan(actual) & np.isnan(exact))
        if name in ("dgamma", "dbeta"):  # which of the two, the order of additions decides
            near |= ~np.isfinite(actual) & ~np.isfinite(exact)
        near |= np.isinf(actual) & (np.abs(exact) + allowed >= most) & (actual * exact > 0)
        if not near.all():
            at = tuple(int(i[0]) for i in np.nonzero(~near))
            raise AssertionError(
                f"{name}{list(at)}: expected {exact[at]!r} within {allowed[at]:.3g}, "
                f"got {actual[at]!r}; {int((~near).sum())} of {near.size} differ"
            )


def may_be_written(array):
    """Whether no two elements are the same memory."""
    strides = sorted((abs(s), n) for s, n in zip(array.strides, array.shape, strict=True) if n > 1)
    end = array.itemsize
    for stride, n in strides:
        if stride < end:
            return False
        end = stride * (n - 1) + end
    return array.flags.writeable


def fuzz(seed, first, calls, every=0):
    """Run cases from a number on until so many calls are made.

    Return what failed, the number of cases and of calls; print now and then how far it is.
    """
    number, made, failed = first, 0, []
    before, start = fastbn.get_num_threads(), time.monotonic()
    try:
        while made < calls:
            case = Case(seed, number)
            try:
                case.run()
            except Exception as error:
                failed.append(f"case {seed}, {number}: {type(error).__name__}: {error} ({case})")
            made += max(case.calls, 1)
            number += 1
            if every and number % every == 0:
                seconds, pages = time.monotonic() - start, Path("/proc/self/statm")
                memory = int(pages.read_bytes().split()[1]) >> 8 if pages.exists() else "?"
                print(f"case {number}: {made} calls, {seconds:.0f} s, {memory} MiB", flush=True)
    finally:
        functional.use_kernels(variants.kernels)
        fastbn.set_num_threads(before)
    return failed, number - first, made


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--calls", type=int, default=10_000)
    options = parser.parse_args()
    failed, cases, made = fuzz(options.seed, options.first, options.calls, every=10_000)
    print(*failed, sep="\n")
    print(f"seed {options.seed}: {cases} cases, {made} calls, {len(failed)} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
