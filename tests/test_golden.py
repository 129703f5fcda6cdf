"""The same bits as ever: in every variant, at every thread count, on every machine."""

import json

import golden
import pytest

GOLDEN = json.loads(golden.FILE.read_text(encoding="utf-8"))
GROUPS = golden.groups()


@pytest.mark.parametrize("group", GOLDEN)
def test_results_have_the_golden_bits(variant, threads, group):
    if group not in GROUPS:
        pytest.skip("bfloat16 needs ml_dtypes, which is not installed")
    found, expected = golden.hashes(GROUPS[group]), GOLDEN[group]
    assert found.keys() == expected.keys()
    other = {case for case in found if found[case] != expected[case]}
    assert not other, {case: (found[case], expected[case]) for case in sorted(other)[:3]}
