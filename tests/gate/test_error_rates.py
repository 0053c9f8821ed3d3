"""The errors of the gate in 2,000 simulated runs of each kind, beside what it promises.

The seeds are fixed. `tests/measure/gate_errors.py` prints the rates.
"""

import zlib

import pytest
from gate_simulation import (
    MARGIN,
    Draws,
    exports_passed,
    guards,
    promoted,
    targets_without_gain,
)

KINDS = targets_without_gain()
MAX_ERROR = 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_without_a_gain_is_rarely_promoted(kind: str) -> None:
    task = KINDS[kind](Draws(zlib.crc32(kind.encode())))
    assert promoted((task, "target")) <= MAX_ERROR


@pytest.mark.parametrize("num_targets", [2, 5])
def test_every_one_of_several_targets_has_to_improve(num_targets: int) -> None:
    draws = Draws(num_targets)
    better = [(draws.answers(200, gain=0.2, share=0.3), "target") for _ in range(num_targets - 1)]
    assert promoted(*better, (draws.answers(200), "target")) <= MAX_ERROR
    assert promoted(*better) > 0.95


@pytest.mark.parametrize("num_guards", [1, 5, 20])
@pytest.mark.parametrize("size", [20, 100, 500])
def test_twice_the_allowed_loss_on_one_guard_is_rarely_passed(num_guards: int, size: int) -> None:
    rate = guards(Draws(size), num_guards=num_guards, size=size, losses=1, loss=2 * MARGIN)
    assert rate <= MAX_ERROR


@pytest.mark.parametrize("size", [60, 100, 200, 1000])
@pytest.mark.parametrize("share", [0.05, 0.1])
def test_rare_harms_on_a_guard_with_weights_are_rarely_passed(size: int, share: float) -> None:
    draws = Draws(size)
    target = draws.answers(200, gain=0.2, share=0.3)
    guard = draws.rare_harms(size, share, gain=-MARGIN)
    assert promoted((target, "target"), (guard, "guard")) <= MAX_ERROR + 0.01


@pytest.mark.parametrize("num_guards", [1, 5, 20])
@pytest.mark.parametrize("size", [100, 500])
def test_the_allowed_loss_on_all_guards_is_rarely_passed(num_guards: int, size: int) -> None:
    rate = guards(Draws(size), num_guards=num_guards, size=size, losses=num_guards, loss=MARGIN)
    # A loss equal to the margin is the border of what has to be excluded. The nominal rate is 5 %;
    # the score interval of 100 questions is slightly narrow, and 2,000 runs leave 0.5 % of chance.
    assert rate <= 0.065


@pytest.mark.parametrize("size", [20, 50, 200, 1000])
@pytest.mark.parametrize("share", [0.1, 0.2, 0.4])
def test_an_export_with_twice_the_allowed_loss_is_rarely_passed(size: int, share: float) -> None:
    rate = exports_passed(Draws(size), size=size, share=share, loss=2 * MARGIN)
    # The nominal rate is 5 %, and 2,000 runs leave 0.5 % of chance.
    assert rate <= MAX_ERROR + 0.01


@pytest.mark.parametrize(
    ("size", "share", "held"),
    [(50, 0.02, 0.10), (50, 0.05, 0.22), (200, 0.05, 0.01), (200, 0.1, 0.03), (1000, 0.2, 0.005)],
)
def test_an_export_that_lost_nothing_is_rarely_held(size: int, share: float, held: float) -> None:
    assert exports_passed(Draws(size), size=size, share=share, loss=0.0) >= 1 - held
