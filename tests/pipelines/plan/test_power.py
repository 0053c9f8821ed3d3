"""What plan says about the gate before anything is measured."""

import pytest
from plan_cases import recipe

from tuneline.pipelines.catalog import find_recipe
from tuneline.pipelines.plan.check import Check
from tuneline.pipelines.plan.power import check_power
from tuneline.recipe import Recipe


def demo(*assignments: str) -> Recipe:
    return find_recipe("demo", list(assignments))


def checks(loaded: Recipe) -> list[Check]:
    return list(check_power(loaded))


def test_the_gain_and_the_margin_of_the_demo() -> None:
    gain, margin = checks(demo())
    assert gain == Check(
        "gate",
        "ok",
        "with 200 questions of heldout_choice, a gain of 8.7 points is found 80 % of the time, if "
        "20 % of the answers change",
    )
    assert margin.verdict == "ok"
    assert margin.words.startswith("heldout_exact needs 172 samples")


def test_a_margin_that_the_samples_cannot_exclude() -> None:
    (_, margin) = checks(demo("gate.max_regression=0.05"))
    assert margin.verdict == "warn"
    assert "heldout_exact needs 686 samples" in margin.words
    assert margin.words.endswith("heldout_exact has at most 200")
    assert "raise prepare.heldout.max_rows" in margin.advice


def test_a_limit_bounds_every_task() -> None:
    limited = recipe("evaluate.limit=500", "gate.max_regression=0.05")
    margin = checks(limited)[-1]
    assert margin.verdict == "ok"
    assert margin.words.startswith("2 guards need 343 samples each")
    margin = checks(recipe("evaluate.limit=300", "gate.max_regression=0.05"))[-1]
    assert margin.verdict == "warn"
    assert margin.words.endswith("arc_challenge has at most 300, hellaswag has at most 300")


@pytest.mark.parametrize(
    ("assignments", "says"),
    [
        (["prepare.heldout.max_rows=19"], "heldout_choice has at most 19 samples"),
        (["evaluate.limit=10"], "heldout_choice has at most 10 samples"),
        (
            [
                "prepare.heldout.max_rows=50",
                "evaluate.tasks=[heldout_perplexity]",
                "gate.target_tasks=[]",
            ],
            "the gate holds every model with fewer than 60",
        ),
    ],
)
def test_samples_with_which_every_model_is_held(assignments: list[str], says: str) -> None:
    first = checks(demo(*assignments))[0]
    assert first.verdict == "warn"
    assert says in first.words


def test_perplexity_alone_is_said() -> None:
    words = [check.words for check in checks(recipe())]
    assert any("rest on perplexity alone" in sentence for sentence in words)
    assert not any("perplexity alone" in check.words for check in checks(demo()))
