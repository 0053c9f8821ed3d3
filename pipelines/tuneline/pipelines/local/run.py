"""Run a recipe's pipeline on this machine, in a process of its own.

    python -m tuneline.pipelines.local.run RUN_DIR RECIPE_JSON subprocess|docker

A process of its own because KFP's local runner prints and logs freely, and so that the command
line can watch it, show its progress and end it as a whole.
"""

import os
import signal
import sys
import warnings
from pathlib import Path

from kfp import local

from tuneline.pipelines.finetune import finetune
from tuneline.pipelines.local.watch import read_events
from tuneline.recipe import Recipe
from tuneline.runtime.events import failed_run, step_runs
from tuneline.runtime.step import EVENTS_VARIABLE
from tuneline.train.checkpoints import ROOT_VARIABLE

EVENTS_FILE = "events.jsonl"
ARTIFACTS_DIR = "artifacts"
CACHE_DIR = ".cache"
CHECKPOINT_DIR = ".checkpoints"
"""Beside the runs, shared by them."""


def run_pipeline(run_dir: Path, recipe: Recipe, runner: str) -> None:
    """Run the pipeline to its end.

    Raises:
        RuntimeError: a task failed; the events say which and why.
    """
    artifacts_dir = run_dir / ARTIFACTS_DIR
    artifacts_dir.mkdir(parents=True, exist_ok=True)
    # Below the artifacts, because that is the directory that containers get mounted.
    environment = {EVENTS_VARIABLE: str(artifacts_dir / EVENTS_FILE)}
    # KFP warns of each setting that means nothing here (display names, caching); that is known.
    warnings.filterwarnings("ignore", module="kfp")
    if runner == "docker":
        from docker.types import Mount

        from tuneline.pipelines.local.docker import RUN_LABEL, stop_containers

        environment |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
        runs_dir = str(run_dir.resolve().parent)
        checkpoint_dir = f"{runs_dir}/{CHECKPOINT_DIR}"
        Path(checkpoint_dir).mkdir(exist_ok=True)
        environment[ROOT_VARIABLE] = checkpoint_dir
        directory = str(run_dir.resolve())

        def stop(number: int, _: object) -> None:
            stop_containers(directory)
            # Threads that wait for a container would keep the process.
            os._exit(128 + number)

        signal.signal(signal.SIGTERM, stop)
        chosen = local.DockerRunner(
            environment=environment,
            labels={RUN_LABEL: directory},
            user=f"{os.getuid()}:{os.getgid()}",
            network_mode="host",
            # What the cache gives is in the directories of earlier runs.
            mounts=[
                Mount(runs_dir, runs_dir, type="bind", read_only=True),
                Mount(checkpoint_dir, checkpoint_dir, type="bind"),
            ],
            cap_drop=["ALL"],
            security_opt=["no-new-privileges"],
        )
    else:
        # Two steps run side by side: OpenMP threads that spin while they wait for one that has no
        # core made single training steps take 20 s instead of 5.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # The next run of the same recipe continues a training that was killed.
        os.environ.setdefault(ROOT_VARIABLE, str(run_dir.resolve().parent / CHECKPOINT_DIR))
        os.environ.update(environment)
        chosen = local.SubprocessRunner(use_venv=False)
    local.init(
        runner=chosen,
        pipeline_root=str(artifacts_dir),
        enable_caching=True,
        cache_root=str(run_dir.parent / CACHE_DIR),
    )
    publish_to = recipe.publish_to
    if publish_to.startswith("dir:"):
        # Containers see the artifacts and nothing else of this machine.
        root = artifacts_dir if runner == "docker" else run_dir
        publish_to = f"dir:{(root / publish_to.removeprefix('dir:')).resolve()}"
    finetune(recipe, on_cluster=False)(publish_to=publish_to)
    if runner == "docker":
        check_that_all_steps_ended(artifacts_dir / EVENTS_FILE)


def check_that_all_steps_ended(events_path: Path) -> None:
    """Look for a step that did not end well.

    KFP takes a container that is gone before it is asked for its exit code for a success.

    Raises:
        RuntimeError: there is one.
    """
    failed = failed_run(step_runs(read_events(events_path)))
    if failed is not None:
        raise RuntimeError(f"step {failed.step} failed: {failed.message or 'it was killed'}")


if __name__ == "__main__":
    try:
        run_pipeline(Path(sys.argv[1]), Recipe.parse(sys.argv[2]), sys.argv[3])
    except RuntimeError as error:
        sys.exit(str(error))
