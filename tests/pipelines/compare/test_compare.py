"""Finished runs are compared on the samples that they share, wherever their results are."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gate_scores import write_scores
from small_records import new_training
from typer.testing import CliRunner

from tuneline.artifacts import DatasetManifest, RunSummary, TrainingPoint
from tuneline.errors import UserError
from tuneline.pipelines.cli import main
from tuneline.pipelines.compare.differences import (
    figures,
    recipe_differences,
    remarks,
    score_differences,
)
from tuneline.pipelines.compare.finished import FinishedRun, read_finished
from tuneline.pipelines.compare.page import SCORE_COLUMNS, score_row
from tuneline.pipelines.local.run_dir import LocalRun, Start

NewDataset = Callable[..., DatasetManifest]


def samples(scores: dict[str, float], start: int = 0) -> list[dict[str, Any]]:
    """Rows whose IDs have another number in each run, and the same hash."""
    return [
        {"id": f"{number}-{key}", "score": score}
        for number, (key, score) in enumerate(scores.items(), start)
    ]


def new_run(
    root: Path,
    name: str,
    tasks: dict[str, Any],
    new_dataset: NewDataset,
    *,
    rank: int = 8,
    cache: Path | None = None,
    **scores: Any,
) -> LocalRun:
    """Write the directory of a finished run; `cache` holds its results, as of an earlier run."""
    directory = root / "runs" / name
    pipeline = directory / "artifacts" / "tuneline-x-1"
    kept = cache or pipeline
    write_scores(kept / "evaluate" / "scores", "base", tasks, **scores)
    write_scores(kept / "evaluate-2" / "scores", "tuned", tasks, **scores)
    history = [TrainingPoint(step=step, loss=2.0 / step) for step in (1, 2, 3)]
    (kept / "adapter").mkdir()
    new_training(history=history, final_loss=2.0 / rank).write(kept / "adapter")
    (kept / "dataset").mkdir()
    new_dataset(num_train_rows=100 * rank).write(kept / "dataset")
    records = {}
    for kind, file in (("adapter", "training.json"), ("dataset", "dataset.json")):
        records[kind] = kept / f"{kind}-step" / "record"
        records[kind].parent.mkdir()
        records[kind].write_text((kept / kind / file).read_text())
    summary = pipeline / "report" / "summary"
    summary.mkdir(parents=True)
    RunSummary(recipe="x", verdict="hold", reason="r", comparisons=[], exports=[]).write(summary)
    places = [*records.values(), kept / "evaluate" / "scores", kept / "evaluate-2" / "scores"]
    uris = "\n".join(f'        "uri": "{place}",' for place in places)
    (directory / "run.log").write_text(
        "1 - INFO - Running pipeline: 'x'\n1 - INFO - Executing task 'report'\n"
        f"{uris}\n1 - INFO - Task 'report' finished with status SUCCESS\n"
    )
    (directory / "recipe.yaml").write_text(
        f"name: {name}\ntrain:\n  lora: {{r: {rank}}}\n  seed: 1\n"
    )
    Start("x.yaml", [], "subprocess", exit_code=0).write(directory)
    return LocalRun(directory)


SHARED = {f"q{number}": float(number % 2) for number in range(40)}
BETTER = {key: 1.0 for key in SHARED}


def test_scores_are_paired_by_the_samples_content(tmp_path: Path, new_dataset: NewDataset) -> None:
    own = {"only-a": 0.0}
    first = read_finished(new_run(tmp_path, "a", {"task": samples({**own, **SHARED})}, new_dataset))
    again = dict(reversed(BETTER.items()))
    second = read_finished(
        new_run(
            *(tmp_path, "b", {"task": samples(again, 7), "new": samples(SHARED)}, new_dataset),
            cache=tmp_path / "earlier",
        )
    )
    (found,), remark = score_differences(first, second)
    assert (found.num_common, found.num_samples) == (40, (41, 40))
    assert (found.first, found.second, found.difference) == (0.5, 1.0, 0.5)
    assert 0.3 < found.interval[0] < 0.5 < found.interval[1] < 0.7
    assert found.verdict == "better"
    assert remark == "not compared: new (0 common samples)"
    ((back,), _) = score_differences(second, first)
    assert (back.difference, back.verdict) == (-0.5, "worse")


def test_a_lower_score_may_be_better(tmp_path: Path, new_dataset: NewDataset) -> None:
    runs = [
        read_finished(new_run(tmp_path, name, {"t": samples(scores)}, new_dataset, higher=False))
        for name, scores in (("a", BETTER), ("b", SHARED))
    ]
    ((found,), _) = score_differences(*runs)
    assert (found.difference, found.verdict) == (0.5, "better")
    # The signs that are shown are those of the two scores beside them.
    cells = dict(zip(SCORE_COLUMNS, score_row(found), strict=True))
    shown = [cells[name] for name in ("first", "second", "change")]
    assert shown == ["100 %", "50 %", "-50 points"]
    assert re.fullmatch(r"\[-[56]\d, -[34]\d\]", cells["95 % interval"])
    assert score_row(replace(found, is_fraction=False))[2:5] == ["1.00", "0.50", "-0.5"]


def test_what_differs_is_listed(tmp_path: Path, new_dataset: NewDataset) -> None:
    runs: list[FinishedRun] = [
        read_finished(new_run(tmp_path, name, {"t": samples(SHARED)}, new_dataset, rank=rank))
        for name, rank in (("a", 8), ("b", 16))
    ]
    (rank,) = recipe_differences(runs)
    assert (rank.name, rank.values) == ("train.lora.r", ("8", "16"))
    # Long texts are cut where they begin to differ, which may be far from their beginning.
    long = "당신은 친절한 상담원입니다. " * 20
    changed = [
        replace(run, recipe={"prepare": {"system_prompt": f"{long}{end}" + " 감사합니다." * 9}})
        for run, end in zip(runs, ("짧게", "길게"), strict=True)
    ]
    (prompt,) = recipe_differences(changed)
    assert prompt.values[0].startswith("...") and prompt.values[0].endswith("...")
    assert "짧게" in prompt.values[0] and "길게" in prompt.values[1]
    # An empty mapping is no difference to one with keys, which are differences themselves.
    bounds: list[dict[str, Any]] = [{}, {"q8_0": 5.0}]
    changed = [
        replace(run, recipe={"quantize": {"max_mean_kl": each}, "gate": {}})
        for run, each in zip(runs, bounds, strict=True)
    ]
    (bound,) = recipe_differences(changed)
    assert (bound.name, bound.values) == ("quantize.max_mean_kl.q8_0", ("null", "5.0"))
    assert remarks(runs) == []
    other = replace(runs[1], training=new_training(base_sha256="9" * 64))
    assert "compares models with the same tokenizer only" in remarks([runs[0], other])[0]
    rows = {row.name: row.values for row in figures(runs)}
    assert rows["training rows"] == ("800", "1,600")
    assert rows["last training loss"] == ("0.25", "0.125")


def test_the_command_prints_a_table_and_writes_a_page(
    tmp_path: Path, new_dataset: NewDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_run(tmp_path, "a", {"t": samples(SHARED)}, new_dataset)
    new_run(tmp_path, "b", {"t": samples(BETTER)}, new_dataset, rank=16)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main.app, ["compare", "a", "b"])
    assert done.exit_code == 0, done.output
    assert "b against a:" in done.output and "better" in done.output
    page = (tmp_path / "compare.html").read_text()
    assert (
        "<h1>a and b</h1>" in page
        and "First: a. Second: b." in page
        and "Against a: better on t." in page
        and "Equal in all runs - verdict: hold;" in page
        and "train.lora.r" in page
        and "Training loss" in page
    )

    elsewhere = tmp_path / "other"
    new_run(elsewhere, "a", {"t": samples(SHARED)}, new_dataset)
    for names, message in (
        (["a"], "1 run is named: name 2 to 4"),
        (["a", "runs/a"], "a run is named twice: a runs/a"),
    ):
        assert message in str(CliRunner().invoke(main.app, ["compare", *names]).exception)
    same = CliRunner().invoke(main.app, ["compare", "a", "b", str(elsewhere / "runs" / "a")])
    assert same.exit_code == 0, same.output
    page = (tmp_path / "compare.html").read_text()
    assert f"{elsewhere}/runs/a against {tmp_path}/runs/a" in page

    listed = CliRunner().invoke(main.app, ["runs"])
    assert listed.exit_code == 0 and listed.output.count("hold") == 2


def test_a_run_that_has_not_finished_is_named(
    tmp_path: Path, new_dataset: NewDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(tmp_path, "a", {"t": samples(SHARED)}, new_dataset)
    Start("x.yaml", [], "subprocess", exit_code=143).write(run.directory)
    with pytest.raises(UserError, match="a has not finished .stopped., so it has no scores"):
        read_finished(run)


def test_a_run_of_another_version_is_named(tmp_path: Path, new_dataset: NewDataset) -> None:
    run = new_run(tmp_path, "a", {"t": samples(SHARED)}, new_dataset)
    path = run.summary_path()
    assert path is not None
    path.write_text(json.dumps(json.loads(path.read_text()) | {"new_key": 1}))
    with pytest.raises(UserError, match="a was made with another version of tuneline.*new_key"):
        read_finished(run)
