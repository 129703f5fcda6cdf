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
    blocks = re.findall(
        r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    assert len(blocks) == 2
    names = {}
    exec(compile(blocks[0], str(README), "exec"), names)
    np.testing.assert_allclose(names["y"].mean(axis=(0, 2, 3)), 0, atol=1e-6)
    np.testing.assert_allclose(names["y"].std(axis=(0, 2, 3)), 1, atol=1e-4)
    np.testing.assert_allclose(names["dbeta"], 32 * 28 * 28)
    exec(compile(blocks[1], str(README), "exec"), names)
    [accuracy] = re.findall(r"accuracy: ([\d.]+)", capsys.readouterr().out)
    assert float(accuracy) > 0.9


def test_the_readme_is_read_in_five_minutes():
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 200
    assert sum(line.startswith("|") for line in lines) <= 20


def test_the_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README.read_text(encoding="utf-8"))
    assert len(links) > 10
    assert [link for link in links if not (README.parent / link).exists()] == []


@pytest.mark.parametrize("extra", ["demo", "test"])
def test_the_commands_of_the_readme_stand_on_one_line_each(extra):
    lines = [
        line
        for line in README.read_text(encoding="utf-8").splitlines()
        if f'pip install ".[{extra}]"' in line
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
