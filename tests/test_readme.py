"""What README.md and the docstrings say is run as it stands there."""

import doctest
import re
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

import fastbn

README = Path(__file__).parent.parent / "README.md"


def test_the_examples_of_the_readme_run_and_learn(capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    names = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    accuracies = re.findall(r"accuracy: ([\d.]+)", capsys.readouterr().out)
    assert len(accuracies) == 2
    assert all(float(a) > 0.9 for a in accuracies)
    whole = fastbn.batch_norm(names["images"])[0]
    np.testing.assert_allclose(names["y"], whole, atol=1e-6)  # of the parts, put together
    X, hidden, bn = names["X"], names["hidden"], names["bn"]
    folded = X @ names["weight"] + names["bias"]
    np.testing.assert_allclose(folded, bn(hidden.forward(X)), atol=1e-4)


@pytest.mark.parametrize("extra", ["demo", "test"])
def test_the_commands_of_the_readme_stand_on_one_line_each(extra):
    lines = [
        line for line in README.read_text().splitlines() if f'pip install ".[{extra}]"' in line
    ]
    assert len(lines) == 1
    assert lines[0].strip().startswith("python3 -m venv .venv && .venv/bin/pip install")


@pytest.mark.parametrize(
    "name",
    [
        "kernels.variants",
        "checkpoint",
        "functional",
        "layers.batch_norm",
        "layers.instance_norm",
        "layers.conversions",
        "layers.statistics",
        "optim.schedules",
        "reference",
    ],
)
def test_the_examples_of_the_docstrings_hold(name):
    module = import_module(f"fastbn.{name}")
    if name == "checkpoint":
        pytest.importorskip("safetensors")
    if name == "functional":  # compiled: doctest does not find the functions by itself
        public = [getattr(module, n) for n in fastbn.__all__ if n in vars(module)]
        tests = {each.__name__: each.__doc__ for each in public}
        assert len(tests) == 11
    else:
        tests = None
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    if tests is None:
        found = doctest.DocTestFinder().find(module)
    else:
        parser = doctest.DocTestParser()
        found = [parser.get_doctest(d, {}, n, None, 0) for n, d in tests.items()]
    for test in found:
        runner.run(test)
    assert runner.failures == 0
    assert runner.tries > 0 or name == "reference"
