"""What the directory of a local run tells: its state, its steps, its logs, what is kept."""

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest
from killed import killed_in

from tuneline.artifacts import new_directory
from tuneline.pipelines.catalog import find_recipe
from tuneline.pipelines.finetune import finetune
from tuneline.pipelines.local.attempt import kept
from tuneline.pipelines.local.run_dir import (
    NEVER_CACHED,
    LocalRun,
    Start,
    find_local_run,
    local_runs,
    remove_partial_artifacts,
    set_events_aside,
)
from tuneline.pipelines.local.watch import read_events
from tuneline.runtime.events import step_runs
from tuneline.runtime.scratch import scratch_directory
from tuneline.steps import STEPS

LOG = """\
18:01:18.016 - INFO - Running pipeline: \x1b[95m'tuneline-shop'\x1b[0m
18:01:18.034 - INFO - Executing task \x1b[96m'merge'\x1b[0m
    first attempt
18:01:19.000 - ERROR - Task \x1b[96m'merge'\x1b[0m finished with status \x1b[91mFAILURE\x1b[0m
18:10:16.374 - INFO - Running pipeline: \x1b[95m'tuneline-shop'\x1b[0m
18:10:29.062 - INFO - Executing task \x1b[96m'evaluate'\x1b[0m
18:10:29.062 - INFO - Streamed logs:
            "artifacts": {
                                "format": "prompt-completion",
            "parameterValues": {
                "label": "base",
    scores of the base model
18:11:13.183 - INFO - Task \x1b[96m'evaluate'\x1b[0m finished with status \x1b[92mSUCCESS\x1b[0m
18:15:06.293 - INFO - Executing task \x1b[96m'evaluate-2'\x1b[0m
            "parameterValues": {
                "label": "tuned",
    scores of the tuned model
18:15:54.165 - ERROR - Task \x1b[96m'evaluate-2'\x1b[0m finished with status \x1b[91mFAILURE\x1b[0m
18:15:54.200 - INFO - Executing task \x1b[96m'quantize-gguf'\x1b[0m
                                "format": "f16",
            "parameterValues": {
                "format": "q4_k_m",
    a file
18:16:06.293 - INFO - Executing task \x1b[96m'report'\x1b[0m
                                "format": "f16",
            "parameterValues": {
"""


def event(step: str, what: str, time: float = 0.0, **values: Any) -> dict[str, Any]:
    return {"step": step, "event": what, "time": time, **values}


def finished(step: str, **values: Any) -> list[dict[str, Any]]:
    return [event(step, "started", **values), event(step, "finished", seconds=1.0, **values)]


@pytest.fixture
def run(tmp_path: Path) -> LocalRun:
    directory = tmp_path / "runs" / "shop-1"
    (directory / "artifacts").mkdir(parents=True)
    (directory / "recipe.yaml").write_text("name: shop\n")
    (directory / "run.log").write_text(LOG)
    return LocalRun(directory)


def write(run: LocalRun, events: list[dict[str, Any]]) -> None:
    run.events_path.write_text("".join(json.dumps(each) + "\n" for each in events))


def test_the_log_is_divided_by_steps(run: LocalRun) -> None:
    sections = {section.name: section for section in run.sections()}
    assert list(sections) == ["evaluate base", "evaluate tuned", "quantize-gguf q4_k_m", "report"]
    assert sections["evaluate base"].lines[-1] == "scores of the base model"
    assert [section.status for section in sections.values()] == ["SUCCESS", "FAILURE", "", ""]
    assert [each.name for each in run.sections(of_all_attempts=True)] == ["merge", *sections]


def test_what_did_not_run_but_was_waited_for_came_from_the_cache(run: LocalRun) -> None:
    write(run, [*finished("plan"), *finished("evaluate", part="base"), event("merge", "started")])
    assert run.cached() == ["fetch", "prepare", "train"]
    write(run, [*finished("plan"), *finished("look-up-model")])
    assert run.cached() == []
    write(run, [*finished("report")])
    assert run.cached() == [
        *("fetch", "prepare", "train", "merge", "evaluate tuned", "gate", "evaluate base"),
        "quantize",
    ]


@pytest.mark.parametrize(
    ("exit_code", "events", "state"),
    [
        (0, [], "succeeded"),
        (1, [], "failed"),
        (130, [], "stopped"),
        (143, [], "stopped"),
        # Killed, so that nothing was recorded.
        (None, [event("train", "started")], "stopped"),
        (None, [event("train", "failed", seconds=1, kind="DataError", message="x")], "failed"),
    ],
)
def test_the_state(
    run: LocalRun, exit_code: int | None, events: list[dict[str, Any]], state: str
) -> None:
    Start("shop.yaml", ["a=b"], "subprocess", exit_code=exit_code).write(run.directory)
    write(run, events)
    assert run.state() == state
    with open(run.log_path) as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert run.state() == "running"
    assert run.state() == state


def test_the_next_attempt_removes_what_killed_steps_left(run: LocalRun) -> None:
    tasks = run.directory.parent / "other-1/artifacts/job", run.directory / "artifacts/job"
    for task, opened in (
        (tasks[0] / "merge", new_directory(tasks[0] / "merge/merged")),
        (tasks[1] / "quantize-gguf", scratch_directory(tasks[1] / "quantize-gguf")),
    ):
        (task / "record").mkdir(parents=True)
        killed_in(opened, lambda directory: (directory / "model.safetensors").touch())
    removed = remove_partial_artifacts(run.directory.parent)
    assert sorted(path.parent.name for path in removed) == ["merge", "quantize-gguf"]
    assert [path.name for task in tasks for path in task.glob("*/*")] == ["record", "record"]


