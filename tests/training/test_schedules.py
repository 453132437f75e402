"""Schedules in closed form, and what holds for all of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.training.schedules import CYCLES, SCHEDULES

AT = {  # sparsity at progress 0, 1/4, 1/2, 1 on the way to 0.8
    "one-shot": (0.8, 0.8, 0.8, 0.8),
    "linear": (0.0, 0.2, 0.4, 0.8),
    "cubic": (0.0, 0.8 * 37 / 64, 0.7, 0.8),
    "iterative": (0.0, 1 - 0.2**0.25, 1 - 0.2**0.5, 0.8),
    "cyclic": (0.0, 0.8 * (1 - 0.25**3), 0.7, 0.8),
    "alternating": (0.0, 0.0, 0.8, 0.8),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_by_hand(name):
    assert [SCHEDULES[name](t, 0.8) for t in (0.0, 0.25, 0.5, 1.0)] == pytest.approx(list(AT[name]))


@given(st.sampled_from(sorted(SCHEDULES)), st.floats(0, 1), st.floats(0, 0.99))
def test_between_nothing_and_the_target_which_is_met_in_the_end(name, progress, final):
    assert 0 <= SCHEDULES[name](progress, final) <= final + 1e-12
    assert SCHEDULES[name](1.0, final) == pytest.approx(final, abs=1e-12)


@given(
    st.sampled_from(["one-shot", "linear", "cubic", "iterative"]), st.floats(0, 1), st.floats(0, 1), st.floats(0, 0.99)
)
def test_those_that_never_give_back(name, one, other, final):
    early, late = sorted((one, other))
    assert SCHEDULES[name](early, final) <= SCHEDULES[name](late, final) + 1e-12


def test_cycles_start_from_nothing():
    assert SCHEDULES["cyclic"](1 / CYCLES + 1e-9, 0.9) < 1e-6
    assert SCHEDULES["cyclic"](1 / CYCLES - 1e-9, 0.9) > 0.89
