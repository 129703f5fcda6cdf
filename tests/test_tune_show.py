"""What is shown of a search while it runs."""

import re

import pytest
from tune_objectives import bowl, space, steps

from fastbn.tune import search

pytest.importorskip("optuna")
pytest.importorskip("rich")


def test_a_line_for_each_trial(capsys):
    search(bowl, space, trials=12)
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert len(lines) == 12
    for count, text in enumerate(lines, 1):
        assert text.startswith(f"{count:2}/12  trial {count - 1}  round {1 + (count > 6)}  compl")
    assert re.search(r"  0\.\d+  lr=\S+ momentum=0\.9\d+ units=\d kind=[ab3]$", lines[0])


def test_a_live_table_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    search(steps, space, trials=12)
    out = capsys.readouterr().out
    assert "12 of 12 trials" in out
    assert re.search(r"\d+ of 12 trials, about 0 min \d+ s left", out)
    for word in ("best", "momentum", "running", "pruned"):
        assert word in out
    assert "1/12  trial" not in out
