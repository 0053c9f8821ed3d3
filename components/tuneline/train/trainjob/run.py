"""Train on several nodes: copy the inputs to a volume, run a TrainJob, collect the adapter."""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

from tuneline.artifacts import DatasetManifest, ModelOrigin, TrainingSummary, new_directory
from tuneline.errors import StorageError, UserError
from tuneline.pods import PART_OF_LABEL, POD_NAME_VARIABLE, RUN_LABEL, SHARED_PATH, STEP_LABEL
from tuneline.runtime.kubernetes_client import NAMESPACE_VARIABLE, connect, own_namespace
from tuneline.train.config import TrainConfig
from tuneline.train.ranks.nodes import (
    ADAPTER_DIR,
    BASE_MODEL_DIR,
    CONFIG_FILE,
    CURVES_FILE,
    DATASET_DIR,
    SharedDirectory,
)
from tuneline.train.trainjob.client import TrainJobs
from tuneline.train.trainjob.follow import Launcher
from tuneline.train.trainjob.manifest import NodesConfig, build

logger = logging.getLogger(__name__)

POD_VARIABLES = (POD_NAME_VARIABLE, "HOSTNAME")
"""Environment variables with the name of this pod: KFP sets the first, Kubernetes the second."""

LABELS: dict[str, str] = dict([PART_OF_LABEL, (STEP_LABEL, "train")])


def run_on_nodes(
    config: TrainConfig,
    nodes: NodesConfig,
    *,
    base_model_dir: str | Path,
    dataset_dir: str | Path,
    adapter_dir: str | Path,
    curves_path: str | Path,
    shared_dir: str | Path = SHARED_PATH,
) -> TrainingSummary:
    """Do the same as `tuneline.train.run.run`, but on the nodes of a TrainJob.

    Args:
        config: The `train` section of the recipe.
        nodes: Number of nodes, and resources and settings of their pods.
        base_model_dir: Base model directory that fetch wrote.
        dataset_dir: Dataset directory that prepare wrote.
        adapter_dir: New directory for the adapter, the tokenizer and training.json.
        curves_path: HTML page to write, with the curves of the run.
        shared_dir: Shared volume, mounted at the same path in this pod and in the job's pods.

    Raises:
        TunelineError: raised by `tuneline.train.run.run` on the nodes, or by `Launcher.run`.
        StorageError: the shared volume cannot be written.
        UserError: this process does not run in a pod of a cluster.
    """
    pod, namespace = _own_pod()
    jobs = TrainJobs(connect(num_retries=0), namespace)
    owner, run_id = jobs.run_of(pod)
    name = _job_name(run_id or pod, config, base_model_dir, dataset_dir)
    directory = Path(shared_dir, "tuneline", name)
    shared = SharedDirectory(directory)
    # The job may be running, if this launcher was started again.
    shared.beat()
    if not (directory / ADAPTER_DIR).is_dir():
        _stage(directory, config, base_model_dir, dataset_dir)
        body = build(
            nodes,
            name=name,
            directory=directory,
            labels={**LABELS, RUN_LABEL: run_id} if run_id else dict(LABELS),
            owner=owner,
            supported=jobs.supported(),
        )
        seconds = nodes.timeout_hours * 3600
        Launcher(jobs, body, shared, timeout_seconds=seconds).run()
    return _collect(directory, jobs, name, Path(adapter_dir), Path(curves_path))


def _own_pod() -> tuple[str, str]:
    """Return the name and the namespace of the pod that this process runs in."""
    pod = next((os.environ[key] for key in POD_VARIABLES if os.environ.get(key)), None)
    namespace = own_namespace()
    if not pod or not namespace:
        raise UserError(
            "creating a TrainJob requires running in a pod of the cluster "
            f"({POD_VARIABLES[0]} or {NAMESPACE_VARIABLE} is not set): run the recipe with "
            "`tuneline submit`, or set placement.num_nodes to 1"
        )
    return pod, namespace


def _job_name(
    run_id: str, config: TrainConfig, base_model_dir: str | Path, dataset_dir: str | Path
) -> str:
    """Return a job name that is the same in every retry of this training in this run."""
    base = ModelOrigin.read(base_model_dir).sha256
    dataset = DatasetManifest.read(dataset_dir).sha256
    text = json.dumps([run_id, "train", config.model_dump(mode="json"), base, dataset])
    return f"tuneline-train-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _stage(
    directory: Path, config: TrainConfig, base_model_dir: str | Path, dataset_dir: str | Path
) -> None:
    """Copy the step's inputs to the shared volume, unless an earlier try has copied them."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, source in ((BASE_MODEL_DIR, base_model_dir), (DATASET_DIR, dataset_dir)):
            if not (directory / name).is_dir():
                with new_directory(directory / name) as target:
                    shutil.copytree(source, target, dirs_exist_ok=True)
        (directory / CONFIG_FILE).write_text(config.model_dump_json(), encoding="utf-8")
    except PermissionError as error:
        raise StorageError(
            f"{error.filename} cannot be written: make the volume of placement.shared_claim "
            "writable for placement.run_as_user (KFP sets no fsGroup)"
        ) from None


def _collect(
    directory: Path, jobs: TrainJobs, name: str, adapter_dir: Path, curves_path: Path
) -> TrainingSummary:
    """Copy the adapter and the page from the shared volume, then delete the job and its files."""
    with new_directory(adapter_dir) as target:
        shutil.copytree(directory / ADAPTER_DIR, target, dirs_exist_ok=True)
    curves_path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(directory / CURVES_FILE, curves_path)
    summary = TrainingSummary.read(adapter_dir)
    # Delete last: if the step is interrupted before this line, its retry finds the adapter.
    jobs.delete(name)
    shutil.rmtree(directory)
    logger.info("collected the adapter of %d ranks from %s", summary.num_ranks, directory)
    return summary
