"""What of the pages can be held without building them (`nox -s docs` builds them)."""

import pkgutil
import re
from importlib import import_module
from pathlib import Path

import pytest

import fastbn

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
GALLERY = sorted((ROOT / "docs" / "gallery").glob("plot_*.py"))


def public_names():
    """Return what users may import: the names of fastbn, of its modules, and of any __all__."""
    modules = [
        import_module(f"fastbn.{each.name}")
        for each in pkgutil.iter_modules(fastbn.__path__)
        if not each.name.startswith("_")
    ]
    names = {f"fastbn.{name}" for name in fastbn.__all__}
    for module in modules:
        if hasattr(module, "__all__"):
            names |= {f"{module.__name__}.{name}" for name in module.__all__}
        elif module.__name__ in names:
            names |= {
                f"{module.__name__}.{name}"
                for name, value in vars(module).items()
                if getattr(value, "__module__", None) == module.__name__ and name[0] != "_"
            }
    return names - {module.__name__ for module in modules}


def referenced_names():
    names, module = [], None
    for line in (ROOT / "docs" / "reference.rst").read_text().splitlines():
        if match := re.fullmatch(r"\.\. currentmodule:: ([\w.]+)", line):
            module = match[1]
        elif match := re.fullmatch(r" {3}(\w+)", line):
            names.append(f"{module}.{match[1]}")
    return names


def test_each_public_name_is_in_the_reference_once():
    assert sorted(referenced_names()) == sorted(public_names())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_includes_of_the_readme_is_found_there_once(page):
    text = (ROOT / "README.md").read_text()
    for start, end in re.findall(
        r'```\{include\} \.\./README\.md\n:start-after: "(.*)"\n(?::end-before: "(.*)"\n)?',
        page.read_text(),
    ):
        assert text.count(start) == 1, start
        assert end in text.partition(start)[2], end


def test_each_page_is_in_a_table_of_contents():
    listed = re.findall(
        r"^```\{toctree\}\n((?:.*\n)*?)```",
        "".join(page.read_text() for page in PAGES),
        re.MULTILINE,
    )
    entries = {line for block in listed for line in block.splitlines() if line}
    assert {page.stem for page in PAGES} - entries == {"index"}
    assert {"decisions/*", "reference", "why/index"} <= entries


@pytest.mark.parametrize("page", GALLERY, ids=lambda page: page.stem)
def test_a_page_of_the_gallery_holds_its_claims(page):
    assert len(re.findall(r"^ *assert ", page.read_text(), re.MULTILINE)) >= 2
