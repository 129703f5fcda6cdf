"""Random calls against the reference, always the same ones; `fuzz.py` runs others, and more."""

import pytest
from fuzz import fuzz

import fastbn


def test_two_thousand_random_calls_give_what_the_reference_gives():
    failed, cases, calls = fuzz(seed=15, first=0, calls=2000)
    assert not failed, "\n".join([f"{len(failed)} of {cases} cases", *failed[:5]])
    assert calls >= 2000


@pytest.mark.parametrize("name", ["batch_norm", "batch_norm_inference", "normalize"])
def test_a_value_that_is_off_by_four_eps_is_found(monkeypatch, name):
    function = getattr(fastbn, name)

    def wrong(*arguments, **options):
        results = function(*arguments, **options)
        y = results if name == "batch_norm_inference" else results[0]
        if y.size and y.dtype == "f4":
            largest = abs(y).max(initial=1)
            y[(0,) * y.ndim] += 4 * 2.0**-23 * largest
        return results

    monkeypatch.setattr(fastbn, name, wrong)
    failed, _, _ = fuzz(seed=15, first=0, calls=300)
    assert any("AssertionError: y" in each for each in failed)
