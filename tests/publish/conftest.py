"""A Hub on localhost, and the artifacts of a run."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import hub_server
import pytest
from publish_cases import write_again
from small_records import (
    adapter_weights,
    new_comparison,
    new_export,
    new_merge,
    new_origin,
    new_training,
    scored,
)

from tuneline.artifacts import DatasetManifest, Decision, Scores, TaskScore, TrainingPoint
from tuneline.train.config import TrainConfig


@pytest.fixture
def hub() -> Iterator:
    server = hub_server.Hub()
    yield server
    server.close()


@pytest.fixture
def run_dir(tmp_path: Path, new_dataset: Callable[..., DatasetManifest]) -> Path:
    """Artifacts of a run with small but real files."""
    root = tmp_path / "run"

    def directory(name: str, **files: bytes) -> Path:
        path = root / name
        path.mkdir(parents=True)
        for file, content in files.items():
            path.joinpath(file.replace("__", ".")).write_bytes(content)
        return path

    new_origin(revision="a" * 40, licence="Apache-2.0").write(directory("base"))
    new_dataset(
        source="/home/someone/private/rows.jsonl", num_train_rows=90, sha256="2" * 64
    ).write(directory("dataset"))
    new_training(
        first_eval_loss=2.0,
        final_eval_loss=0.75,
        history=[
            TrainingPoint(step=0, eval_loss=2.0),
            *(TrainingPoint(step=step, loss=2.0 / step) for step in range(1, 41)),
            TrainingPoint(step=40, eval_loss=0.75),
        ],
    ).write(
        directory(
            "adapter", adapter_model__safetensors=adapter_weights(7), adapter_config__json=b"{}"
        ),
        TrainConfig(),
    )
    new_merge().write(directory("merged", model__safetensors=os.urandom(4096), config__json=b"{}"))
    for name, kind, file in (("q8_0", "gguf", "model.gguf"), ("gptq-4bit", "gptq", ".")):
        files = {"config__json": b"{}"}
        measured = {"mean_kl": 0.0069, "top1_agreement": 0.977, "perplexity": 1.5}
        measured |= scored(200, losses=3, gains=2)
        measured |= {"num_tokenizer_texts": 236, "num_conversations": 7, "stop_tokens": ["</s>"]}
        measured |= {"tokens_per_second": 61.7}
        if kind == "gguf":
            modelfile = b'FROM ./model.gguf\nPARAMETER stop "</s>"\n'
            files = {
                "model__gguf": os.urandom(2048),
                "Modelfile": modelfile,
                "template": b"{{ .Prompt }}",
                "params": b'{"stop": ["</s>"]}',
            }
        new_export(
            format=name,
            kind=kind,
            file=file,
            num_bytes=2048,
            generated="an answer",
            **(measured if file != "." else {}),
        ).write(directory(name, **files))
    Decision(
        verdict="promote",
        reason="heldout_choice +0.50",
        comparisons=[new_comparison()],
    ).write(directory("decision"))
    for label, value in (("base", 0.25), ("tuned", 0.75)):
        score = TaskScore(metric="acc", higher_is_better=True, value=value, num_samples=200)
        scores = Scores(model=label, tasks={"heldout_choice": score}, harness="lm-eval")
        scores.write(directory(f"{label}-scores"))
    write_again(root)
    return root
