"""fastbn.torch under torch.compile and torch.export, and its operators by themselves."""

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import fastbn.torch as ours  # noqa: E402

# Tracing is PyTorch's, and so are its warnings.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning",
                                        "ignore::UserWarning")  # fmt: skip


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(20150211)
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    """A norm, and what may follow."""

    def __init__(self, norm, residual):
        super().__init__()
        self.norm, self.residual = norm, residual

    def forward(self, x):
        return self.norm(x, x * 2) if self.residual else self.norm(x) * 1


BLOCKS = {
    "batch": lambda: Block(ours.BatchNorm2d(3), False),
    "batch, relu": lambda: Block(ours.BatchNorm2d(3, activation="relu"), False),
    "batch, add, relu": lambda: Block(ours.BatchNorm2d(3, activation="relu"), True),
    "batch, average": lambda: Block(ours.BatchNorm2d(3, momentum=None), False),
    "instance": lambda: Block(ours.InstanceNorm2d(3, True, track_running_stats=True), False),
    "instance, relu": lambda: Block(ours.InstanceNorm2d(3, activation="relu"), False),
}


def outcome(block, x):
    """Return y, dx, gradients and buffers."""
    x = x.detach().requires_grad_()
    y = block(x)
    y.square().sum().backward()
    rest = [*(p.grad for p in block.parameters()), *block.buffers()]
    return [each.detach().clone() for each in (y, x.grad, *rest)]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", BLOCKS)
def test_compiled_modules_have_the_bits_of_eager_ones(name, memory_format):
    x = torch.randn(4, 3, 5, 6).to(memory_format=memory_format)
    eager = BLOCKS[name]()
    traced = BLOCKS[name]()
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    for mode in (True, False):
        eager.train(mode).zero_grad()
        traced.train(mode).zero_grad()
        for own, other in zip(outcome(compiled, x), outcome(eager, x), strict=True):
            if name.startswith("instance"):  # averages over examples have their own order
                torch.testing.assert_close(own, other)
            else:
                assert torch.equal(own, other)


def test_the_compiled_graph_has_the_operator_and_any_batch():
    seen = []

    def backend(graph, _):
        seen.append({str(node.target) for node in graph.graph.nodes})
        return graph

    norm = ours.BatchNorm2d(3)
    compiled = torch.compile(norm, fullgraph=True, backend=backend, dynamic=True)
    for batch in (4, 6):
        x = torch.randn(batch, 3, 5, 5)
        torch.testing.assert_close(compiled(x), ours.BatchNorm2d(3)(x))
    assert len(seen) == 1
    assert "fastbn.normalize" in str(seen)


@pytest.mark.long
def test_inductor():
    x = torch.randn(4, 3, 5, 6)
    eager, traced = BLOCKS["batch, add, relu"](), BLOCKS["batch, add, relu"]()
    compiled = torch.compile(traced, fullgraph=True)
    for own, other in zip(outcome(compiled, x), outcome(eager, x), strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("strict", [True, False])
def test_export_has_the_operator_that_every_runtime_knows(strict):
    norm, x = ours.BatchNorm2d(3).eval(), torch.randn(4, 3, 5, 5)
    program = torch.export.export(norm, (x,), strict=strict)
    assert "aten.batch_norm" in str(program.graph)
    torch.testing.assert_close(program.module()(x), norm(x))


def opcheck_cases():
    x, values = torch.randn(4, 3, 5), torch.rand(3)

    def leaf(tensor):
        return tensor.clone().requires_grad_()

    none = None, None
    yield leaf(x), leaf(values), leaf(values), *none, None, False, 1e-5, None
    yield leaf(x), leaf(values), leaf(values), *none, leaf(x), False, 1e-5, "relu"
    yield leaf(x.double()), *none, *none, None, True, 1e-5, "leaky_relu"
    yield leaf(x), leaf(values), None, values, values, None, False, 1e-5, None
    yield (
        leaf(x.transpose(0, 2).contiguous().transpose(0, 2)),
        *none,
        *none,
        None,
        False,
        1e-5,
        None,
    )
    yield x.bfloat16(), values, values, *none, None, False, 1e-5, "relu"


@pytest.mark.parametrize("case", range(6))
def test_opcheck(case):
    arguments = list(opcheck_cases())[case]
    torch.library.opcheck(torch.ops.fastbn.normalize.default, arguments)


def test_the_operator_refuses_what_kernels_cannot_take():
    with pytest.raises(ValueError, match="fastbn::normalize: expected what"):
        torch.ops.fastbn.normalize(torch.ones(4), *[None] * 5, False, 1e-5, None)
