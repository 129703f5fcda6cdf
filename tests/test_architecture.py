"""Which room may use which (see docs/architecture.md), read from the sources."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import fastbn

PACKAGE = Path(__file__).parent.parent / "fastbn"

# A room is a folder or a file of fastbn/. "" is fastbn itself: what its users see.
ALLOWED = {
    "reference": set(),
    "checks": set(),
    "hooks": set(),
    "files": set(),
    "runtime": {"checks"},
    "kernels": {"runtime"},
    "functional": {"checks", "kernels", "runtime"},
    "layers": {"checks", "functional", "hooks"},
    "optim": {"checks", "hooks", "runtime"},
    "distributed": {"checks", "layers", "optim"},
    "checkpoint": {"checks", "files"},
    "__init__": {"checkpoint", "functional", "kernels", "layers", "optim", "runtime"},
    "torch": {"checks", "functional", "runtime"},
    "demo": {"", "checks", "distributed", "files"},
    "tune": {"", "checks", "demo", "files"},
    "cli": {"", "checks", "demo", "files", "tune"},
    "__main__": {"cli"},
}

CYTHON_SOURCES = (".pyx", ".pxd", ".pxi")
CYTHON = re.compile(
    r"^[ ]*from[ ]+(?P<module>[\w.]+)[ ]+c?import[ ]+(?P<names>\([^)]*\)|[^\n]+)"
    r"|^[ ]*c?import[ ]+(?P<modules>[\w., ]+)",
    re.MULTILINE,
)


def imports_of(path):
    """Return the rooms that a source imports; "" stands for fastbn itself."""
    found = []  # modules, and what is taken from which module
    text = path.read_text(encoding="utf-8")
    if path.suffix in CYTHON_SOURCES:
        for match in CYTHON.finditer(text):
            if match["module"]:
                found += [(match["module"], name) for name in re.findall(r"\w+", match["names"])]
            else:
                found += [(name.split()[0], None) for name in match["modules"].split(",")]
    else:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                found += [(alias.name, None) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                found += [(node.module, alias.name) for alias in node.names]
    return {
        name if module == "fastbn" and name in ALLOWED else module.partition(".")[2].split(".")[0]
        for module, name in found
        if module.split(".")[0] == "fastbn"
    }


SOURCES = sorted(p for p in PACKAGE.rglob("*") if p.suffix in (".py", *CYTHON_SOURCES))


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].partition(".")[0]


def test_imports_of_cython_are_read(tmp_path):
    source = tmp_path / "a.pyx"
    source.write_text(
        "from fastbn import checks, functional\nfrom fastbn.kernels.job cimport (\n    A,\n)\n"
        "from fastbn.runtime.pool cimport run_units\nimport fastbn\nimport os\n"
        "cimport fastbn.layers.base\n",
        encoding="utf-8",
    )
    assert imports_of(source) == {"checks", "functional", "kernels", "runtime", "layers", ""}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_uses_only_those_that_it_may(path):
    # A version is asked for inside of functions, when all of fastbn is there.
    late = {""} if path.name in ("variants.py", "controller.py") else set()
    assert imports_of(path) <= ALLOWED[room_of(path)] | {room_of(path)} | late


def test_the_arrows_go_one_way():
    order = list(TopologicalSorter({**ALLOWED, "": {"__init__"}}).static_order())
    assert order[-1] == "__main__"


def test_the_rooms_are_few():
    files = [p for p in PACKAGE.iterdir() if p.is_file() and p.suffix != ".pyi"]
    assert len(files) <= 10
    assert {room_of(path) for path in SOURCES} <= ALLOWED.keys()


def test_the_public_names_are_there():
    for name in fastbn.__all__:
        assert getattr(fastbn, name).__doc__
