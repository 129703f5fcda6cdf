"""Who takes part: fastbn, the other libraries, and the speed of memory as the ceiling of all.

A peer is made for a `workloads.Data` and a number of threads. Its methods `forward`, `backward` and
`inference` return the ways it has of doing that, as {name: callable}; the fastest of them counts.
`out` is an array to write to, or None for a fresh one in each call. `array` makes an array of y or
dx, in the shape of x, of what such a callable has returned.
"""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache, partial

import numpy as np
import plain_numpy
from workloads import CORES, EPS

import fastbn


class UnavailableError(ImportError):
    """The library is there, but cannot take part here."""


FUSED = ("forward_relu", "backward_relu", "forward_add_relu", "backward_add_relu")


class Peer:
    outputs = ("out", "fresh")
    dtypes = ("float32",)
    operations = ("forward", "backward", "inference")
    families = None  # all

    def __init__(self, data, threads):
        self.data = data
        self.threads = threads
        self.prepare()

    def prepare(self):
        pass

    def array(self, result):
        return result[0] if isinstance(result, tuple) else result

    @classmethod
    def enters(cls, workload, operation, output):
        return (
            output in cls.outputs
            and workload.dtype in cls.dtypes
            and operation in cls.operations
            and (cls.families is None or workload.family in cls.families)
            # Nobody has out= for these, and three steps of NumPy would take all day.
            and (operation not in FUSED or (output == "fresh" and workload.family == "ResNet-50"))
        )


class Ceiling(Peer):
    """Copying x, or adding dy to it: no batch norm can move fewer bytes."""

    dtypes = ("float32", "float64", "float16", "bfloat16")
    operations = (*Peer.operations, *FUSED[:3])  # the last one moves as much as nothing of NumPy

    def forward(self, out):
        return self._ways(np.copyto, out, self.data.x)

    inference = forward_relu = forward

    def backward(self, out):
        return self._ways(_add, out, self.data.x, self.data.dy)

    backward_relu = forward_add_relu = backward

    def _ways(self, move, out, *arrays):
        if self.data.x.itemsize == 2:  # NumPy computes these value by value; bytes are bytes
            arrays = [a.view(np.float32) for a in arrays]
            out = None if out is None else out.view(np.float32)
        ways = {"one thread": partial(_move, _whole, move, out, arrays)}
        if self.threads > 1:  # which loses where the arrays are small
            split = partial(_split, _pool(self.threads - 1), self.threads)
            ways["split"] = partial(_move, split, move, out, arrays)
        return ways

    def array(self, _result):
        return None  # nothing to check


def _add(out, x, dy):
    np.add(x, dy, out=out)


def _move(how, move, out, arrays):
    out = np.empty_like(arrays[0]) if out is None else out
    how(move, out, *arrays)


def _whole(move, *arrays):
    move(*arrays)


def _split(pool, threads, move, *arrays):
    parts = zip(*(np.array_split(a.reshape(-1), threads) for a in arrays), strict=True)
    mine, *others = parts
    futures = [pool.submit(move, *part) for part in others]
    move(*mine)
    for future in futures:
        future.result()


@cache
def _pool(workers):
    return ThreadPoolExecutor(workers)


class Fastbn(Peer):
    dtypes = ("float32", "float64", "float16", "bfloat16")
    operations = (*Peer.operations, *FUSED)
    functions = (fastbn.batch_norm, fastbn.batch_norm_backward, fastbn.batch_norm_inference)

    def prepare(self):
        fastbn.set_num_threads(self.threads)
        try:
            fastbn.batch_norm(np.ones((2, 2), self.data.x.dtype))
        except TypeError as problem:
            raise UnavailableError(str(problem)) from None

    def forward(self, out):
        d = self.data
        function = self.functions[0]
        return {"": partial(function, d.x, d.gamma, d.beta, axis=d.axis, eps=EPS, out=out)}

    def backward(self, out):
        _, saved = self.forward(None)[""]()
        return {"": partial(self.functions[1], self.data.dy, saved, out=out)}

    def inference(self, out):
        d = self.data
        function = partial(self.functions[2], d.x, d.mean, d.var, d.gamma, d.beta)
        return {"": partial(function, axis=d.axis, eps=EPS, out=out)}

    def forward_relu(self, out):
        return self._fused(self.data.clear_of_zero, None, out)

    def forward_add_relu(self, out):
        return self._fused(self.data.x, self.data.residual, out)

    def _fused(self, x, residual, out):
        d = self.data
        options = {"axis": d.axis, "eps": EPS, "activation": "relu", "residual": residual}
        return {"": partial(fastbn.batch_norm, x, d.gamma, d.beta, out=out, **options)}

    def backward_relu(self, out):
        _, saved = self.forward_relu(None)[""]()
        return {"": partial(fastbn.batch_norm_backward, self.data.dy, saved, out=out)}

    def backward_add_relu(self, out):
        _, saved = self.forward_add_relu(None)[""]()
        return {"": partial(fastbn.batch_norm_backward, self.data.dy, saved, out=out)}