def test_a_stopped_training_names_its_checkpoint(
    run: LocalRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TUNELINE_CHECKPOINT_DIR", raising=False)
    monkeypatch.chdir(run.directory.parent.parent)
    progress = event("train", "progress", 11.0, done=12, total=40, note="loss 1")
    write(run, [*finished("prepare"), event("train", "started", 10.0), progress])
    assert "kept: no checkpoint of train, which begins again at its first step" in kept(run)
    checkpoint = run.directory.parent / ".checkpoints" / "abc" / "checkpoint-12"
    checkpoint.mkdir(parents=True)
    (checkpoint.parent / "checkpoint-8").mkdir()
    assert kept(run).splitlines() == [
        "at step: train (12 of 40)",
        "kept: fetch, prepare",
        f"kept: checkpoint after optimizer step 12, in {checkpoint}",
        "continue: tuneline resume runs/shop-1",
    ]


@pytest.mark.parametrize(
    ("uncached", "kept_steps"),
    [([], "fetch, prepare"), (["prepare"], "fetch"), (["all"], "no results yet")],
)
def test_steps_without_cache_are_not_kept_for_a_resumed_run(
    run: LocalRun, uncached: list[str], kept_steps: str
) -> None:
    Start("shop.yaml", [], "subprocess", uncached=uncached).write(run.directory)
    write(run, [*finished("fetch"), *finished("prepare"), event("train", "started", 10.0)])
    assert run.start is not None and run.start.uncached == uncached
    assert f"kept: {kept_steps}" in kept(run).splitlines()


def test_a_run_is_found_by_its_directory_or_its_name(
    run: LocalRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_local_run(str(run.directory)) == run
    monkeypatch.chdir(run.directory.parent.parent)
    assert find_local_run("shop-1") == run
    assert find_local_run("shop-2") is None
    assert local_runs(Path("runs")) == [run]


def test_each_attempt_has_its_own_events(run: LocalRun) -> None:
    for number in (1, 2):
        write(run, finished(f"step{number}"))
        set_events_aside(run)
        assert not run.events_path.exists()
    aside = run.events_path.with_name("events-2.jsonl")
    assert read_events(aside)[0]["step"] == "step2"


def test_the_time_left_is_counted_from_the_first_progress() -> None:
    events = [event("train", "started", 0.0)]
    (train,) = step_runs(events)
    assert train.seconds_left(50.0) is None
    events.append(event("train", "progress", 100.0, done=0, total=10))
    (train,) = step_runs(events)
    assert train.seconds_left(101.0) is None
    events.append(event("train", "progress", 120.0, done=4, total=10))
    (train,) = step_runs(events)
    # 5 s per step, without the 100 s in which the model was loaded.
    assert train.seconds_left(120.0) == pytest.approx(30.0)
    assert train.seconds_left(140.0) == pytest.approx(10.0)
    assert train.seconds_left(150.0) is None
    events.append(event("train", "progress", 150.0, done=10, total=10))
    (train,) = step_runs(events)
    assert train.seconds_left(150.0) is None


@pytest.mark.parametrize(
    ("since", "last", "now"),
    # 100 s back before the second progress, and after it.
    [(100.0, 20.0, 25.0), (100.0, 120.0, 20.0)],
)
def test_after_the_clock_was_set_back_the_time_left_is_unknown(
    since: float, last: float, now: float
) -> None:
    progress = [
        event("train", "progress", time, done=done, total=10)
        for time, done in ((since, 0), (last, 4))
    ]
    (train,) = step_runs([event("train", "started", 50.0), *progress])
    assert train.seconds_left(now) is None


def test_runs_of_one_step_are_told_apart() -> None:
    runs = step_runs(
        [
            event("quantize-gguf", "started", part="q8_0"),
            event("quantize-gguf", "started", part="q4_k_m"),
            event("quantize-gguf", "finished", part="q4_k_m", seconds=2.0),
        ]
    )
    assert [(run.name, run.status) for run in runs] == [
        ("quantize-gguf q8_0", "running"),
        ("quantize-gguf q4_k_m", "finished"),
    ]


def test_what_every_attempt_runs_again_is_what_kfp_must_not_cache() -> None:
    pipeline = finetune(find_recipe("demo", []), on_cluster=False).pipeline_spec
    dags = [pipeline.root.dag, *(each.dag for each in pipeline.components.values())]
    uncached = {
        name
        for dag in dags
        for name, task in dag.tasks.items()
        if name in STEPS and not task.caching_options.enable_cache
    }
    assert uncached == set(NEVER_CACHED)


def test_versions_of_packages_are_part_of_the_cache_key() -> None:
    spec = finetune(
        find_recipe("demo", []), on_cluster=False, versions_of=lambda name: f"{name} 1.0"
    ).pipeline_spec
    executors = spec.deployment_spec["executors"]
    found = {
        name.removeprefix("exec-"): [
            (entry["name"], entry["value"]) for entry in executor["container"]["env"]
        ]
        for name, executor in executors.items()
    }
    assert "train" in found and "quantize-gptq" in found
    for name, environment in found.items():
        step = STEPS.get(name) or STEPS[name.rpartition("-")[0]]
        assert environment == [("TUNELINE_VERSIONS", f"{step.image} 1.0")]
