"""convert, revert and fuse: whole models of PyTorch with our norms, and back."""

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from test_docs import blocks_of  # noqa: E402
from torch import nn  # noqa: E402

import fastbn.torch  # noqa: E402
from fastbn.torch import convert, revert  # noqa: E402
from fastbn.torch.convert import OURS  # noqa: E402


class Block(nn.Module):
    """A residual block, written as torchvision writes it."""

    def __init__(self, channels_in, channels, stride=1, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = norm(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = norm(channels)
        self.downsample = None
        if stride != 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), norm(channels)
            )

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


def resnet():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        Block(8, 8), Block(8, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    """Let small models not wait for threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


FUSED = {"": {"1"}, "3": {"bn1", "bn2"}, "4": {"bn1", "bn2"}}


def fused_in(model):
    return {name: set(m._fused) for name, m in model.named_modules() if hasattr(m, "_fused")}


def assert_same(ours, torchs, x):
    """Assert that two models give the same values, gradients and buffers but for rounding."""
    results = []
    for model in (ours.double(), torchs.double()):
        model.zero_grad()
        mine = x.double().requires_grad_()
        y = model(mine)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([y, mine.grad, *gradients, *model.buffers()])
        model.eval()
        results[-1].append(model(x.double()))
        model.train()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.__name__)
def test_each_kind_of_norm_is_converted_and_reverted(kind):
    lazy = kind.__name__.startswith("Lazy")
    norm = kind(**({} if lazy else {"num_features": 3})).eval()
    text, state = repr(norm), dict(norm.state_dict(keep_vars=True))
    model = nn.Sequential(norm)
    assert convert(model) is model
    assert model[0] is norm
    assert type(norm) is OURS[kind]
    assert not norm.training
    assert repr(norm) == text
    after = norm.state_dict(keep_vars=True)
    assert all(after[key] is value for key, value in state.items())
    assert convert(model) is revert(convert(model))
    assert type(norm) is kind
    assert convert(norm) is norm
    assert type(norm) is OURS[kind]


def test_parameters_hooks_and_shared_modules_stay():
    shared = nn.BatchNorm2d(8)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), shared, nn.Conv2d(8, 8, 3), shared)
    before = dict(model.state_dict(keep_vars=True))
    called = []
    handle = shared.register_forward_hook(lambda *_: called.append("forward"))
    shared.register_full_backward_hook(lambda *_: called.append("backward"))
    convert(model)
    assert model[1] is model[3] is shared
    for key, value in model.state_dict(keep_vars=True).items():
        assert value is before[key]
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert called == ["forward", "forward", "backward", "backward"]
    handle.remove()
    model(torch.randn(2, 3, 8, 8))
    assert len(called) == 4


def test_classes_of_others_are_left_alone():
    class Other(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) + 1

    model = nn.Sequential(Other(3), nn.LayerNorm(3), nn.BatchNorm2d(3))
    convert(model, sync=True, fuse=True)
    kinds = [Other, nn.LayerNorm, fastbn.torch.SyncBatchNorm]
    assert [type(m) for m in model] == kinds


def test_a_converted_model_is_the_same_function():
    assert_same(convert(resnet()), resnet(), torch.randn(4, 3, 8, 8))


def test_a_converted_model_is_reverted_whole():
    model = convert(resnet(), sync=True, fuse=True)
    kinds = [type(m) for m in resnet().modules()]
    assert [type(m) for m in revert(model).modules()] == kinds
    for module, wanted in zip(model.modules(), resnet().modules(), strict=True):
        assert module.__dict__.keys() == wanted.__dict__.keys()
        assert repr(module) == repr(wanted)


def test_sync_makes_synchronised_norms():
    group = object()
    model = convert(convert(resnet()), sync=True, process_group=group)
    norms = [m for m in model.modules() if isinstance(m, fastbn.torch.SyncBatchNorm)]
    assert len(norms) == 6
    assert all(norm.process_group is group for norm in norms)
    assert convert(model) is model
    assert isinstance(model[1], fastbn.torch.SyncBatchNorm)
    torchs = nn.SyncBatchNorm(3, process_group=group)
    convert(torchs)
    assert torchs.process_group is group
    assert type(revert(torchs)) is nn.SyncBatchNorm


def test_wrong_arguments_are_named_and_change_nothing():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.LazyBatchNorm2d())
    for arguments, message in [
        ((model, True), "module: expected batch norms that know their number of channels, got lazy "
         "'1'"),
        ((model, False, object()), "process_group: expected None without sync=True, got one"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            convert(*arguments)
    active = nn.Sequential(
        convert(nn.BatchNorm2d(3)), fastbn.torch.BatchNorm2d(3, activation="relu")
    )
    with pytest.raises(ValueError, match="module: expected norms without an activation of their"):
        revert(active)
    assert [type(m) for m in model] == [nn.BatchNorm2d, nn.LazyBatchNorm2d]
    assert [type(m) for m in active] == [fastbn.torch.BatchNorm2d] * 2
    for function in (convert, revert):
        with pytest.raises(TypeError, match=r"module: expected torch\.nn\.Module, got list"):
            function([model])


def test_a_residual_network_is_fused():
    model = convert(resnet(), fuse=True)
    assert fused_in(model) == FUSED
    assert isinstance(model[3], Block)
    assert list(model.state_dict()) == list(resnet().state_dict())
    wanted = resnet()
    assert_same(model, wanted, torch.randn(4, 3, 8, 8))
    assert_same(revert(model), wanted, torch.randn(4, 3, 8, 8))


def test_torchvisions_resnet_is_fused():
    models = pytest.importorskip("torchvision").models
    model = convert(models.resnet18(), fuse=True)
    assert sum(map(len, fused_in(model).values())) == 17  # all but those of the three shortcuts


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_a_fused_model_is_copied(duplicate):
    model = convert(resnet(), fuse=True)
    other, x = duplicate(model), torch.randn(4, 3, 8, 8)
    assert fused_in(other) == FUSED
    assert torch.equal(other(x), model(x))
    if duplicate is not copy.copy:  # whose modules are those of the model
        kinds = [type(m) for m in resnet().modules()]
        assert [type(m) for m in revert(other).modules()] == kinds
        assert fused_in(model) == FUSED
        assert_same(model, other, x)


def test_a_fused_model_compiles():
    model, x = convert(resnet(), fuse=True), torch.randn(4, 3, 8, 8)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), copy.deepcopy(model)(x))


class Unfused(nn.Module):
    """Modules whose norms cannot be fused, in ways to be overridden."""

    def __init__(self, *_):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()


class Untraceable(Unfused):
    def forward(self, x):
        return self.relu(self.norm(x)) if x.sum() > 0 else x


class Modal(Unfused):
    def forward(self, x):
        y = self.norm(x)
        return self.relu(y) if self.training else y


class Optional(Unfused):
    def forward(self, x, scale=None):
        y = self.relu(self.norm(x))
        return y if scale is None else y * scale


class Twice(Unfused):
    def forward(self, x):
        return self.norm(self.relu(self.norm(x)))


class UsedAgain(Unfused):
    def forward(self, x):
        y = self.norm(x)
        return self.relu(y) + y


class ChangedMeanwhile(Unfused):
    def forward(self, x):
        y = self.norm(x)
        x = torch.sin(x)
        x *= 2
        return self.relu(y + x)


class AddedInPlace(Unfused):
    def forward(self, x):
        y = self.conv(x)
        total = self.norm(self.conv(x) * 1)
        y += total
        return self.relu(y) + y


class Itself(Unfused):
    def forward(self, x):
        y = self.norm(self.conv(x))
        return self.relu(y + y)


class Scaled(Unfused):
    def forward(self, x):
        return self.relu(torch.add(self.norm(self.conv(x)), x, alpha=2))


class Hooked(Unfused):
    def __init__(self, *_):
        super().__init__()
        self.norm.register_forward_hook(lambda module, x, y: y + 1)

    def forward(self, x):
        return self.relu(self.norm(x))


class HookedRelu(Unfused):
    def __init__(self, *_):
        super().__init__()
        self.relu.register_forward_hook(lambda module, x, y: y + 1)

    def forward(self, x):
        return self.relu(self.norm(x))


class Keeping(Unfused):
    def __init__(self, *_):
        super().__init__()
        self.kept = torch.ones(2)

    def forward(self, x):
        self.kept = self.norm(x)
        return self.relu(self.kept)


class Subtraction(nn.Module):
    def forward(self, x, y):
        return x - y


class NamedAdd(Unfused):
    def __init__(self, *_):
        super().__init__()
        self.add = Subtraction()

    def forward(self, x):
        return self.relu(self.add(self.norm(self.conv(x)), x))


class Patched(Unfused):
    def __init__(self, *_):
        super().__init__()
        self.forward = torch.tanh

    def forward(self, x):
        return self.relu(self.norm(x))


@pytest.mark.parametrize("kind", Unfused.__subclasses__(), ids=lambda kind: kind.__name__)
def test_what_would_change_the_result_is_not_fused(kind):
    torch.manual_seed(0)
    model = kind()
    wanted = copy.deepcopy(model)
    convert(model, fuse=True)
    assert fused_in(model) == {}
    assert model.__dict__.keys() == wanted.__dict__.keys()
    assert_same(model, wanted, torch.randn(4, 3, 5, 5))


def test_a_norm_that_two_modules_share_is_not_fused():
    norm = nn.BatchNorm2d(3)
    model = nn.Sequential(nn.Sequential(norm, nn.ReLU()), nn.Sequential(norm, nn.Tanh()))
    assert fused_in(convert(model, fuse=True)) == {}


class Function(Unfused):
    def forward(self, x):
        return torch.relu(self.norm(x))


class Method(Unfused):
    def forward(self, x):
        return self.norm(x).relu_()


class Reversed(Unfused):
    def forward(self, x):
        return nn.functional.relu(input=x + self.norm(self.conv(x)))


class Broadcast(Unfused):
    def forward(self, x):
        return torch.relu(self.norm(self.conv(x)).add_(x.mean((2, 3), keepdim=True)))


@pytest.mark.parametrize("kind", [Function, Method, Reversed, Broadcast])
def test_other_ways_to_write_it_are_fused(kind):
    torch.manual_seed(0)
    model = kind()
    wanted = copy.deepcopy(model)
    assert fused_in(convert(model, fuse=True)) == {"": {"norm"}}
    assert fused_in(convert(model, fuse=True)) == {"": {"norm"}}
    assert_same(model, wanted, torch.randn(4, 3, 5, 5))


def test_fifty_steps_of_training_give_the_same_losses():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(50, 8, 3, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (50, 8), generator=generator)
    x += labels[..., None, None, None] / 2
    losses = []
    for change in (lambda model: model, convert, lambda model: convert(model, fuse=True)):
        model = change(resnet().double())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        losses.append([])
        for images, wanted in zip(x, labels, strict=True):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), wanted)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    torchs, *ours = losses
    assert np.mean(torchs[-5:]) < 0.7 * np.mean(torchs[:5])
    for each in ours:
        np.testing.assert_allclose(each, torchs, rtol=1e-7)


def test_the_script_of_the_page_learns(capsys):
    page = Path(__file__).parent.parent / "docs" / "torch.md"
    names = {}
    exec(compile(blocks_of(page, "python")[0], "torch.md", "exec"), names)
    assert float(capsys.readouterr().out.removeprefix("accuracy:")) > 0.9
    assert fused_in(names["model"]) == {"": {"1", "4"}}
