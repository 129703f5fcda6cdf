"""Who takes part in `fastbn bench`: fastbn, the other libraries, and the speed of memory.

A contender is made for a `Case` and its arrays. Its methods are named after the operations. They
return the ways it has of doing that, as {name: callable}; the fastest of them counts. A result is
written into the array `out` where the library can do that.
"""

# ruff: noqa: D102 - what the operations do is said once, here

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, cached_property, partial
from importlib import metadata
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np

import fastbn
from fastbn.cli.cases import AXIS, CORES, EPS, FUSED, PLAIN, Array, Arrays, Case

Ways = dict[str, Callable[[], Any]]


class Contender:
    """One library on one case."""

    distributions: ClassVar[tuple[str, ...]]  # one of them has it
    operations: ClassVar[tuple[str, ...]] = PLAIN
    dtypes: ClassVar[tuple[str, ...]] = ("float32",)
    layouts: ClassVar[tuple[str, ...]] = tuple(AXIS)
    # If False, it uses as many threads as the process has CPUs.
    sets_threads: ClassVar[bool] = True

    def __init__(self, case: Case, arrays: Arrays) -> None:
        self.case, self.arrays = case, arrays
        self.prepare()

    def prepare(self) -> None:
        """Set the number of threads; convert the arrays."""

    def ways(self) -> Ways:
        """Return the ways it has of doing the case's operation."""
        ways: Ways = getattr(self, self.case.operation)()
        return ways

    def array(self, result: Any) -> Array | None:
        """Return y or dx, in the shape of x, from the result of a way."""
        y: Array = result[0] if isinstance(result, tuple) else result
        return y

    @classmethod
    def enters(cls, case: Case) -> bool:
        """Tell whether it can do this."""
        return (
            case.operation in cls.operations
            and case.dtype in cls.dtypes
            and case.layout in cls.layouts
            and (cls.sets_threads or case.threads == CORES)
        )

    @classmethod
    def version(cls) -> str | None:
        """Return what version is installed, if any."""
        for name in cls.distributions:
            try:
                return metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
        return None


class Ceiling(Contender):
    """Copying x, or adding dy to it: no batch norm can move fewer bytes."""

    dtypes = ("float32", "float64", "float16", "bfloat16")
    operations = (*PLAIN, "layer", *FUSED[:3])  # the last one moves as much as nothing of NumPy

    def forward(self) -> Ways:
        return self._move(np.copyto, self.arrays.x)

    inference = layer = forward_relu = forward

    def backward(self) -> Ways:
        return self._move(_add, self.arrays.x, self.arrays.dy)

    backward_relu = forward_add_relu = backward

    def _move(self, move: Callable[..., None], *inputs: Array) -> Ways:
        arrays = (self.arrays.out, *inputs)
        if self.arrays.x.itemsize == 2:  # NumPy adds these value by value; bytes are bytes
            arrays = tuple(a.view(np.float32) for a in arrays)
        ways: Ways = {"one thread": partial(move, *arrays)}
        if self.case.threads > 1:  # which loses where the arrays are small
            threads = self.case.threads
            parts = [np.array_split(a.reshape(-1), threads) for a in arrays]
            ways["split"] = partial(_split, move, list(zip(*parts, strict=True)))
        return ways

    def array(self, result: Any) -> None:
        """Nothing is to be checked."""


def _add(out: Array, x: Array, dy: Array) -> None:
    np.add(x, dy, out=out)


def _split(move: Callable[..., None], parts: list[tuple[Array, ...]]) -> None:
    mine, *others = parts
    pool = _pool(len(others))
    futures: list[Future[None]] = [pool.submit(move, *part) for part in others]
    move(*mine)
    for future in futures:
        future.result()


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers)


