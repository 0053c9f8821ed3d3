"""The line through its images: minutes, and it needs `make images` before."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tuneline import images
from tuneline.artifacts import RunSummary
from tuneline.pipelines.catalog import find_recipe
from tuneline.pipelines.local.docker import RUN_LABEL, check_images
from tuneline.pipelines.local.watch import read_events
from tuneline.runtime.events import step_runs

# Few steps and rows, one format of each kind: every image, every step, published too.
SMALL = [
    "train.max_steps=8",
    "train.eval_steps=8",
    "prepare.heldout.max_rows=100",
    "evaluate.tasks=[heldout_perplexity]",
    "gate.target_tasks=[heldout_perplexity]",
    "quantize.gguf=[q8_0]",
    "quantize.num_calibration_rows=8",
]
STEPS = {
    "plan", "look-up-model", "look-up-data", "look-up-published", "fetch", "prepare", "train",
    "merge", "evaluate", "convert-gguf", "quantize-gguf", "quantize-gptq", "gate", "publish",
    "report", "diagnose",
}  # fmt: skip


@pytest.mark.docker
def test_a_short_demo_passes_through_every_image(tmp_path: Path) -> None:
    check_images(find_recipe("demo", SMALL))
    assignments = [part for value in SMALL for part in ("--set", value)]
    done = subprocess.run(
        [sys.executable, "-m", "tuneline.pipelines.cli.main", "run", "demo", "--runner", "docker",
         "--runs-dir", str(tmp_path), *assignments],
        env={**os.environ, "COLUMNS": "200"},
        # The shipped recipe publishes to a directory below the working directory.
        cwd=tmp_path,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (run_dir,) = tmp_path.glob("demo-*")
    runs = step_runs(read_events(run_dir / "artifacts" / "events.jsonl"))
    assert {run.step for run in runs} == STEPS
    assert {run.status for run in runs} == {"finished"}
    (summary,) = run_dir.glob(f"artifacts/*/*/*/{RunSummary.filename}")
    found = RunSummary.read(summary.parent)
    assert found.verdict == "promote"
    assert {export.format for export in found.exports} == {"q8_0", "gptq-4bit"}
    published = {path.name for path in (tmp_path / "published").iterdir()}
    assert published == {"demo", "demo-lora", "demo-gguf", "demo-gptq-4bit"}
    # Each record names the image that made it.
    made_in = {
        path.name: json.loads(path.read_text())["environment"]["image"].partition("+")[0]
        for path in run_dir.glob("artifacts/tuneline-*/**/*.json")
        if path.name in ("origin.json", "merge.json", "scores.json", "decision.json")
    }
    assert made_in == {
        "origin.json": images.TRAIN, "merge.json": images.TRAIN,
        "scores.json": images.EVALUATE, "decision.json": images.LIGHT,
    }  # fmt: skip


@pytest.mark.docker
def test_a_stopped_run_leaves_no_container(tmp_path: Path) -> None:
    import docker

    check_images(find_recipe("demo", SMALL))
    process = subprocess.Popen(
        [sys.executable, "-m", "tuneline.pipelines.cli.main", "run", "demo", "--runner", "docker",
         "--runs-dir", str(tmp_path)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    client = docker.from_env()
    deadline = time.monotonic() + 180

    def containers() -> list[str]:
        found = client.containers.list(filters={"label": RUN_LABEL})
        return [each.id for each in found if each.labels[RUN_LABEL].startswith(str(tmp_path))]

    while not any('"fetch"' in path.read_text() for path in tmp_path.glob("*/*/events.jsonl")):
        assert process.poll() is None, "the run ended by itself"
        assert time.monotonic() < deadline, "fetch did not begin"
        time.sleep(0.1)
    assert containers()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 143
    assert containers() == []