class Plain(Fastbn):
    """What nothing is fused with, for the price of what is."""

    dtypes = ("float32",)
    operations = FUSED

    def forward_relu(self, out):
        return self.forward(out)

    def backward_relu(self, out):
        return self.backward(out)

    forward_add_relu, backward_add_relu = forward_relu, backward_relu

    def array(self, _result):
        return None  # something else


class Numpy(Fastbn):
    """The same calls of plain NumPy, which has one thread whatever it is given."""

    dtypes = ("float32",)
    operations = Peer.operations
    functions = (plain_numpy.forward, plain_numpy.backward, plain_numpy.inference)

    def prepare(self):
        pass


class Torch(Peer):
    operations = (*Peer.operations, *FUSED)

    def prepare(self):
        import torch

        torch.set_num_threads(self.threads)
        self.aten = torch.ops.aten
        self.torch = torch
        d = self.data
        self.x, self.dy = self.tensor(d.x), self.tensor(d.dy)
        parameters = (d.gamma, d.beta, d.mean, d.var)
        self.gamma, self.beta, self.mean, self.var = map(torch.from_numpy, parameters)

    def tensor(self, array):
        """Share the memory: channels-last tensors are NHWC arrays seen as NCHW."""
        tensor = self.torch.from_numpy(array)
        if self.data.workload.layout == "NHWC":
            return tensor.permute(0, 3, 1, 2)
        return tensor[None] if self.data.axis == 0 else tensor

    def array(self, result):
        y = result[0]
        if self.data.workload.layout == "NHWC":
            y = y.permute(0, 2, 3, 1)
        return (y[0] if self.data.axis == 0 else y).numpy()

    def forward(self, out):
        return self._normalize(out, None, None, True, np.empty_like(self.data.mean))

    def inference(self, out):
        return self._normalize(out, self.mean, self.var, False, np.empty(0, np.float32))

    def _normalize(self, out, mean, var, training, saved):
        arguments = (self.x, self.gamma, self.beta, mean, var, training, 0.1, EPS)
        if out is None:
            return {"native_batch_norm": partial(self.torch.native_batch_norm, *arguments)}
        save_mean, save_rstd = (self.torch.from_numpy(a) for a in (saved, saved.copy()))
        outputs = (self.tensor(out), save_mean, save_rstd)
        call = partial(self.torch.native_batch_norm, *arguments, out=outputs)
        return {"native_batch_norm.out": call}

    def backward(self, out):
        _, mean, rstd = self.torch.native_batch_norm(
            self.x, self.gamma, self.beta, None, None, True, 0.1, EPS
        )
        fixed = (self.dy, self.x, self.gamma, None, None, mean, rstd, True, EPS, [True] * 3)
        operator = self.aten.native_batch_norm_backward
        ways = {"native_batch_norm_backward": partial(operator.default, *fixed)}
        if out is not None:  # torch computes a fresh dx here, too, and copies it: rarely faster
            outputs = {
                "out0": self.tensor(out),
                "out1": self.torch.empty_like(mean),
                "out2": self.torch.empty_like(mean),
            }
            ways["native_batch_norm_backward.out"] = partial(operator.out, *fixed, **outputs)
        return ways

    def forward_relu(self, _out):
        return self._steps(self.data.clear_of_zero)

    def forward_add_relu(self, _out):
        return self._steps(self.data.x, self.data.residual)

    def _steps(self, x, residual=None):
        """One step after the other, as one writes it, and in place where that is possible."""
        torch, x = self.torch, self.tensor(x)
        addend = None if residual is None else self.tensor(residual)
        arguments = (x, self.gamma, self.beta, None, None, True, 0.1, EPS)

        def new():
            y, mean, rstd = torch.native_batch_norm(*arguments)
            return torch.relu(y if addend is None else y + addend), mean, rstd

        def in_place():
            y, mean, rstd = torch.native_batch_norm(*arguments)
            return torch.relu_(y if addend is None else y.add_(addend)), mean, rstd

        return {"steps": new, "steps in place": in_place}

    def backward_relu(self, _out):
        return self._steps_back(self.forward_relu, self.data.clear_of_zero)

    def backward_add_relu(self, _out):
        return self._steps_back(self.forward_add_relu, self.data.x)

    def _steps_back(self, forward, x):
        """Through ReLU, whose gradient is that of the residual too, and then batch norm."""
        y, mean, rstd = forward(None)["steps"]()
        fixed = (self.tensor(x), self.gamma, None, None, mean, rstd, True, EPS, [True] * 3)

        def steps():
            g = self.aten.threshold_backward(self.dy, y, 0)
            return (*self.aten.native_batch_norm_backward(g, *fixed), g)

        return {"steps": steps}


