"""Which exports the gate holds, and why."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gate_scores import TUNED_PARENT, accuracies, write_scores
from small_records import new_export, scored

from tuneline.artifacts import Decision, ExportVerdict, QuantizedModel
from tuneline.errors import TaskError
from tuneline.gate import GateConfig
from tuneline.gate.run import run
from tuneline.html.markdown import escape_markdown
from tuneline.record import Ancestor
from tuneline.seals import sealed_json
from tuneline.verdict import wrong_verdict
from tuneline.verify import verify


def decide(
    root: Path, *exports: dict[str, Any], merged: str = "c" * 64, **config: object
) -> Decision:
    """Decide on a tuned model that is better than its base, and on exports of it.

    Args:
        root: an empty directory.
        exports: values of the exports' records.
        merged: hash of the merged model that the exports were made from.
        config: the `gate` section of a recipe.
    """
    base = accuracies(1, 0.3)
    write_scores(root / "base", "base", {"quiz": base})
    write_scores(root / "tuned", "tuned", {"quiz": np.ones_like(base)}, parent=TUNED_PARENT)
    paths = []
    for number, values in enumerate(exports):
        paths.append(root / f"export{number}")
        paths[-1].mkdir()
        record = new_export(**values, made_from={"merged": Ancestor(sha256=merged)})
        text = record.model_dump_json(indent=2)
        (paths[-1] / QuantizedModel.filename).write_text(sealed_json(json.loads(text)))
    return run(
        GateConfig(**config),
        base_scores_dir=root / "base",
        tuned_scores_dir=root / "tuned",
        decision_dir=root / "decision",
        exports_dirs=[str(path) for path in paths],
        summary_path=root / "summary.md",
    )


def on(root: Path, values: dict[str, Any], **config: object) -> ExportVerdict:
    (found,) = decide(root, values, **config).exports
    return found


def test_one_export_is_held_and_the_model_and_the_others_go_on(tmp_path: Path) -> None:
    decision = decide(
        tmp_path,
        {"format": "q8_0", **scored(200, losses=2, gains=2)},
        {"format": "q4_0", **scored(200, losses=30, gains=5)},
        {"format": "q2_k"},
    )
    assert decision.verdict == "promote"
    assert [(each.format, each.verdict) for each in decision.exports] == [
        ("q8_0", "promote"),
        ("q4_0", "hold"),
        ("q2_k", "promote"),
    ]
    assert list(decision.held_exports()) == ["q4_0"]
    first, second, third = decision.exports
    assert first.comparison is not None and second.comparison is not None
    assert (second.comparison.base, second.comparison.tuned) == (0.8, 0.675)
    assert second.comparison.num_changed == 35
    assert second.reason.startswith("heldout_choice -0.125 acc, 95 % interval [")
    assert "answers worse than the merged model by gate.max_regression (0.05)" in second.reason
    assert third.comparison is None and "were not compared" in third.reason
    summary = (tmp_path / "summary.md").read_text()
    assert f"| q4_0 | hold | {escape_markdown(second.reason)} |" in summary


def test_an_export_on_too_few_rows_is_held_and_the_number_is_named(tmp_path: Path) -> None:
    found = on(tmp_path, scored(20, losses=0))
    assert found.verdict == "hold"
    assert "a loss of 0.1 (2 x gate.max_regression) against the merged model" in found.reason
    assert "20 were measured: raise quantize.num_benchmark_rows" in found.reason


@pytest.mark.parametrize(("margin", "verdict"), [(0.05, "hold"), (0.1, "promote")])
def test_the_margin_is_that_of_the_gate(tmp_path: Path, margin: float, verdict: str) -> None:
    values = scored(200, losses=16, gains=2)
    assert on(tmp_path, values, max_regression=margin).verdict == verdict


def test_one_question_asked_often_is_one_question(tmp_path: Path) -> None:
    alone, together = scored(200, losses=8), scored(200, losses=8)
    together |= scored(200, losses=8, clusters=[number // 8 for number in range(200)])
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert on(tmp_path / "a", alone).verdict == "promote"
    found = on(tmp_path / "b", together)
    assert found.verdict == "hold"
    assert found.comparison is not None and found.comparison.num_clusters == 25


def test_an_export_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="q8_0 was made from the merged model ffffffffffff, but"):
        decide(tmp_path, scored(200, losses=0), merged="f" * 64)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"benchmark_score": 0.9}, "states the score 0.9 on 200 rows, but has answers to 200"),
        ({"num_benchmark_rows": 199}, "on 199 rows, but has answers to 200"),
        ({"benchmark_answers": None}, "has a score without the answers behind it"),
    ],
)
def test_answers_that_do_not_give_the_score_are_refused(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(TaskError, match=words):
        decide(tmp_path, {**scored(200, losses=0), **change})


def test_a_held_export_that_is_changed_to_promote_is_found(tmp_path: Path) -> None:
    decision = decide(tmp_path, scored(200, losses=40))
    assert wrong_verdict(decision) == ""
    assert not any(found.differences for found in verify(tmp_path / "decision"))
    path = tmp_path / "decision" / Decision.filename
    values = json.loads(path.read_text())
    values["exports"][0]["verdict"] = "promote"
    path.write_text(sealed_json(values))
    (found,) = verify(tmp_path / "decision")
    (sentence,) = found.differences
    assert "says promote of the export q8_0, but by its own comparisons" in sentence


def test_a_decision_on_another_export_is_found(tmp_path: Path) -> None:
    decide(tmp_path, scored(200, losses=1))
    path = tmp_path / "export0" / QuantizedModel.filename
    values = json.loads(path.read_text())
    path.write_text(sealed_json({**values, "generated": "another"}))
    found = {each.path.name: each.differences for each in verify(tmp_path)}
    (sentence,) = found["decision"]
    assert sentence.startswith("made on the export q8_0 with the record ")
    assert sentence.endswith("which is not here")
