"""What the gate decides, and why."""

from pathlib import Path

import numpy as np
import pytest
from gate_scores import accuracies, decide

from tuneline import verdict
from tuneline.artifacts import PROMPT_CONTROL, Decision
from tuneline.errors import RecipeError, TaskError
from tuneline.gate import GateConfig
from tuneline.html.markdown import escape_markdown
from tuneline.verify import verify


def changed(size: int, gains: int, losses: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores of base and tuned model that differ in this many answers."""
    base, tuned = np.zeros(size), np.zeros(size)
    tuned[:gains] = 1
    base[gains : gains + losses] = 1
    return base, tuned


def test_equal_scores_hold(tmp_path: Path) -> None:
    scores = {"quiz": accuracies(1, 0.5)}
    decision = decide(tmp_path, scores, scores)
    assert decision.verdict == "hold"
    assert decision.comparisons[0].difference == 0


def test_shuffled_scores_hold_and_the_right_ones_promote(tmp_path: Path) -> None:
    base = accuracies(1, 0.3)
    tuned = np.maximum(base, accuracies(2, 0.6))
    won = decide(tmp_path, {"quiz": base}, {"quiz": tuned})
    assert won.verdict == "promote"
    assert won.comparisons[0].difference == pytest.approx((tuned - base).mean())
    # The same scores dealt out at random to the two models: no model is better.
    swap = np.random.default_rng(5).random(len(base)) < 0.5
    mixed = np.where(swap, base, tuned), np.where(swap, tuned, base)
    held = decide(tmp_path, {"quiz": mixed[0]}, {"quiz": mixed[1]})
    assert held.verdict == "hold"
    assert "the interval includes 0" in held.reason


def test_lower_is_better_is_turned(tmp_path: Path) -> None:
    loss = np.random.default_rng(1).normal(2.0, 0.3, 100)
    decision = decide(tmp_path, {"loss": loss}, {"loss": loss - 0.5}, higher=False)
    assert decision.verdict == "promote"
    assert decision.comparisons[0].difference == pytest.approx(0.5)
    worse = decide(tmp_path, {"loss": loss}, {"loss": loss + 0.5}, higher=False)
    assert worse.verdict == "hold"
    assert worse.comparisons[0].outcome == "worse"


def test_weights_in_the_samples_are_used(tmp_path: Path) -> None:
    # Long answers became better by 1, short ones worse by 1: in tokens, that is better.
    long = np.arange(160) < 80
    weights = np.where(long, 30, 1)

    def rows(scores: np.ndarray) -> list[dict]:
        return [
            {"id": str(number), "score": float(score), "weight": int(weight)}
            for number, (score, weight) in enumerate(zip(scores, weights, strict=True))
        ]

    base, tuned = rows(np.full(160, 2.0)), rows(np.where(long, 1.0, 3.0))
    decision = decide(tmp_path, {"loss": base}, {"loss": tuned}, higher=False)
    assert decision.verdict == "promote"
    assert decision.comparisons[0].difference == pytest.approx((30 - 1) / 31)


def test_a_gain_below_the_least_gain_holds(tmp_path: Path) -> None:
    base, tuned = changed(200, gains=30)
    assert decide(tmp_path, {"quiz": base}, {"quiz": tuned}).verdict == "promote"
    held = decide(tmp_path, {"quiz": base}, {"quiz": tuned}, min_gain=0.12)
    assert held.verdict == "hold"
    assert "gains below gate.min_gain (0.12)" in held.reason


def test_five_changed_answers_are_too_few(tmp_path: Path) -> None:
    base, tuned = changed(400, gains=5)
    held = decide(tmp_path, {"quiz": base}, {"quiz": tuned})
    assert held.comparisons[0].interval[0] > 0
    assert held.verdict == "hold"
    assert "only 5 answers changed" in held.reason


def test_one_question_forty_times_is_one_question(tmp_path: Path) -> None:
    def rows(score: float) -> list[dict]:
        return [{"id": str(n), "score": score, "cluster": "same"} for n in range(40)]

    held = decide(tmp_path, {"quiz": rows(0.0)}, {"quiz": rows(1.0)})
    assert held.verdict == "hold"
    assert "40 samples of 1 different questions" in held.reason


def test_few_samples_decide_nothing(tmp_path: Path) -> None:
    decision = decide(tmp_path, {"quiz": np.zeros(19)}, {"quiz": np.ones(19)})
    assert decision.verdict == "hold"
    assert "19 samples" in decision.reason
    assert decide(tmp_path, {"quiz": np.zeros(20)}, {"quiz": np.ones(20)}).verdict == "promote"
    loss = np.random.default_rng(1).normal(2.0, 0.1, 59)
    held = decide(tmp_path, {"loss": loss}, {"loss": loss - 1.5}, higher=False)
    assert held.verdict == "hold"
    assert "needs 60" in held.reason


class TestGuards:
    target = {"quiz": (np.zeros(200), np.ones(200))}

    def decided(self, tmp_path: Path, guards: dict, **config: object):
        tasks = {**self.target, **guards}
        base = {name: pair[0] for name, pair in tasks.items()}
        tuned = {name: pair[1] for name, pair in tasks.items()}
        return decide(tmp_path, base, tuned, target_tasks=("quiz",), **config)

    def test_harm_has_to_be_excluded_and_not_only_to_be_unproven(self, tmp_path: Path) -> None:
        # Nothing shows that 100 questions with 10 gains and 10 losses got worse or did not.
        held = self.decided(tmp_path, {"other": changed(100, 10, 10)})
        assert held.verdict == "hold"
        assert held.reason.startswith("other +0.000 acc")
        assert "a loss of 0.05 (gate.max_regression) is not excluded" in held.reason
        assert "needs about 7" in held.reason and "100 were measured" in held.reason
        assert self.decided(tmp_path, {"other": changed(1000, 100, 100)}).verdict == "promote"

    def test_one_that_got_worse(self, tmp_path: Path) -> None:
        held = self.decided(tmp_path, {"other": changed(500, 0, 60)})
        assert held.verdict == "hold"
        assert held.reason.startswith("other -0.120")
        assert "got worse" in held.reason
        allowed = self.decided(tmp_path, {"other": changed(500, 0, 60)}, max_regression=0.3)
        assert allowed.verdict == "promote"
        assert "above -0.1" in allowed.reason

    def test_one_of_several_may_lose_more_than_the_mean(self, tmp_path: Path) -> None:
        guards = {f"g{number}": changed(1000, 50, 50) for number in range(4)}
        kept = self.decided(tmp_path, {**guards, "g4": changed(1000, 20, 80)})
        assert kept.verdict == "promote"
        assert "the mean of 5 guards -0.012" in kept.reason
        held = self.decided(tmp_path, {**guards, "g4": changed(1000, 0, 100)})
        assert held.verdict == "hold"
        assert held.reason.startswith("g4")

    def test_the_mean_of_all(self, tmp_path: Path) -> None:
        guards = {f"g{number}": changed(1000, 20, 70) for number in range(3)}
        held = self.decided(tmp_path, guards)
        assert held.verdict == "hold"
        assert held.reason.startswith("the mean of 3 guards (g0, g1, g2) is -0.050")

    def test_tasks_over_the_same_rows_are_not_independent(self, tmp_path: Path) -> None:
        # The bound of their mean is the mean of their bounds: they say the same thing twice.
        scores = changed(1000, 20, 50)
        same = {f"heldout_{name}": scores for name in ("choice", "exact")}
        other = {f"other_{name}": scores for name in ("choice", "exact")}
        held = self.decided(tmp_path, same, max_regression=0.042)
        assert held.verdict == "hold"
        assert held.reason.startswith("the mean of 2 guards")
        assert f"above {held.comparisons[1].lower:+.3f}" in held.reason
        assert self.decided(tmp_path, other, max_regression=0.042).verdict == "promote"

    def test_no_loss_at_all_cannot_be_asked_for(self) -> None:
        with pytest.raises(RecipeError, match="no number of samples proves"):
            GateConfig.parse({"max_regression": 0})


class TestGroups:
    groups = {"kobest": ["kobest_boolq", "kobest_copa"]}

    def test_a_group_is_the_weighted_mean_of_its_tasks(self, tmp_path: Path) -> None:
        boolq, copa = changed(300, 45), changed(100, 0, 5)
        decision = decide(
            tmp_path,
            {"kobest_boolq": boolq[0], "kobest_copa": copa[0]},
            {"kobest_boolq": boolq[1], "kobest_copa": copa[1]},
            groups=self.groups,
            target_tasks=("kobest",),
        )
        assert decision.verdict == "promote"
        first, *members = decision.comparisons
        assert (first.task, first.role, first.num_samples) == ("kobest", "target", 400)
        assert first.difference == pytest.approx((45 - 5) / 400)
        assert {(item.task, item.role) for item in members} == {
            ("kobest_boolq", "member"),
            ("kobest_copa", "member"),
        }

    def test_a_group_is_one_guard(self, tmp_path: Path) -> None:
        scores = {"kobest_boolq": accuracies(1, 0.5, 1000), "kobest_copa": accuracies(2, 0.5, 1000)}
        decision = decide(
            tmp_path,
            {"quiz": np.zeros(200), **scores},
            {"quiz": np.ones(200), **scores},
            groups=self.groups,
            target_tasks=("quiz",),
        )
        assert decision.verdict == "promote"
        assert [item.role for item in decision.comparisons].count("guard") == 1

    def test_a_target_that_was_not_evaluated(self, tmp_path: Path) -> None:
        scores = {"kobest_boolq": accuracies(1, 0.5), "kobest_copa": accuracies(2, 0.5)}
        with pytest.raises(TaskError, match=r"names mmlu.*Name tasks among kobest$"):
            decide(tmp_path, scores, scores, groups=self.groups, target_tasks=("mmlu",))


class TestControl:
    """The numbers are those measured with the demo and with its shuffled labels."""

    def decided(self, tmp_path: Path, tuned: float):
        noise = np.random.default_rng(1).normal(0, 0.3, 100)
        return decide(
            tmp_path,
            {"quiz": np.zeros(200), PROMPT_CONTROL: 1.36 + noise},
            {"quiz": np.ones(200), PROMPT_CONTROL: tuned + noise[::-1]},
        )

    def test_a_model_that_no_longer_reads_its_prompts_holds(self, tmp_path: Path) -> None:
        held = self.decided(tmp_path, 0.08)
        assert held.verdict == "hold"
        assert "depends less on its prompts" in held.reason
        assert "answer of the dataset belongs to its prompt" in held.reason

    def test_a_model_that_reads_them_is_promoted(self, tmp_path: Path) -> None:
        won = self.decided(tmp_path, 2.92)
        assert won.verdict == "promote"
        assert [item.role for item in won.comparisons] == ["target", "control"]


def test_perplexity_alone_is_said(tmp_path: Path) -> None:
    loss = np.random.default_rng(1).normal(2.0, 0.3, 100)
    alone = decide(
        tmp_path, {"loss": loss}, {"loss": loss - 0.5}, metric="log_perplexity", higher=False
    )
    assert alone.verdict == "promote"
    assert "rests on perplexity alone" in alone.reason
    held = decide(tmp_path, {"loss": loss}, {"loss": loss}, metric="log_perplexity", higher=False)
    assert held.reason.endswith("only perplexity was measured")
    answers = decide(tmp_path, {"quiz": np.zeros(50)}, {"quiz": np.ones(50)})
    assert "perplexity" not in answers.reason


def test_the_verdict_follows_from_the_record(tmp_path: Path) -> None:
    held = decide(tmp_path, {"quiz": accuracies(1, 0.5)}, {"quiz": accuracies(2, 0.5)})
    forged = held.model_copy(update={"verdict": "promote", "settings": {"min_gain": 0.0}})
    assert verdict.decide(forged.comparisons, verdict.rule_of(forged)) == ("hold", held.reason)


def test_verify_finds_a_verdict_that_was_changed(tmp_path: Path) -> None:
    scores = {"quiz": accuracies(1, 0.5)}, {"quiz": accuracies(2, 0.5)}
    decide(tmp_path, *scores)
    directory = tmp_path / "0/decision"
    assert [found.differences for found in verify(directory)] == [[]]
    path = directory / Decision.filename
    path.write_text(path.read_text().replace('"verdict": "hold"', '"verdict": "promote"'))
    ((seal, difference),) = [found.differences for found in verify(directory)]
    assert seal.startswith("decision.json ")
    assert difference.startswith("decision.json says promote, but by its own comparisons")


def test_the_summary_says_what_the_record_says(tmp_path: Path) -> None:
    decision = decide(tmp_path, {"quiz": np.zeros(50)}, {"quiz": np.ones(50)})
    text = (tmp_path / "0" / "summary.md").read_text()
    assert text.startswith(f"**promote**: {escape_markdown(decision.reason)}\n")
    assert "| quiz | target | acc | 0.0000 | 1.0000 | +1.0000 | [+0.8505, +1.0000] |" in text


def test_a_name_in_the_summary_is_text_only(tmp_path: Path) -> None:
    decide(tmp_path, {"a|b <b>*c*": np.zeros(50)}, {"a|b <b>*c*": np.ones(50)})
    text = (tmp_path / "0" / "summary.md").read_text()
    assert "| a\\|b \\<b\\>\\*c\\* | target | acc |" in text
    assert "**promote**: a\\|b \\<b\\>\\*c\\* +1.000" in text
