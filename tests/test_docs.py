"""What of the pages can be held without building them (`nox -s docs` builds them)."""

import doctest
import re
import runpy
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from test_architecture import ALLOWED

import fastbn

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
GALLERY = sorted((ROOT / "docs" / "gallery").glob("plot_*.py"))


PUBLIC = ("fastbn", "fastbn.distributed", "fastbn.optim", "fastbn.reference", "fastbn.tune")


def public_names():
    """Return what users may import: what is in __all__ of fastbn and of its public modules."""
    names = {f"{module}.{name}" for module in PUBLIC for name in import_module(module).__all__}
    return names - set(PUBLIC)


def referenced_names():
    names, module = [], None
    for line in (ROOT / "docs" / "reference.rst").read_text(encoding="utf-8").splitlines():
        if match := re.fullmatch(r"\.\. currentmodule:: ([\w.]+)", line):
            module = match[1]
        elif match := re.fullmatch(r" {3}(\w+)", line):
            names.append(f"{module}.{match[1]}")
    return names


def test_each_public_name_is_in_the_reference_once():
    assert sorted(referenced_names()) == sorted(public_names())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_includes_of_the_readme_is_found_there_once(page):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for start, end in re.findall(
        r'```\{include\} \.\./README\.md\n:start-after: "(.*)"\n(?::end-before: "(.*)"\n)?',
        page.read_text(encoding="utf-8"),
    ):
        assert text.count(start) == 1, start
        assert end in text.partition(start)[2], end


def test_each_page_is_in_a_table_of_contents():
    listed = re.findall(
        r"^```\{toctree\}\n((?:.*\n)*?)```",
        "".join(page.read_text(encoding="utf-8") for page in PAGES),
        re.MULTILINE,
    )
    entries = {line for block in listed for line in block.splitlines() if line}
    assert {page.stem for page in PAGES} - entries == {"index"}
    assert {"decisions/*", "reference", "why/index"} <= entries


def blocks_of(path, kind):
    """Return the blocks of a page: kind is "python" or "{doctest}"."""
    pattern = rf"^```{re.escape(kind)}\n(.*?)^```"
    return re.findall(pattern, path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_training_with_the_layer_learns(capsys):
    names = {}
    [program] = blocks_of(ROOT / "docs" / "training.md", "python")
    for block in [*blocks_of(ROOT / "README.md", "python"), program]:
        exec(compile(block, "training.md", "exec"), names)
    accuracies = re.findall(r"accuracy: ([\d.]+)", capsys.readouterr().out)
    assert len(accuracies) == 2
    assert all(float(accuracy) > 0.9 for accuracy in accuracies)


def test_what_stands_around_the_layer_runs():
    names = {}
    for block in blocks_of(ROOT / "docs" / "around.md", "python"):
        exec(compile(block, "around.md", "exec"), names)
    whole = fastbn.batch_norm(names["images"])[0]
    np.testing.assert_allclose(names["y"], whole, atol=1e-6)  # of the parts, put together


@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks_of(p, "{doctest}")], ids=lambda p: p.stem
)
def test_the_examples_of_a_page_hold(page):
    text = "\n".join(blocks_of(page, "{doctest}"))
    example = doctest.DocTestParser().get_doctest(
        text, {"np": np, "fastbn": fastbn}, page.name, str(page), 0
    )
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    runner.run(example)
    assert runner.tries > 0
    assert runner.failures == 0


def test_all_code_of_the_pages_is_run():
    kinds = {
        (page.stem, kind)
        for page in PAGES
        for kind in re.findall(
            r"^```(?!\{toctree|\{include|\{literalinclude|$)(.+)$",
            page.read_text(encoding="utf-8"),
            re.MULTILINE,
        )
    }
    assert {kind for _, kind in kinds} <= {"python", "{doctest}"}
    assert {page for page, kind in kinds if kind == "python"} == {
        "training",
        "around",
        "torch",
    }


def test_the_architecture_page_lists_the_rooms_as_they_are():
    rows = re.findall(
        r"^\| `(\w+)` \| .+? \|(.*)\|$",
        (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    listed = {room: set(re.findall(r"`(\w+)`", uses)) for room, uses in rows}
    # "fastbn" is what users see, for which tests/test_architecture.py writes "".
    assert listed == {
        room: {each or "fastbn" for each in allowed} for room, allowed in ALLOWED.items()
    }


def test_the_way_of_a_call_is_drawn_as_it_is_told():
    pytest.importorskip("matplotlib")
    drawn = [hop for _, hop, _ in runpy.run_path(str(ROOT / "docs" / "draw.py"))["WAY"]]
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert re.findall(r"^\d+\. \*\*(.+?)\*\*", page, re.MULTILINE) == drawn
    assert len(drawn) <= 12


def test_the_tree_lists_each_file_of_the_package():
    tree = (
        (ROOT / "CONTRIBUTING.md")
        .read_text(encoding="utf-8")
        .partition("```\nfastbn/\n")[2]
        .partition("\ntests/")[0]
    )
    listed, folder = [], ""
    for line in tree.splitlines():
        indent, names, purpose = re.fullmatch(r"( +)([\w./]+(?:, [\w.]+)*) +(\S.*)", line).groups()
        assert purpose
        if names.endswith("/"):
            folder = names
        else:
            listed += [(folder if len(indent) == 4 else "") + name for name in names.split(", ")]
    package = ROOT / "fastbn"
    there = {
        str(path.relative_to(package))
        for suffix in ("py", "pyx", "pxd", "pxi", "hpp")
        for path in package.rglob(f"*.{suffix}")
    } - {f"{folder.name}/__init__.py" for folder in package.iterdir()}
    assert sorted(listed) == sorted(there)


@pytest.mark.parametrize("page", GALLERY, ids=lambda page: page.stem)
def test_a_page_of_the_gallery_holds_its_claims(page):
    assert len(re.findall(r"^ *assert ", page.read_text(encoding="utf-8"), re.MULTILINE)) >= 2