class Jax(Peer):
    outputs = ("fresh",)

    def prepare(self):
        _only_all_cores(self.threads, "jax")
        jax, f = _jax()
        d = self.data
        self.wait, self.functions = jax.block_until_ready, f
        self.x, self.dy, self.gamma, self.beta, self.mean, self.var = map(
            jax.numpy.asarray, (d.x, d.dy, d.gamma, d.beta, d.mean, d.var)
        )

    def array(self, result):
        return np.asarray(result[0])

    def forward(self, _out):
        return self._ways("forward", self.x, self.gamma, self.beta)

    def backward(self, _out):
        _, mean, rstd = self.functions["forward"](self.data.axis, self.x, self.gamma, self.beta)
        return self._ways("backward", self.dy, self.x, self.gamma, mean, rstd)

    def inference(self, _out):
        return self._ways("inference", self.x, self.mean, self.var, self.gamma, self.beta)

    def _ways(self, name, *arrays):
        function = partial(self.functions[name], self.data.axis)
        return {"jit": lambda: self.wait(function(*arrays))}


@cache
def _jax():
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with warnings.catch_warnings():  # of its own use of its dependencies
        warnings.simplefilter("ignore", DeprecationWarning)
        import jax
    jnp = jax.numpy

    def others(axis, x):
        return tuple(i for i in range(x.ndim) if i != axis % x.ndim)

    def wide(axis, x, *values):
        return [jnp.expand_dims(v, others(axis, x)) for v in values]

    def normalize(axis, x, mean, rstd, gamma, beta):
        mean, rstd, gamma, beta = wide(axis, x, mean, rstd, gamma, beta)
        return gamma * ((x - mean) * rstd) + beta

    def forward(axis, x, gamma, beta):
        mean, var = x.mean(others(axis, x)), x.var(others(axis, x))
        rstd = jax.lax.rsqrt(var + EPS)
        return normalize(axis, x, mean, rstd, gamma, beta), mean, rstd

    def backward(axis, dy, x, gamma, mean, rstd):
        mean, wide_rstd, gamma = wide(axis, x, mean, rstd, gamma)
        z_hat = (x - mean) * wide_rstd
        dbeta, dgamma = dy.sum(others(axis, x)), (dy * z_hat).sum(others(axis, x))
        slope, shift = wide(axis, x, dgamma / (x.size // rstd.size), dbeta / (x.size // rstd.size))
        return gamma * wide_rstd * (dy - shift - z_hat * slope), dgamma, dbeta

    def inference(axis, x, mean, var, gamma, beta):
        return (normalize(axis, x, mean, jax.lax.rsqrt(var + EPS), gamma, beta),)

    functions = (forward, backward, inference)
    return jax, {f.__name__: jax.jit(f, static_argnums=0) for f in functions}


class TensorFlow(Peer):
    """Its fused operations; they want four axes, so the others are added with length 1."""

    outputs = ("fresh",)

    def prepare(self):
        _only_all_cores(self.threads, "tensorflow")
        self.tf = tf = _tensorflow()
        d = self.data
        shape, self.format = d.workload.shape, d.workload.layout
        if self.format == "NC":
            shape, self.format = (shape[0], 1, 1, shape[1]), "NHWC"
        elif self.format == "CM":
            shape, self.format = (1, shape[0], 1, shape[1]), "NCHW"
        self.x, self.dy = (tf.constant(a.reshape(shape)) for a in (d.x, d.dy))
        self.gamma, self.beta, self.mean, self.var = map(
            tf.constant, (d.gamma, d.beta, d.mean, d.var)
        )

    def array(self, result):
        return np.asarray(result[0]).reshape(self.data.x.shape)

    def forward(self, _out):
        unknown = self.tf.zeros(0)
        return {"fused": partial(self._fused, True, unknown, unknown)}

    def inference(self, _out):
        return {"fused": partial(self._fused, False, self.mean, self.var)}

    def _fused(self, training, mean, var):
        return self.tf.raw_ops.FusedBatchNormV3(
            x=self.x,
            scale=self.gamma,
            offset=self.beta,
            mean=mean,
            variance=var,
            epsilon=EPS,
            data_format=self.format,
            is_training=training,
        )

    def backward(self, _out):
        saved = self.forward(None)["fused"]()
        call = partial(
            self.tf.raw_ops.FusedBatchNormGradV3,
            y_backprop=self.dy,
            x=self.x,
            scale=self.gamma,
            reserve_space_1=saved.reserve_space_1,
            reserve_space_2=saved.reserve_space_2,
            reserve_space_3=saved.reserve_space_3,
            epsilon=EPS,
            data_format=self.format,
            is_training=True,
        )
        return {"fused": call}


@cache
def _tensorflow():
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    with warnings.catch_warnings():  # of its own use of its dependencies
        warnings.simplefilter("ignore", DeprecationWarning)
        import tensorflow
    return tensorflow


class OnnxRuntime(Peer):
    """Channels first is all it takes: NHWC goes in as rows of channels."""

    operations = ("inference",)

    def prepare(self):
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper

        d = self.data
        channels = len(d.gamma)
        rows = d.axis == -1
        self.x = d.x.reshape(-1, channels) if rows else d.x[None] if d.axis == 0 else d.x
        names = ["scale", "B", "input_mean", "input_var"]
        values = zip(names, (d.gamma, d.beta, d.mean, d.var), strict=True)
        graph = helper.make_graph(
            [helper.make_node("BatchNormalization", ["x", *names], ["y"], epsilon=EPS)],
            "batch_norm",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.x.shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, self.x.shape)],
            [numpy_helper.from_array(value, name) for name, value in values],
        )
        opset = [helper.make_opsetid("", 15)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=8)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def inference(self, out):
        if out is None:
            return {"run": partial(self.session.run, None, {"x": self.x})}
        binding = self.session.io_binding()
        binding.bind_cpu_input("x", self.x)
        binding.bind_output("y", "cpu", 0, np.float32, self.x.shape, out.ctypes.data)
        return {"run_with_iobinding": partial(self._run, binding, out)}

    def _run(self, binding, out):
        self.session.run_with_iobinding(binding)
        return (out,)  # bound as a bare address: the callable has to keep it alive

    def array(self, result):
        return result[0].reshape(self.data.x.shape)


