"""The gate's component on executor inputs as KFP's driver and launcher write them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gate_scores import TUNED_PARENT, accuracies, write_scores
from kfp.dsl.executor import Executor
from kfp.dsl.types import artifact_types
from small_records import new_export, new_merge, scored

from tuneline.artifacts import Decision, MergeProof, QuantizedModel
from tuneline.gate import GateConfig
from tuneline.gate.component import gate
from tuneline.record import Ancestor
from tuneline.seals import sealed_json

STORE = "mlpipeline/v2/artifacts/gate-test"
"""Bucket and path of a run's artifacts, which the launcher downloads below /minio/."""


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The artifacts of a run where the launcher puts them: records are files without a suffix."""
    monkeypatch.setattr(artifact_types, "_MINIO_LOCAL_MOUNT_PREFIX", f"{tmp_path}/minio/")
    root = tmp_path / "minio" / STORE
    base = accuracies(1, 0.3)
    write_scores(root / "evaluate" / "scores", "base", {"quiz": base})
    write_scores(
        root / "evaluate-2" / "scores", "tuned", {"quiz": np.ones_like(base)}, parent=TUNED_PARENT
    )
    record_of(root / "merge", MergeProof.filename, new_merge())
    (root / "look-up-published").mkdir()
    (root / "look-up-published" / "earlier").write_text("{}")
    for format, losses in (("q8_0", 1), ("q4_0", 40), ("gptq-4bit", 2)):
        made_from = {"merged": Ancestor(sha256="c" * 64)}
        export = new_export(format=format, made_from=made_from, **scored(200, losses=losses))
        record_of(root / format, QuantizedModel.filename, export)
    return root


def record_of(directory: Path, filename: str, record: Any) -> None:
    directory.mkdir()
    (directory / "record").write_text(sealed_json(json.loads(record.model_dump_json())))


def artifacts(*names: str) -> dict[str, Any]:
    return {
        "artifacts": [
            {
                "name": "7",
                "type": {"schemaTitle": "system.Artifact", "schemaVersion": "0.0.1"},
                "uri": f"minio://{STORE}/{name}",
                "metadata": {},
            }
            for name in names
        ]
    }


def run_component(store: Path, exports: dict[str, Any]) -> tuple[Decision, dict[str, Any]]:
    """Run the component; return the decision, and what the executor tells KFP."""
    output = store.parent / "executor_output.json"
    inputs = {
        "base_scores": artifacts("evaluate/scores"),
        "tuned_scores": artifacts("evaluate-2/scores"),
        "merged": artifacts("merge/record"),
        "earlier": artifacts("look-up-published/earlier"),
    }
    outputs = {name: artifacts(f"gate/{name}") for name in ("decision", "summary")}
    executor_input = {
        "inputs": {
            "parameterValues": {"config": GateConfig().model_dump_json()},
            "artifacts": {**inputs, **exports},
        },
        "outputs": {
            "parameters": {"Output": {"outputFile": str(store.parent / "Output")}},
            "artifacts": outputs,
            "outputFile": str(output),
        },
    }
    Executor(executor_input=executor_input, function_to_execute=gate).execute()
    return Decision.read(store / "gate" / "decision"), json.loads(output.read_text())


@pytest.mark.parametrize(
    ("exports", "verdicts"),
    [
        ({}, {}),
        # A list that no task fills has no key. The executor takes an empty list as well.
        ({"gguf": artifacts(), "gptq": artifacts()}, {}),
        ({"gptq": artifacts("gptq-4bit/record")}, {"gptq-4bit": "promote"}),
        (
            {
                "gguf": artifacts("q8_0/record", "q4_0/record"),
                "gptq": artifacts("gptq-4bit/record"),
            },
            {"q8_0": "promote", "q4_0": "hold", "gptq-4bit": "promote"},
        ),
    ],
    ids=["no key", "empty", "one kind", "both kinds"],
)
def test_exports_as_kfp_passes_them(
    store: Path, exports: dict[str, Any], verdicts: dict[str, str]
) -> None:
    decision, told = run_component(store, exports)
    assert {each.format: each.verdict for each in decision.exports} == verdicts
    assert told["parameterValues"] == {"Output": "promote"}
    (artifact,) = told["artifacts"]["decision"]["artifacts"]
    held = [name for name, verdict in verdicts.items() if verdict == "hold"]
    assert artifact["metadata"]["held_exports"] == (", ".join(held) or "none")
    assert artifact["uri"] == f"minio://{STORE}/gate/decision"
