"""Records of small artifacts; values that a test does not name do not matter to it.

The record of a dataset is the fixture `new_dataset` of tests/conftest.py.
"""

import json
from pathlib import Path
from typing import Any

from tuneline.artifacts import (
    BenchmarkAnswers,
    MergeProof,
    ModelOrigin,
    QuantizedModel,
    TaskComparison,
    TrainingSummary,
)
from tuneline.record import hash_files
from tuneline.seals import sealed_json


def new_origin(**values: Any) -> ModelOrigin:
    plain: dict[str, Any] = {
        "source": "org/base",
        "architecture": "LlamaForCausalLM",
        "num_parameters": 1,
        "num_bytes": 1,
        "sha256": "1" * 64,
    }
    return ModelOrigin(**(plain | values))


def record_again(directory: Path) -> None:
    """Let the record of a base model or an adapter that a test changed hold its new files."""
    for kind in (ModelOrigin, TrainingSummary):
        path = directory / kind.filename
        if path.is_file():
            record = json.loads(path.read_text())
            record["files"] = hash_files(directory, leave_out={path.name})
            path.write_text(sealed_json(record))


def new_training(**values: Any) -> TrainingSummary:
    plain: dict[str, Any] = {
        "method": "sft",
        "num_steps": 10,
        "num_tokens": 900,
        "final_loss": 0.5,
        "num_trainable_parameters": 10,
        "num_parameters": 1000,
        "base_quantization": "nf4",
        "compute_dtype": "float32",
        "device": "cpu",
        "tokens_per_second": 100.0,
        "peak_memory_bytes": 1,
        "history": [],
        "base_sha256": "1" * 64,
        "dataset_sha256": "2" * 64,
    }
    return TrainingSummary(**(plain | values))


def adapter_weights(num_modules: int) -> bytes:
    """Return a safetensors file with the names of an adapter's tensors, which are empty."""
    names = [
        f"base_model.model.layers.{n}.q.lora_{m}.weight" for n in range(num_modules) for m in "AB"
    ]
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps(dict.fromkeys(names, empty)).encode()
    return len(header).to_bytes(8, "little") + header


def new_merge(**values: Any) -> MergeProof:
    plain: dict[str, Any] = {
        "base": "dequantized",
        "dtype": "bfloat16",
        "num_bytes": 7,
        "num_shards": 1,
        "num_merged_modules": 7,
        "num_prompts": 8,
        "max_logit_difference": 0.1,
        "mean_kl": 3e-4,
        "top1_agreement": 0.99,
        "max_mean_kl": 0.01,
    }
    return MergeProof(**(plain | values))


def new_export(**values: Any) -> QuantizedModel:
    plain: dict[str, Any] = {
        "format": "q8_0",
        "kind": "gguf",
        "file": "model.gguf",
        "num_bytes": 4,
        "bits_per_weight": 8.5,
        "prompt": "p",
        "generated": "g",
    }
    return QuantizedModel(**(plain | values))


def scored(
    num_rows: int, *, losses: int, gains: int = 0, clusters: list[int] | None = None
) -> dict[str, Any]:
    """Return the fields of an export that answered held-out rows.

    Args:
        num_rows: number of rows; the merged model answers four fifths of them right.
        losses: rows that the export gets wrong and the merged model right.
        gains: rows that the export gets right and the merged model wrong.
        clusters: cluster of each row. Default: each row stands alone.
    """
    right = num_rows * 4 // 5
    merged = [number < right for number in range(num_rows)]
    export = [losses <= number < right + gains for number in range(num_rows)]
    return {
        "benchmark": "heldout_choice",
        "num_benchmark_rows": num_rows,
        "benchmark_score": sum(export) / num_rows,
        "reference_benchmark_score": sum(merged) / num_rows,
        "benchmark_answers": BenchmarkAnswers(
            export=export, merged=merged, clusters=clusters or list(range(num_rows))
        ),
    }


def new_comparison(**values: Any) -> TaskComparison:
    """Return the comparison of a target that improved, on 200 samples of one cluster each."""
    plain: dict[str, Any] = {
        "task": "heldout_choice",
        "metric": "acc",
        "higher_is_better": True,
        "base": 0.25,
        "tuned": 0.75,
        "difference": 0.5,
        "interval": (0.4, 0.6),
        "lower": 0.4,
        "num_samples": 200,
        "num_clusters": 200,
        "effective_samples": 200.0,
        "outcome": "better",
        "role": "target",
    }
    return TaskComparison(**(plain | values))
