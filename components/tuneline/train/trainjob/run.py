"""Train on several nodes: inputs onto the volume that they share, a TrainJob, the adapter back."""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from tuneline.artifacts import DatasetManifest, ModelOrigin, TrainingSummary, new_directory
from tuneline.errors import StorageError, UserError
from tuneline.pods import PART_OF_LABEL, POD_NAME_VARIABLE, RUN_LABEL, SHARED_PATH, STEP_LABEL
from tuneline.train.config import TrainConfig
from tuneline.train.ranks.board import (
    ADAPTER_DIR,
    BASE_MODEL_DIR,
    CONFIG_FILE,
    CURVES_FILE,
    DATASET_DIR,
    Board,
)
from tuneline.train.trainjob.manifest import NodesConfig, build

if TYPE_CHECKING:
    from tuneline.train.trainjob.client import TrainJobs

logger = logging.getLogger(__name__)

POD_VARIABLES = (POD_NAME_VARIABLE, "HOSTNAME")
"""What names the pod that this runs in; the first is KFP's, the second every pod's."""

LABELS = dict([PART_OF_LABEL, (STEP_LABEL, "train")])


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
    """Train as `run` does, on the nodes of a TrainJob.

    Args:
        config: the recipe's part.
        nodes: what the job asks for.
        base_model_dir: what fetch made.
        dataset_dir: what prepare made.
        adapter_dir: new; gets the adapter, the tokenizer and training.json.
        curves_path: an HTML page with the loss.
        shared_dir: the volume; this pod and the job's pods see it at the same path.

    Raises:
        TunelineError: as `run`, and what `launcher` says.
        StorageError: the volume cannot be written.
        UserError: this is not a pod of a cluster.
    """
    from tuneline.runtime.kubernetes_client import connect
    from tuneline.train.trainjob.client import TrainJobs
    from tuneline.train.trainjob.follow import Launcher

    pod, namespace = _whoami()
    jobs = TrainJobs(connect(num_retries=0), namespace)
    owner, run_id = jobs.run_of(pod)
    name = _name_of(run_id or pod, config, base_model_dir, dataset_dir)
    directory = Path(shared_dir, "tuneline", name)
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
        Launcher(jobs, body, Board(directory), timeout_seconds=seconds).run()
    return _collect(directory, jobs, name, Path(adapter_dir), Path(curves_path))


def _whoami() -> tuple[str, str]:
    from tuneline.runtime.kubernetes_client import NAMESPACE_VARIABLE, own_namespace

    pod = next((os.environ[key] for key in POD_VARIABLES if os.environ.get(key)), None)
    namespace = own_namespace()
    if not pod or not namespace:
        raise UserError(
            f"this is no pod of a cluster ({POD_VARIABLES[0]} and {NAMESPACE_VARIABLE} are not "
            "set), and only those can make a TrainJob: run the recipe with tuneline submit, or set "
            "placement.num_nodes to 1"
        )
    return pod, namespace


def _name_of(
    run_id: str, config: TrainConfig, base_model_dir: str | Path, dataset_dir: str | Path
) -> str:
    """Return the name of this training of this run, the same in every try of the step."""
    base = ModelOrigin.read(base_model_dir).sha256
    data = DatasetManifest.read(dataset_dir).sha256
    text = json.dumps([run_id, "train", config.model_dump(mode="json"), base, data])
    return f"tuneline-train-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _stage(
    directory: Path, config: TrainConfig, base_model_dir: str | Path, dataset_dir: str | Path
) -> None:
    """Copy the step's inputs to where all nodes see them; what is there already stays."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, source in ((BASE_MODEL_DIR, base_model_dir), (DATASET_DIR, dataset_dir)):
            if not (directory / name).is_dir():
                with new_directory(directory / name) as target:
                    shutil.copytree(source, target, dirs_exist_ok=True)
        (directory / CONFIG_FILE).write_text(config.model_dump_json(), encoding="utf-8")
    except PermissionError as error:
        raise StorageError(
            f"{error.filename} cannot be written: placement.shared_claim must be writable for "
            "placement.run_as_user, as KFP sets no fsGroup"
        ) from None


def _collect(
    directory: Path, jobs: "TrainJobs", name: str, adapter_dir: Path, curves_path: Path
) -> TrainingSummary:
    with new_directory(adapter_dir) as target:
        shutil.copytree(directory / ADAPTER_DIR, target, dirs_exist_ok=True)
    curves_path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(directory / CURVES_FILE, curves_path)
    summary = TrainingSummary.read(adapter_dir)
    # Only now: a try that ends before finds all of it again.
    jobs.delete(name)
    shutil.rmtree(directory)
    logger.info("collected the adapter of %d ranks from %s", summary.num_ranks, directory)
    return summary
