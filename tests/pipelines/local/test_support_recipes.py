"""The shipped examples of customer service: their rows, and the whole line on this machine."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fork_server import fork_tasks

from tuneline.artifacts import RunSummary, TrainingSummary
from tuneline.pipelines.catalog import RECIPES_DIR, find_recipe
from tuneline.pipelines.local.run import run_pipeline
from tuneline.pipelines.local.run_dir import LocalRun, require_local_run
from tuneline.pipelines.local.watch import ARTIFACTS_DIR
from tuneline.prepare.run import run as prepare
from tuneline.prepare.sources import support
from tuneline.records.earlier import RUNS_VARIABLE
from tuneline.runtime.step import EVENTS_VARIABLE
from tuneline.train.checkpoints import ROOT_VARIABLE

RECIPES = sorted(path.stem for path in RECIPES_DIR.glob("support-*.yaml"))
NUM_STEPS, NUM_HELDOUT = 2, 24


def small(base_model: Path) -> dict[str, object]:
    """Return the keys that make a recipe small: its base model, and sizes."""
    return {
        "base_model": base_model,
        "train.max_steps": NUM_STEPS,
        "train.eval_steps": NUM_STEPS,
        "train.sample_tokens": 4,
        "train.global_batch_size": 2,
        "train.micro_batch_size": 2,
        "merge.num_proof_prompts": 4,
        "merge.num_greedy_tokens": 4,
        "prepare.heldout.max_rows": NUM_HELDOUT,
        "prepare.max_eval_rows": 4,
        "evaluate.prompt_rows": 0,
        "evaluate.num_generations": 1,
        "evaluate.max_new_tokens": 4,
    }


def tuneline(*arguments: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tuneline.pipelines.cli.main", *arguments],
        cwd=cwd,
        env={**os.environ, "TUNELINE_RETRY_SECONDS": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", RECIPES)
def test_every_generated_row_is_used_whole_and_no_held_out_row_is_in_training(
    smollm2_dir: Path, tmp_path: Path, name: str
) -> None:
    recipe = find_recipe(name, [], is_local=True)
    done = prepare(
        recipe.prepare,
        source=recipe.data,
        base_model_dir=str(smollm2_dir),
        dataset_dir=str(tmp_path / "dataset"),
        statistics_path=str(tmp_path / "statistics.html"),
    )
    assert done.num_heldout_rows == support.NUM_HELDOUT
    assert (done.num_rejected_rows, done.num_leaking_rows, done.num_overlong_rows) == (0, 0, 0)
    assert done.unused == {} and done.truncated_token_share == 0
    wanted = {"answers": support.NUM_ANSWERS, "preferences": support.NUM_PREFERENCES}
    rows = wanted.get(name.removeprefix("support-"), support.NUM_DOCUMENTS)
    assert done.num_train_rows + done.num_eval_rows == rows


def test_the_rows_are_the_same_in_every_run() -> None:
    for rows in (support.answers, support.preferences, support.documents):
        first = list(rows())
        assert first == list(rows()) != list(rows(1))
        assert len({tuple(row.values()) for row in first}) == len(first)
    languages = [row["language"] for row in support.answers()]
    assert languages.count("en") == languages.count("ko") == len(languages) / 2


@pytest.mark.parametrize("name", RECIPES)
def test_an_example_runs_at_a_small_size(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Run all steps but the exports, which tests/quantize covers and which take most of the time.

    The steps are forks of a process that has imported torch, and run as they do on any machine.
    """
    settings = [f"{key}={value}" for key, value in small(tiny_model_dir).items()]
    target = f"publish_to=dir:{tmp_path / 'published'}"
    recipe = find_recipe(name, [*settings, "quantize.gguf=[]", target], is_local=True)
    for variable in (EVENTS_VARIABLE, RUNS_VARIABLE, ROOT_VARIABLE):
        # Set first, so that what the run sets is undone.
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    fork_tasks(monkeypatch)
    run = LocalRun(tmp_path / "runs" / name)
    run_pipeline(run.directory, recipe, "subprocess", [])
    summary = run.summary()
    assert isinstance(summary, RunSummary)
    assert {each.task for each in summary.comparisons} >= set(recipe.evaluate.tasks)
    assert all(each.num_samples == NUM_HELDOUT for each in summary.comparisons)
    [adapter] = run.directory.glob(f"{ARTIFACTS_DIR}/*/train/adapter")
    trained = TrainingSummary.read(adapter)
    assert (trained.num_steps, trained.method) == (NUM_STEPS, recipe.prepare.method)
    assert (tmp_path / "published").exists() == (summary.verdict == "promote")


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_the_whole_line_runs_on_a_cpu(tiny_model_dir: Path, tmp_path: Path, name: str) -> None:
    settings = small(tiny_model_dir) | {"quantize.num_check_tokens": 4}
    tuneline(
        "run", name, *(f"--set={key}={value}" for key, value in settings.items()), cwd=tmp_path
    )
    [directory] = (tmp_path / "runs").glob("support-*")
    summary = require_local_run(str(directory)).summary()
    assert isinstance(summary, RunSummary)
    assert [export.format for export in summary.exports] == ["q8_0"]
    recipe = find_recipe(name, [], is_local=True)
    assert {each.task for each in summary.comparisons} >= set(recipe.evaluate.tasks)


def test_the_generated_rows_can_be_written_to_a_file(tmp_path: Path) -> None:
    tuneline("recipes", "support-answers", "--data", "answers.csv", cwd=tmp_path)
    with open(tmp_path / "answers.csv", encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file)) == list(support.answers())
