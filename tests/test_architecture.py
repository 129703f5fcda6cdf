"""Who may import whom (see docs/decisions), read from the sources."""

import ast
import re
from pathlib import Path

import pytest

import fastbn

PACKAGE = Path(__file__).parent.parent / "fastbn"

ALLOWED = {
    "__init__": {
        "optim",
        "_blocks",
        "_controller",
        "_dispatch",
        "_pool",
        "checkpoint",
        "functional",
        "layer",
    },
    "__main__": {"cli"},
    "checkpoint": {"_files"},
    "layer": {"functional", "_norm"},
    "_norm": {"functional", "_hooks"},
    "optim": {"_hooks", "_updates"},
    "functional": {"_blocks", "_dispatch", "_job", "_mask", "_plan"},
    "_dispatch": {"_cpu", "_pool", ""},  # "" is fastbn itself, asked for its version in a function
    "_controller": {""},  # likewise
    "_kernels": {"_cpu", "_job", "_pool"},
    "cli": {"", "demo", "tune"},
    "demo": {"", "_files", "demo", "layer", "optim"},
    "tune": {"", "demo", "tune"},
}

CYTHON_SOURCES = (".pyx", ".pxd", ".pxi")
CYTHON = re.compile(
    r"^[ ]*from[ ]+(?P<module>[\w.]+)[ ]+c?import[ ]+(?P<names>\([^)]*\)|[^\n]+)"
    r"|^[ ]*c?import[ ]+(?P<modules>[\w., ]+)",
    re.MULTILINE,
)


def imports_of(path):
    """Return the modules of fastbn that a source imports; "" stands for fastbn itself."""
    found = []  # modules, and what is taken from which module
    if path.suffix in CYTHON_SOURCES:
        for match in CYTHON.finditer(path.read_text()):
            if match["module"]:
                found += [(match["module"], name) for name in re.findall(r"\w+", match["names"])]
            else:
                found += [(name.split()[0], None) for name in match["modules"].split(",")]
    else:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found += [(alias.name, None) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                found += [(node.module, alias.name) for alias in node.names]
    return {
        name if module == "fastbn" and is_module(name) else module.partition(".")[2].split(".")[0]
        for module, name in found
        if module.split(".")[0] == "fastbn"
    }


def is_module(name):
    return any((PACKAGE / f"{name}{suffix}").exists() for suffix in (".py", ".pyx", ".pxd", ""))


SOURCES = sorted(p for p in PACKAGE.rglob("*") if p.suffix in (".py", *CYTHON_SOURCES))


def test_imports_of_cython_are_read(tmp_path):
    source = tmp_path / "a.pyx"
    source.write_text(
        "from fastbn import _blocks, functional\nfrom fastbn._job cimport (\n    A,\n)\n"
        "from fastbn._pool cimport run_units\ncimport fastbn._cpu\nimport fastbn\nimport os\n"
    )
    assert imports_of(source) == {"_blocks", "functional", "_job", "_pool", "_cpu", ""}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_what_it_may(path):
    name = path.relative_to(PACKAGE).parts[0].partition(".")[0]
    assert imports_of(path) <= ALLOWED.get(name, set())


def test_the_public_names_are_there():
    for name in fastbn.__all__:
        assert getattr(fastbn, name).__doc__
