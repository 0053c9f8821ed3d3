"""What `plan` says that the gate can find, against simulated gates."""

import pytest
from gate_simulation import MARGIN, Draws, Task, exports_passed, guards, promoted

from tuneline.gate.power import (
    SHARE_CHANGED_BY_EXPORTS,
    least_effect,
    least_gain,
    least_rows_for_exports,
    rows_for_exports,
    samples_for_margin,
)


@pytest.mark.parametrize("size", [50, 100, 200, 500, 1000])
def test_the_least_gain_is_found_four_times_of_five(size: int) -> None:
    gain = least_gain(size)
    rate = promoted((Draws(size).answers(size, gain=gain, share=max(gain, 0.2)), "target"))
    assert rate == pytest.approx(0.8, abs=0.05)


def test_the_least_gain_of_200_questions_is_the_one_in_the_guide() -> None:
    assert least_gain(200) == pytest.approx(0.087, abs=0.001)
    assert least_gain(20) == pytest.approx(0.28, abs=0.01)


@pytest.mark.parametrize("size", [100, 200, 1000])
def test_the_least_effect_is_found_most_of_the_time(size: int) -> None:
    differences = Draws(size).random.normal(least_effect(size), 1, (2000, size))
    # The reserve for harms that were not seen costs a part of the 80 %.
    assert 0.65 < promoted((Task(differences), "target")) < 0.82


@pytest.mark.parametrize("num_guards", [1, 2, 5, 20])
def test_a_model_that_lost_nothing_passes_guards_of_the_size_that_plan_names(
    num_guards: int,
) -> None:
    size = samples_for_margin(MARGIN, num_guards)
    rate = guards(Draws(num_guards), num_guards=num_guards, size=size, losses=0, loss=0.0)
    assert 0.87 < rate < 0.97
    fewer = guards(Draws(num_guards), num_guards=num_guards, size=size // 3, losses=0, loss=0.0)
    assert fewer < 0.6


def test_an_export_that_lost_nothing_passes_on_the_rows_that_plan_names() -> None:
    size, share = rows_for_exports(MARGIN), SHARE_CHANGED_BY_EXPORTS
    assert 0.85 < exports_passed(Draws(1), size=size, share=share, loss=0.0) < 0.95
    assert exports_passed(Draws(1), size=size // 2, share=share, loss=0.0) < 0.65


def test_below_the_least_rows_even_an_equal_export_is_held() -> None:
    least = least_rows_for_exports(MARGIN)
    assert exports_passed(Draws(1), size=least - 1, share=0.0, loss=0.0) == 0.0
    # Student's t makes the bound slightly wider than the normal quantile of the formula.
    assert exports_passed(Draws(1), size=least + 3, share=0.0, loss=0.0) == 1.0
