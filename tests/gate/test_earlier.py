"""What the gate says of the base model with examples, of the last model, and of many attempts."""

import re
from pathlib import Path

import numpy as np
import pytest
from gate_scores import accuracies, gate, write_scores
from small_records import new_merge

from tuneline import verdict
from tuneline.artifacts import Decision
from tuneline.errors import TaskError
from tuneline.records.earlier import Attempt, EarlierRuns, Evaluated

BASE = {"quiz": accuracies(1, 0.3)}


def run(
    root: Path,
    tuned: np.ndarray,
    *,
    earlier: EarlierRuns | None = None,
    prompted: np.ndarray | None = None,
) -> Decision:
    """Decide on a tuned model; `earlier` is what earlier runs measured."""
    shown = None if prompted is None else {"quiz": prompted}
    write_scores(root / "base", "base", BASE, prompted=shown)
    write_scores(root / "tuned", "tuned", {"quiz": tuned})
    path = None
    if earlier is not None:
        path = root / "earlier"
        path.write_text(earlier.sealed())
    return gate(root, earlier=path)


def left_by(root: Path) -> Evaluated:
    """Return what the run in a directory leaves for the next one."""
    return Evaluated.parse((root / "decision" / "evaluated.json").read_text())


def after(root: Path) -> EarlierRuns:
    return EarlierRuns(published=left_by(root))


def test_a_worse_retraining_is_held(tmp_path: Path) -> None:
    run(tmp_path / "1", accuracies(2, 0.9))
    second = run(tmp_path / "2", accuracies(3, 0.6), earlier=after(tmp_path / "1"))
    assert [item.role for item in second.comparisons] == ["target", "published"]
    assert second.verdict == "hold"
    reason = r"the model published last is better: quiz 89 %, but 60 % now \(-\d\d points, 95 % "
    assert re.match(reason, second.reason)
    assert verdict.decide(second.comparisons, verdict.rule_of(second)) == ("hold", second.reason)
    alone = run(tmp_path / "3", accuracies(3, 0.6))
    assert alone.verdict == "promote"


def test_a_retraining_that_is_as_good_is_promoted(tmp_path: Path) -> None:
    run(tmp_path / "1", accuracies(2, 0.7))
    second = run(tmp_path / "2", accuracies(3, 0.7), earlier=after(tmp_path / "1"))
    assert second.verdict == "promote"
    assert second.comparisons[1].base == pytest.approx(accuracies(2, 0.7).mean())


def test_a_model_of_other_questions_is_not_compared(tmp_path: Path) -> None:
    write_scores(tmp_path / "1/base", "base", {"quiz": accuracies(1, 0.3, size=150)})
    write_scores(tmp_path / "1/tuned", "tuned", {"quiz": accuracies(2, 0.9, size=150)})
    gate(tmp_path / "1")
    second = run(tmp_path / "2", accuracies(3, 0.6), earlier=after(tmp_path / "1"))
    assert [item.role for item in second.comparisons] == ["target"]
    assert second.remarks == [
        "The model published last was measured on other questions of quiz, so it was not compared "
        "with this one"
    ]


def test_a_loss_that_merging_does_not_explain_is_said(tmp_path: Path) -> None:
    write_scores(tmp_path / "base", "base", BASE)
    write_scores(tmp_path / "tuned", "tuned", {"quiz": accuracies(2, 0.9)})
    losses = {"trained_eval_loss": 1.0, "num_eval_tokens": 1000, "mean_kl": 1e-6}
    for name, loss, num_remarks in (("same", 1.001, 0), ("other", 1.5, 1)):
        (tmp_path / name).mkdir()
        new_merge(eval_loss=loss, **losses).write(tmp_path / name)
        decision = gate(tmp_path, merged=tmp_path / name)
        assert len(decision.remarks) == num_remarks
        assert decision.verdict == "promote"
        (tmp_path / "decision").rename(tmp_path / f"decision-{name}")
        (tmp_path / "summary.md").unlink()
    assert decision.remarks[0].startswith("the merged model's loss on training's evaluation rows")


def test_other_weights_are_not_compared(tmp_path: Path) -> None:
    """Another tokenizer splits the same answers into other numbers of tokens."""
    run(tmp_path / "1", accuracies(2, 0.9))
    last = left_by(tmp_path / "1")
    changed = last.targets["quiz"].model_copy(update={"weights": [2.0] * 200})
    earlier = EarlierRuns(published=last.model_copy(update={"targets": {"quiz": changed}}))
    second = run(tmp_path / "2", accuracies(3, 0.6), earlier=earlier)
    assert [item.role for item in second.comparisons] == ["target"]
    assert "other questions of quiz" in second.remarks[0]


def test_attempts_on_the_same_questions_are_counted(tmp_path: Path) -> None:
    first = run(tmp_path / "1", accuracies(2, 0.7))
    assert first.remarks == []
    run(tmp_path / "2", accuracies(3, 0.7), earlier=after(tmp_path / "1"))
    # A run that was held on this machine counts too, and one of other questions does not.
    held = Attempt(model="f" * 16, ids_sha256=left_by(tmp_path / "2").attempts[0].ids_sha256)
    other = Attempt(model="e" * 16, ids_sha256={"quiz": "0" * 64})
    earlier = EarlierRuns(published=left_by(tmp_path / "2"), attempts=[held, other])
    third = run(tmp_path / "3", accuracies(4, 0.7), earlier=earlier)
    (remark,) = third.remarks
    assert remark.startswith("4 models were measured on these questions, this one included.")
    assert "would be up to 10%" in remark
    assert len(left_by(tmp_path / "3").attempts) == 4


def test_the_same_model_again_is_no_further_attempt(tmp_path: Path) -> None:
    run(tmp_path / "1", accuracies(2, 0.7))
    again = run(tmp_path / "2", accuracies(2, 0.7), earlier=after(tmp_path / "1"))
    assert again.remarks == [] and again.verdict == "promote"


def test_why_the_last_model_is_unknown_is_said(tmp_path: Path) -> None:
    found = run(tmp_path / "1", accuracies(2, 0.7), earlier=EarlierRuns(remark="Cannot be read"))
    assert found.remarks == ["Cannot be read"]


@pytest.mark.parametrize(
    ("share", "says"),
    [
        (0.4, "the tuned model, which sees none, is better"),
        (0.69, "that the tuned model, which sees none, is better is not shown"),
        (0.95, "the tuned model, which sees none, is worse"),
    ],
)
def test_what_prompting_alone_gives_is_said(tmp_path: Path, share: float, says: str) -> None:
    found = run(tmp_path, accuracies(2, 0.7), prompted=accuracies(5, share))
    assert found.verdict == "promote"
    assert [item.role for item in found.comparisons] == ["target", "prompted"]
    (remark,) = found.remarks
    assert remark.startswith("quiz: with 8 training rows in its prompt, the base model scores ")
    assert f"scores {100 * found.comparisons[1].base:.0f}" in remark and says in remark
    assert " points, 95 % interval [" in remark
    summary = (tmp_path / "summary.md").read_text()
    assert "| quiz, base model with 8 training rows in its prompt | prompted |" in summary


def test_other_samples_with_examples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="are not those of the tuned model"):
        run(tmp_path, accuracies(2, 0.7), prompted=accuracies(5, 0.5, size=100))
