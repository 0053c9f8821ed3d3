"""Publish the artifacts of a run in a process of its own, as the step does; staged trees."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tuneline.artifacts import (
    DatasetManifest,
    Decision,
    MergeProof,
    ModelOrigin,
    QuantizedModel,
    Scores,
    TrainingSummary,
)
from tuneline.evaluate.config import EvaluateConfig
from tuneline.fetch.config import FetchConfig
from tuneline.gate.config import GateConfig
from tuneline.gate.exports import verdict_on
from tuneline.merge.config import MergeConfig
from tuneline.prepare.config import PrepareConfig
from tuneline.publish.config import PublishConfig
from tuneline.publish.previous import MARKER_FILE
from tuneline.publish.staging import StagedRepo
from tuneline.quantize.config import QuantizeConfig
from tuneline.recipe import Recipe
from tuneline.record import Record
from tuneline.strict_model import StrictModel
from tuneline.train.config import TrainConfig

QUANTIZE = QuantizeConfig(gguf=("q8_0",), gptq=("gptq-4bit",))
LINE: dict[str, tuple[type[Record], StrictModel, tuple[str, ...]]] = {
    "base": (ModelOrigin, FetchConfig(), ()),
    "dataset": (DatasetManifest, PrepareConfig(), ()),
    "adapter": (TrainingSummary, TrainConfig(), ("base", "dataset")),
    "merged": (MergeProof, MergeConfig(), ("base", "dataset", "adapter")),
    "q8_0": (QuantizedModel, QUANTIZE, ("merged",)),
    "gptq-4bit": (QuantizedModel, QUANTIZE, ("merged",)),
    "base-scores": (Scores, EvaluateConfig(), ("dataset", "base")),
    "tuned-scores": (Scores, EvaluateConfig(), ("dataset", "merged")),
    "decision": (Decision, GateConfig(), ("base-scores", "tuned-scores")),
}
"""Directories of a run in the order of its steps: record, config, and what each is made from."""
EXPORTS = ("q8_0", "gptq-4bit")
WEIGHTS = bytes(range(256)) * 40


def write_again(
    run_dir: Path,
    changes: dict[str, dict[str, Any]] | None = None,
    configs: dict[str, StrictModel] | None = None,
) -> None:
    """Write all records of a run, each with the lineage that its step would give it.

    The decision has the gate's verdicts on the exports.

    Args:
        run_dir: directory of the run.
        changes: fields to change, by directory.
        configs: other configs than the default, by directory.
    """
    for name, (kind, config, parents) in LINE.items():
        record = kind.read(run_dir / name).model_copy(update=(changes or {}).get(name, {}))
        if isinstance(record, Decision):
            made = [QuantizedModel.read(run_dir / each) for each in EXPORTS]
            verdicts = [verdict_on(export, GateConfig()) for export in made]
            record = record.model_copy(update={"exports": verdicts})
        made_from = [LINE[parent][0].read(run_dir / parent) for parent in parents]
        record.write(run_dir / name, (configs or {}).get(name, config), parents=made_from)


def recipe_of(description: str = "", publish_to: str = "org/somewhere") -> Recipe:
    return Recipe(
        name="mine",
        description=description,
        base_model="org/base",
        dataset="/home/someone/private/rows.jsonl",
        publish_to=publish_to,
        quantize=QUANTIZE,
        publish=PublishConfig(max_attempts=3),
    )


def publish(
    run_dir: Path,
    target: str,
    out: str,
    *,
    exports: tuple[str, ...] = EXPORTS,
    description: str = "",
    recipe: Recipe | None = None,
    config: dict[str, Any] | None = None,
    run_id: str = "",
    quantize: str = "",
    **environment: str,
) -> subprocess.CompletedProcess:
    is_target = target.startswith("dir:") or "/" in target
    recipe = recipe or recipe_of(description, publish_to=target if is_target else "me/mine")
    config_path = run_dir / "publish.json"
    config_path.write_text(json.dumps({"max_attempts": 3, **(config or {})}))
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        [
            *(sys.executable, "-m", "tuneline.publish", "--config", str(config_path)),
            *("--target", target, "--recipe", recipe.model_dump_json()),
            *("--base-model", str(run_dir / "base"), "--dataset", str(run_dir / "dataset")),
            *("--adapter", str(run_dir / "adapter"), "--merged", str(run_dir / "merged")),
            *("--exports", *(str(run_dir / name) for name in exports)),
            *("--decision", str(run_dir / "decision"), "--published", str(run_dir / out)),
            *("--run-id", run_id, "--quantize-config", quantize),
        ],
        env={**clean, "HF_HUB_DISABLE_XET": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def to_hub(run_dir: Path, hub, out: str, **changes: str):
    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, **changes}
    return publish(run_dir, "me/mine", out, **environment)


TOKEN = "hf_" + "t" * 34  # the one that hub_server.py knows
REPOS = {
    "me/mine-lora": "adapter",
    "me/mine": "merged",
    "me/mine-gguf": "gguf",
    "me/mine-gptq-4bit": "gptq",
}


def staged_tree(root: Path, *, seed: int = 1, speed: int = 1) -> list[StagedRepo]:
    """Stage `mine-lora` and `mine`.

    Args:
        root: an existing directory; the trees of other numbers may be in it already.
        seed: what distinguishes one model from another.
        speed: what two runs of the same model measure differently, in their cards.
    """
    repos = []
    for name, kind in (("mine-lora", "adapter"), ("mine", "merged")):
        folder = root / f"staged-{seed}-{speed}" / name
        (folder / "serving").mkdir(parents=True)
        files = {"config.json": str(seed).encode(), "model.safetensors": WEIGHTS}
        files |= {"serving/vllm.yaml": b"kind: InferenceService\n", "empty.txt": b""}
        for file, content in files.items():
            folder.joinpath(file).write_bytes(content)
        hashes = {file: hashlib.sha256(content).hexdigest() for file, content in files.items()}
        folder.joinpath("README.md").write_text(f"{speed} tokens per second")
        marker = {"files": hashes, "kind": kind, "card": {"sha256": str(speed)}}
        folder.joinpath(MARKER_FILE).write_text(json.dumps(marker))
        repos.append(StagedRepo(name, kind, folder))  # type: ignore[arg-type]
    return repos


def content_of(repo: StagedRepo) -> dict[str, bytes]:
    """Return the files of a staged repository."""
    return {name: path.read_bytes() for name, path in repo.files().items()}