class OneDnn(Peer):
    """With the best of its memory formats, whatever the others use; reordering is not counted."""

    outputs = ("out",)
    families = ("ResNet-50",)

    def prepare(self):
        self.cases = _onednn(self.data, self.threads)

    def _ways(self, name, result):
        def way(case):
            run = getattr(case, name)
            return lambda: (run(), case, result)

        return {layout: way(case) for layout, case in self.cases.items()}

    def forward(self, _out):
        return self._ways("forward", "y")

    def backward(self, _out):
        return self._ways("backward", "dx")

    def inference(self, _out):
        return self._ways("inference", "y")

    def array(self, result):
        _, case, name = result
        array = case.get()[name]
        return np.moveaxis(array, 1, -1) if self.data.workload.layout == "NHWC" else array


@lru_cache(maxsize=1)  # filling the buffers takes longer than the race
def _onednn(d, threads):
    import onednn

    library = onednn.load(threads)
    cases = {layout: library.prepare(d.workload.nchw, layout) for layout in onednn.LAYOUTS}
    x, dy = (np.moveaxis(a, -1, 1) if d.workload.layout == "NHWC" else a for a in (d.x, d.dy))
    for case in cases.values():
        case.set(x, dy, d.gamma, d.beta, EPS)
        case.forward()  # its statistics are what the other two use
    return cases


def _only_all_cores(threads, name):
    if threads != CORES:
        raise UnavailableError(f"{name} has as many threads as the process has cores, here {CORES}")


PEERS = {
    "ceiling": Ceiling,
    "fastbn": Fastbn,
    "plain": Plain,
    "numpy": Numpy,
    "torch": Torch,
    "onednn": OneDnn,
    "jax": Jax,
    "tensorflow": TensorFlow,
    "onnxruntime": OnnxRuntime,
}