class Fastbn(Contender):
    """What is measured."""

    dtypes = ("float32", "float64", "float16", "bfloat16")
    operations = (*PLAIN, "layer", *FUSED)

    def prepare(self) -> None:
        fastbn.set_num_threads(self.case.threads)

    def forward(self, **fused: Any) -> Ways:
        a = self.arrays
        options = {"axis": a.axis, "eps": EPS, "out": a.out, **fused}
        return {"": partial(fastbn.batch_norm, a.x, a.gamma, a.beta, **options)}

    def backward(self, **fused: Any) -> Ways:
        _, saved = self.forward(**fused)[""]()
        return {"": partial(fastbn.batch_norm_backward, self.arrays.dy, saved, out=self.arrays.out)}

    def inference(self) -> Ways:
        a = self.arrays
        function = partial(fastbn.batch_norm_inference, a.x, a.mean, a.var, a.gamma, a.beta)
        return {"": partial(function, axis=a.axis, eps=EPS, out=a.out)}

    def layer(self) -> Ways:
        return {"": partial(fastbn.BatchNorm(len(self.arrays.gamma), eps=EPS), self.arrays.x)}

    def forward_relu(self) -> Ways:
        return self.forward(activation="relu")

    def backward_relu(self) -> Ways:
        return self.backward(activation="relu")

    def forward_add_relu(self) -> Ways:
        return self.forward(activation="relu", residual=self.arrays.residual)

    def backward_add_relu(self) -> Ways:
        return self.backward(activation="relu", residual=self.arrays.residual)


