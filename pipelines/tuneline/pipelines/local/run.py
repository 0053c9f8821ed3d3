"""Run a recipe's pipeline on this machine, in a separate process.

    python -m tuneline.pipelines.local.run RUN_DIR RECIPE_JSON subprocess|docker [STEP ...]

The steps that are named are not taken from the cache.

The process is separate so that the output of KFP's local runner goes to a log file, and so that the
command line can show the progress and stop the runner together with the steps.
"""

import functools
import glob
import os
import signal
import sys
import threading
import warnings
from pathlib import Path

from kfp import local

from tuneline.pipelines.finetune import finetune
from tuneline.pipelines.local.run_dir import CACHE_DIR, CHECKPOINT_DIR
from tuneline.pipelines.local.watch import ARTIFACTS_DIR, EVENTS_FILE, read_events
from tuneline.recipe import Recipe
from tuneline.records.earlier import RUNS_VARIABLE
from tuneline.runtime import environment
from tuneline.runtime.events import failed_run, step_runs
from tuneline.runtime.source_names import CLAIMS_PATH, CLAIMS_VARIABLE, fixed_part
from tuneline.runtime.step import EVENTS_VARIABLE
from tuneline.train.checkpoints import ROOT_VARIABLE

WORKSPACE_DIR = ".workspace"


def run_pipeline(run_dir: Path, recipe: Recipe, runner: str, uncached: list[str]) -> None:
    """Run a recipe's pipeline to its end.

    Args:
        run_dir: directory of the run.
        recipe: the recipe.
        runner: where the steps run, "subprocess" or "docker".
        uncached: names of steps that are not taken from the cache.

    Raises:
        RuntimeError: a task failed; the events show which one and why.
    """
    artifacts_dir = run_dir / ARTIFACTS_DIR
    artifacts_dir.mkdir(parents=True, exist_ok=True)
    # No step uses KFP's workspace, which KFP deletes when the pipeline has ended. By default it is
    # in TMPDIR, where a killed run would leave it.
    workspace = run_dir / WORKSPACE_DIR
    workspace.mkdir(exist_ok=True)
    # The events file is among the artifacts because that directory is mounted in containers.
    events_path = artifacts_dir / EVENTS_FILE
    # KFP warns of every setting that has no effect locally (display names, caching).
    warnings.filterwarnings("ignore", module="kfp")
    is_docker = runner == "docker"
    local.init(
        runner=_docker_runner(run_dir, events_path, recipe)
        if is_docker
        else _subprocess_runner(run_dir, events_path),
        pipeline_root=str(artifacts_dir),
        workspace_root=str(workspace),
        enable_caching=True,
        cache_root=str(run_dir.parent / CACHE_DIR),
    )
    # Without arguments, the recipe's own values: find_recipe has made its paths absolute.
    finetune(
        recipe,
        on_cluster=False,
        run_name=run_dir.name,
        run_id=run_dir.name,
        uncached=uncached,
        versions_of=None if is_docker else functools.cache(environment.versions_of),
    )()
    if is_docker:
        check_that_all_steps_ended(events_path)


def _subprocess_runner(run_dir: Path, events_path: Path) -> local.SubprocessRunner:
    # Two steps run concurrently. OpenMP threads that spin while they wait for a busy core slowed
    # some training steps down from 5 s to 20 s.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for name, value in environment.NO_USAGE_REPORTS.items():
        os.environ.setdefault(name, value)
    # Runs share their checkpoints, so that the next run of a recipe resumes a killed training.
    os.environ.setdefault(ROOT_VARIABLE, str(run_dir.resolve().parent / CHECKPOINT_DIR))
    os.environ[EVENTS_VARIABLE] = str(events_path)
    os.environ[RUNS_VARIABLE] = str(run_dir.resolve().parent)
    return local.SubprocessRunner(use_venv=False)


def _docker_runner(run_dir: Path, events_path: Path, recipe: Recipe) -> local.DockerRunner:
    from docker.types import Mount

    from tuneline.pipelines.local.docker import RUN_LABEL, stop_containers

    directory = str(run_dir.resolve())
    runs_dir = str(run_dir.resolve().parent)
    checkpoint_dir = f"{runs_dir}/{CHECKPOINT_DIR}"
    Path(checkpoint_dir).mkdir(exist_ok=True)
    claims_dir = os.environ.get(CLAIMS_VARIABLE)
    is_read_only = all(target.kind != "claim" for target in recipe.targets)
    claims = Mount(CLAIMS_PATH, claims_dir, type="bind", read_only=is_read_only)
    mounted = [Mount(path, path, type="bind", read_only=True) for path in inputs_of(recipe)]
    for target in recipe.targets:
        if target.kind == "directory":
            Path(target.path).mkdir(parents=True, exist_ok=True)
            mounted.append(Mount(target.path, target.path, type="bind"))

    def stop(number: int, _: object) -> None:
        stop_containers(directory)
        # Threads that wait for a container would keep the process alive after sys.exit.
        os._exit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    return local.DockerRunner(
        environment={
            EVENTS_VARIABLE: str(events_path),
            RUNS_VARIABLE: runs_dir,
            ROOT_VARIABLE: checkpoint_dir,
            "OMP_WAIT_POLICY": "PASSIVE",
            "GOMP_SPINCOUNT": "0",
        },
        labels={RUN_LABEL: directory},
        user=f"{os.getuid()}:{os.getgid()}",
        network_mode="host",
        # Cached results are in the directories of earlier runs.
        mounts=[
            Mount(runs_dir, runs_dir, type="bind", read_only=True),
            Mount(checkpoint_dir, checkpoint_dir, type="bind"),
            *mounted,
            *([claims] if claims_dir else []),
        ],
        cap_drop=["ALL"],
        security_opt=["no-new-privileges"],
    )


def inputs_of(recipe: Recipe) -> list[str]:
    """Return the files and directories of this machine that the steps of a recipe read."""
    sources = [recipe.base_model, *recipe.data_sources, recipe.evaluate.task_dir or ""]
    paths = (fixed_part(source) if glob.has_magic(source) else source for source in sources)
    return [path for path in dict.fromkeys(paths) if path.startswith("/") and Path(path).exists()]


def check_that_all_steps_ended(events_path: Path) -> None:
    """Check that every step that started has finished.

    KFP counts a container as successful if it is removed before KFP asks for its exit code.

    Raises:
        RuntimeError: a step failed or was killed.
    """
    failed = failed_run(step_runs(read_events(events_path)))
    if failed is not None:
        raise RuntimeError(f"step {failed.step} failed: {failed.message or 'it was killed'}")


def stop_with_starter() -> None:
    """Send SIGTERM to the group that this process leads when the process that started it has ended.

    A run must not go on, and publish, after its `tuneline run` was killed or its terminal closed.
    The starter holds the other end of the pipe at standard input, and writes nothing to it.
    """
    pipe = os.dup(0)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)

    def wait() -> None:
        os.read(pipe, 1)
        os.killpg(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    stop_with_starter()
    try:
        run_pipeline(Path(sys.argv[1]), Recipe.parse(sys.argv[2]), sys.argv[3], sys.argv[4:])
    except RuntimeError as error:
        sys.exit(str(error))
