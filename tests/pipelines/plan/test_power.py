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
    gain, margin, exports = checks(demo())
    assert gain == Check(
        "gate",
        "ok",
        "with 200 questions of heldout_choice, a gain of 8.7 points is found 80 % of the time, if "
        "20 % of the answers change",
    )
    assert margin.verdict == "ok"
    assert margin.words.startswith("heldout_exact needs 172 samples")
    assert exports.verdict == "ok"
    assert exports.words == (
        "an export that lost nothing needs 34 rows to be published 90 % of the time "
        "(gate.max_regression 0.1, if 10 % of the answers change), and each export answers 36"
    )


@pytest.mark.parametrize(
    ("assignments", "verdict", "words", "advice"),
    [
        (
            ["gate.max_regression=0.05"],
            "warn",
            "an export that lost nothing needs 108 rows",
            "set quantize.num_benchmark_rows to 108, or set a higher gate.max_regression",
        ),
        (
            ["gate.max_regression=0.02"],
            "warn",
            "every export will be held: 36 rows cannot exclude a loss of 0.04",
            "and prepare.heldout.max_rows to",
        ),
        (["quantize.num_benchmark_rows=0"], "ok", "so no export is held for a worse score", ""),
        (["prepare.heldout.max_rows=20"], "warn", "and each export answers 20", ""),
    ],
)
def test_rows_with_which_exports_are_held(
    assignments: list[str], verdict: str, words: str, advice: str
) -> None:
    found = checks(demo(*assignments))[-1]
    assert found.verdict == verdict
    assert words in found.words and advice in found.advice


def test_a_run_without_exports_says_nothing_of_them() -> None:
    none = demo("quantize.gguf=[]", "quantize.gptq=[]")
    assert not any("export" in check.words for check in checks(none))


def test_a_margin_that_the_samples_cannot_exclude() -> None:
    (_, margin, _) = checks(demo("gate.max_regression=0.05"))
    assert margin.verdict == "warn"
    assert "heldout_exact needs 686 samples" in margin.words
    assert margin.words.endswith("heldout_exact has at most 200")
    assert "raise prepare.heldout.max_rows" in margin.advice


def guards_of(loaded: Recipe) -> Check:
    (found,) = [check for check in checks(loaded) if "guards need" in check.words]
    return found


def test_a_limit_bounds_every_task() -> None:
    limited = recipe("evaluate.limit=500", "gate.max_regression=0.05")
    margin = guards_of(limited)
    assert margin.verdict == "ok"
    assert margin.words.startswith("2 guards need 343 samples each")
    margin = guards_of(recipe("evaluate.limit=300", "gate.max_regression=0.05"))
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