class Numpy(Contender):
    """Batch norm as one writes it in NumPy, which has one thread whatever it is given."""

    distributions = ("numpy",)

    def prepare(self) -> None:
        a = self.arrays
        self.others = tuple(i for i in range(a.x.ndim) if i != a.axis % a.x.ndim)
        self.wide = [np.expand_dims(p, self.others) for p in a.parameters]

    def forward(self) -> Ways:
        return {"": self._forward}

    def _forward(self) -> tuple[Array, Array, Array]:
        x, (gamma, beta, *_) = self.arrays.x, self.wide
        mean = x.mean(self.others, keepdims=True)
        rstd = 1 / np.sqrt(x.var(self.others, keepdims=True) + np.float32(EPS))
        z_hat = (x - mean) * rstd
        return np.add(gamma * z_hat, beta, out=self.arrays.out), z_hat, gamma * rstd

    def backward(self) -> Ways:
        _, z_hat, scale = self._forward()
        return {"": partial(self._backward, self.arrays.dy, z_hat, scale)}

    def _backward(self, dy: Array, z_hat: Array, scale: Array) -> tuple[Array, Array, Array]:
        count = np.float32(dy.size // scale.size)
        dbeta = dy.sum(self.others, keepdims=True)
        dgamma = (dy * z_hat).sum(self.others, keepdims=True)
        dx = dy - dbeta / count - z_hat * (dgamma / count)
        return np.multiply(scale, dx, out=self.arrays.out), dgamma, dbeta

    def inference(self) -> Ways:
        return {"": self._inference}

    def _inference(self) -> Array:
        gamma, beta, mean, var = self.wide
        scale = gamma / np.sqrt(var + np.float32(EPS))
        return np.add(self.arrays.x * scale, beta - mean * scale, out=self.arrays.out)


class Torch(Contender):
    """Its native operators; what is fused elsewhere takes several of them."""

    distributions = ("torch",)
    operations = (*PLAIN, "layer", *FUSED)

    def prepare(self) -> None:
        self.torch = torch = importlib.import_module("torch")
        self.aten = torch.ops.aten
        torch.set_num_threads(self.case.threads)
        a = self.arrays
        self.x, self.dy, self.residual, self.out = map(self._tensor, (a.x, a.dy, a.residual, a.out))
        self.gamma, self.beta, self.mean, self.var = map(torch.from_numpy, a.parameters)
        self.training = (self.x, self.gamma, self.beta, None, None, True, 0.1, EPS)

    def _tensor(self, array: Array) -> Any:
        """Share the memory: channels-last tensors are NHWC arrays seen as NCHW."""
        tensor = self.torch.from_numpy(array)
        if self.case.layout == "NHWC":
            return tensor.permute(0, 3, 1, 2)
        return tensor[None] if self.arrays.axis == 0 else tensor

    def array(self, result: Any) -> Array:
        y = result[0]
        if self.case.layout == "NHWC":
            y = y.permute(0, 2, 3, 1)
        array: Array = (y[0] if self.arrays.axis == 0 else y).numpy()
        return array

    def forward(self) -> Ways:
        return {
            "native_batch_norm.out": partial(
                self.torch.native_batch_norm, *self.training, out=self._outputs()
            )
        }

    def _outputs(self) -> tuple[Any, Any, Any]:
        return self.out, self.torch.empty_like(self.mean), self.torch.empty_like(self.mean)

    def inference(self) -> Ways:
        arguments = (self.x, self.gamma, self.beta, self.mean, self.var, False, 0.1, EPS)
        outputs = (self.out, self.torch.empty(0), self.torch.empty(0))
        operator = self.torch.native_batch_norm
        return {"native_batch_norm.out": partial(operator, *arguments, out=outputs)}

    def backward(self) -> Ways:
        _, mean, rstd = self.torch.native_batch_norm(*self.training)
        fixed = (self.dy, self.x, self.gamma, None, None, mean, rstd, True, EPS, [True] * 3)
        # With out= it computes a fresh dx, too, and copies it.
        operator = self.aten.native_batch_norm_backward
        return {"native_batch_norm_backward": partial(operator, *fixed)}

    def layer(self) -> Ways:
        layer = self.torch.nn.BatchNorm1d(len(self.gamma), eps=EPS)

        def call() -> Any:
            with self.torch.no_grad():
                return (layer(self.x),)

        return {"BatchNorm1d": call}

    def forward_relu(self) -> Ways:
        return self._steps(None)

    def forward_add_relu(self) -> Ways:
        return self._steps(self.residual)

    def _steps(self, residual: Any) -> Ways:
        """One step after the other, each in place."""
        torch, outputs = self.torch, self._outputs()

        def steps() -> Any:
            y, mean, rstd = torch.native_batch_norm(*self.training, out=outputs)
            return torch.relu_(y if residual is None else y.add_(residual)), mean, rstd

        return {"steps": steps}

    def backward_relu(self) -> Ways:
        return self._steps_back(None)

    def backward_add_relu(self) -> Ways:
        return self._steps_back(self.residual)

    def _steps_back(self, residual: Any) -> Ways:
        """Through ReLU, whose gradient is that of the residual too, and then batch norm."""
        y, mean, rstd = self._steps(residual)["steps"]()
        fixed = (self.x, self.gamma, None, None, mean, rstd, True, EPS, [True] * 3)

        def steps() -> Any:
            g = self.aten.threshold_backward(self.dy, y, 0)
            return (*self.aten.native_batch_norm_backward(g, *fixed), g)

        return {"steps": steps}


class Jax(Contender):
    """Plain formulas under jit, which fuses them; it returns fresh arrays only."""

    distributions = ("jax",)
    sets_threads = False

    def prepare(self) -> None:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        self.jax = _imported("jax")
        self.jnp, a = self.jax.numpy, self.arrays
        self.others = tuple(i for i in range(a.x.ndim) if i != a.axis % a.x.ndim)
        self.x, self.dy = map(self.jnp.asarray, (a.x, a.dy))
        self.wide = [self.jnp.expand_dims(p, self.others) for p in a.parameters]

    def array(self, result: Any) -> Array:
        return np.asarray(result[0])

    def _way(self, function: Callable[..., Any], *arrays: Any) -> Ways:
        compiled = self.jax.jit(function)
        return {"jit": lambda: self.jax.block_until_ready(compiled(*arrays))}

    def forward(self) -> Ways:
        return self._way(self._forward, self.x, *self.wide[:2])

    def _forward(self, x: Any, gamma: Any, beta: Any) -> Any:
        mean, var = (f(self.others, keepdims=True) for f in (x.mean, x.var))
        rstd = self.jax.lax.rsqrt(var + EPS)
        return gamma * ((x - mean) * rstd) + beta, mean, rstd

    def backward(self) -> Ways:
        _, mean, rstd = self.forward()["jit"]()
        return self._way(self._backward, self.dy, self.x, self.wide[0], mean, rstd)

    def _backward(self, dy: Any, x: Any, gamma: Any, mean: Any, rstd: Any) -> Any:
        z_hat, count = (x - mean) * rstd, x.size // rstd.size
        dbeta, dgamma = (each.sum(self.others, keepdims=True) for each in (dy, dy * z_hat))
        return gamma * rstd * (dy - dbeta / count - z_hat * (dgamma / count)), dgamma, dbeta

    def inference(self) -> Ways:
        return self._way(self._inference, self.x, *self.wide)

    def _inference(self, x: Any, gamma: Any, beta: Any, mean: Any, var: Any) -> Any:
        return (gamma * ((x - mean) * self.jax.lax.rsqrt(var + EPS)) + beta,)


class TensorFlow(Contender):
    """Its fused operations; they want four axes, and return fresh arrays only."""

    distributions = ("tensorflow", "tensorflow-cpu")
    sets_threads = False

    def prepare(self) -> None:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        self.tf = tf = _imported("tensorflow")
        a, shape, layout = self.arrays, self.case.shape, self.case.layout
        if layout == "NC":
            shape, layout = (shape[0], 1, 1, shape[1]), "NHWC"
        elif layout == "CM":
            shape, layout = (1, shape[0], 1, shape[1]), "NCHW"
        self.options = {"epsilon": EPS, "data_format": layout}
        self.x, self.dy = (tf.constant(each.reshape(shape)) for each in (a.x, a.dy))
        self.gamma, self.beta, self.mean, self.var = map(tf.constant, a.parameters)

    def array(self, result: Any) -> Array:
        return np.asarray(result[0]).reshape(self.case.shape)

    def forward(self) -> Ways:
        unknown = self.tf.zeros(0)
        return self._normalize(True, unknown, unknown)

    def inference(self) -> Ways:
        return self._normalize(False, self.mean, self.var)

    def _normalize(self, training: bool, mean: Any, variance: Any) -> Ways:
        arguments = {"x": self.x, "scale": self.gamma, "offset": self.beta, **self.options}
        operation = partial(self.tf.raw_ops.FusedBatchNormV3, **arguments)
        return {"fused": partial(operation, mean=mean, variance=variance, is_training=training)}

    def backward(self) -> Ways:
        saved = self.forward()["fused"]()
        spaces = {f"reserve_space_{i}": getattr(saved, f"reserve_space_{i}") for i in (1, 2, 3)}
        arguments = {"y_backprop": self.dy, "x": self.x, "scale": self.gamma, **self.options}
        operation = partial(self.tf.raw_ops.FusedBatchNormGradV3, **arguments)
        return {"fused": partial(operation, **spaces, is_training=True)}


class OnnxRuntime(Contender):
    """Channels first is all it takes: NHWC goes in as rows of channels."""

    distributions = ("onnxruntime",)
    operations = ("inference",)

    @classmethod
    def version(cls) -> str | None:
        return super().version() if find_spec("onnx") else None  # which writes the model

    @cached_property
    def x(self) -> Array:
        x, axis = self.arrays.x, self.arrays.axis
        return x.reshape(-1, x.shape[-1]) if axis == -1 else x[None] if axis == 0 else x

    def prepare(self) -> None:
        runtime, onnx = map(importlib.import_module, ("onnxruntime", "onnx"))
        helper, numbers = onnx.helper, onnx.TensorProto.FLOAT
        names = ["scale", "B", "input_mean", "input_var"]
        graph = helper.make_graph(
            [helper.make_node("BatchNormalization", ["x", *names], ["y"], epsilon=EPS)],
            "batch_norm",
            [helper.make_tensor_value_info("x", numbers, self.x.shape)],
            [helper.make_tensor_value_info("y", numbers, self.x.shape)],
            list(map(onnx.numpy_helper.from_array, self.arrays.parameters, names)),
        )
        opset = [helper.make_opsetid("", 15)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=8)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = self.case.threads
        self.session = runtime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def inference(self) -> Ways:
        out, binding = self.arrays.out, self.session.io_binding()
        binding.bind_cpu_input("x", self.x)
        binding.bind_output("y", "cpu", 0, np.float32, self.x.shape, out.ctypes.data)
        return {"run_with_iobinding": partial(self._run, binding, out)}

    def _run(self, binding: Any, out: Array) -> Array:
        self.session.run_with_iobinding(binding)
        return out  # bound as a bare address: the callable has to keep it alive


def _imported(name: str) -> Any:
    with warnings.catch_warnings():  # of its own use of its dependencies
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module(name)


PEERS: dict[str, type[Contender]] = {
    "numpy": Numpy,
    "torch": Torch,
    "jax": Jax,
    "tensorflow": TensorFlow,
    "onnxruntime": OnnxRuntime,
}
OURS: dict[str, type[Contender]] = {"ceiling": Ceiling, "fastbn": Fastbn}
