"""Who may import whom (see docs/decisions), read from the sources."""

import ast
import re
from pathlib import Path

import pytest

import fastbn

PACKAGE = Path(__file__).parent.parent / "fastbn"

ALLOWED = {
    "__init__": {"optim", "_dispatch", "functional", "layer"},
    "__main__": {"cli"},
    "layer": {"functional", "_hooks"},
    "optim": {"_hooks", "_updates"},
    "functional": {"_plan", "_dispatch"},
    "_dispatch": {"_cpu", ""},  # "" is fastbn itself, asked for its version inside a function
    "cli": {"", "demo"},
    "demo": {"", "demo", "layer", "optim"},
}


def imports_of(path):
    """Return the modules of fastbn that a source imports; "" stands for fastbn itself."""
    found = set()
    if path.suffix == ".pyx":
        lines = re.findall(r"^\s*(?:from|import) (fastbn[\w.]*)", path.read_text(), re.MULTILINE)
        names = lines
    else:
        names = []
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                names.append(node.module)
                if node.module == "fastbn":
                    names.remove("fastbn")
                    names += [
                        f"fastbn.{a.name}" if is_module(a.name) else "fastbn" for a in node.names
                    ]
    for name in names:
        if name.split(".")[0] == "fastbn":
            found.add(name.partition(".")[2].partition(".")[0])
    return found


def is_module(name):
    return any((PACKAGE / f"{name}{suffix}").exists() for suffix in (".py", ".pyx", ""))


SOURCES = sorted(p for p in PACKAGE.rglob("*") if p.suffix in (".py", ".pyx"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_what_it_may(path):
    name = path.relative_to(PACKAGE).parts[0].partition(".")[0]
    assert imports_of(path) <= ALLOWED.get(name, set())


def test_the_public_names_are_there():
    for name in fastbn.__all__:
        assert getattr(fastbn, name).__doc__
