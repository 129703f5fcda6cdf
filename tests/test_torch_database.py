"""PyTorch's own inputs for norms, those with which it tests itself, on its functions and ours."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("expecttest")  # which PyTorch's test files import
pytestmark = pytest.mark.filterwarnings("ignore")  # of PyTorch's test files, and of odd inputs

import warnings  # noqa: E402

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

import fastbn.torch as ours  # noqa: E402

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
OPS = [op for op in op_db if op.name in ("nn.functional.batch_norm", "nn.functional.instance_norm")]
MODULES = [
    info
    for info in module_db
    if hasattr(ours, info.module_cls.__name__) and "Sync" not in info.module_cls.__name__
]
SIZES = {torch.float32: 2e-5, torch.float64: 1e-12, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def tried(function):
    """Return what a function returns, or the type of what it raises."""
    try:
        return function()
    except Exception as error:
        return type(error)


def assert_agree(mine, theirs, dtype):
    if isinstance(theirs, type):
        assert mine is theirs
        return
    assert len(mine) == len(theirs)
    for own, other in zip(mine, theirs, strict=True):
        assert (own is None) == (other is None)
        if other is not None:
            assert own.dtype == other.dtype
            assert own.shape == other.shape
            if other.is_floating_point() and other.numel():
                scale = other.abs().nan_to_num().max().item() + 1
                torch.testing.assert_close(
                    own, other, rtol=SIZES[dtype], atol=SIZES[dtype] * scale, equal_nan=True
                )


def copied(value):
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_inputs_of_functions(op, dtype):
    mine = getattr(ours, op.name.rpartition(".")[2])
    count = 0
    for sample in op.sample_inputs("cpu", dtype, requires_grad=True):
        results = []
        for function in (op.op, mine):
            tensors = [copied(value) for value in (sample.input, *sample.args)]
            options = {name: copied(value) for name, value in sample.kwargs.items()}

            def call(function=function, tensors=tensors, options=options):
                y = function(*tensors, **options)
                given = [t for t in (*tensors, *options.values()) if isinstance(t, torch.Tensor)]
                if y.requires_grad:
                    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape))
                return [y.detach(), *(t.grad for t in given), *(t.detach() for t in given)]

            results.append(tried(call))
        assert_agree(results[1], results[0], dtype)
        count += 1
    assert count > 5


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("info", MODULES, ids=lambda info: info.module_cls.__name__)
def test_inputs_of_modules(info, dtype, training):
    kind = getattr(ours, info.module_cls.__name__)
    count = 0
    for sample in info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=True, training=training
    ):
        results = []
        for made in (info.module_cls, kind):
            construct, forward = sample.constructor_input, sample.forward_input
            if forward is None:
                continue

            def call(made=made, construct=construct, forward=forward):
                module = made(*construct.args, **construct.kwargs).to(dtype).train(training)
                tensors = [copied(value) for value in forward.args]
                y = module(*tensors)
                if y.requires_grad:
                    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape))
                grads = [t.grad for t in (*tensors, *module.parameters())]
                return [y.detach(), *grads, *module.buffers()]

            results.append(tried(call))
        if results:
            assert_agree(results[1], results[0], dtype)
            count += 1
    assert count > 0


def test_all_modules_of_torch_are_there():
    assert {info.module_cls.__name__[:-2] for info in MODULES} == {"BatchNorm", "InstanceNorm"}
    assert len(MODULES) == 6
    assert len(OPS) >= 2
