"""Load a checkpoint again, and compare it with the merged model."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from tuneline.artifacts import QuantizedModel
from tuneline.errors import ModelError, ProofError
from tuneline.models.weight_files import read_header
from tuneline.quantize import formats
from tuneline.quantize.config import QuantizeConfig
from tuneline.quantize.machine import num_threads
from tuneline.quantize.proof import quality
from tuneline.quantize.proof.reference import Reference
from tuneline.quantize.proof.transformers_model import TransformersModel


def prove(
    config: QuantizeConfig,
    merged_dir: Path,
    target: Path,
    *,
    format: str,
    reference: Reference,
    dtype: torch.dtype | str,
    device: str,
    has_speed: bool = True,
) -> QuantizedModel:
    """Load the checkpoint, generate, compare with the merged model, and return the record.

    Args:
        config: the `quantize` section of the recipe.
        merged_dir: directory of the merged model.
        target: directory of the checkpoint.
        format: name of the format.
        reference: the merged model's answers.
        dtype: dtype to compute in, as `TransformersModel` takes it.
        device: "cpu" or "cuda".
        has_speed: whether the speed on a CPU is measured. It says nothing about a format that CPUs
            do not compute in.

    Raises:
        ProofError: the checkpoint does not load or does not answer, or its predictions are further
            from the merged model's than the bound allows.
    """
    bound = formats.bound_of(format, config.max_mean_kl, config.min_top1_agreement)
    try:
        model = TransformersModel(target, dtype=dtype, device=device)
    except ModelError as error:
        raise ProofError(f"the export {format} does not load again: {error}") from error
    generated = model.generate(reference.generation.prompt_ids, num_tokens=reference.num_tokens)
    if not generated.text.strip() and reference.generation.text.strip():
        raise ProofError(
            f"the export {format} generates nothing where the merged model generates "
            f"{reference.generation.text[:60]!r}: {_advice_on_silence(config, format)}"
        )
    distance = quality.compare(
        reference.rows, reference.logits, (model.logits(row.ids) for row in reference.rows)
    )
    quality.check_bounds(distance, bound, format)
    weights = _weight_files(target)
    tensors = _tensors(weights)
    num_bytes = sum(path.stat().st_size for path in weights)
    num_weights = sum(math.prod(tensor["shape"]) for tensor in _tensors(_weight_files(merged_dir)))
    return QuantizedModel(
        format=format,
        kind=formats.FORMATS[format].kind,
        file=".",
        num_bytes=num_bytes,
        bits_per_weight=round(8 * num_bytes / num_weights, 4),
        tensor_types=dict(Counter(tensor["dtype"].lower() for tensor in tensors).most_common()),
        max_mean_kl=bound.max_mean_kl,
        min_top1_agreement=bound.min_top1_agreement,
        stop_tokens=reference.stop_texts,
        prompt=reference.prompt,
        generated=generated.text,
        reference=reference.generation.text,
        **(_speed(model, reference, device) if has_speed else {}),
        **distance.record(),
        **(reference.benchmark.record(model) if reference.benchmark else {}),
    )


def _advice_on_silence(config: QuantizeConfig, format: str) -> str:
    more = quality.more_bits(format)
    if not formats.FORMATS[format].is_calibrated:
        return more or quality.NOT_ROUNDING
    rows = f"raise quantize.num_calibration_rows (now {config.num_calibration_rows})"
    return f"{rows}, or {more}" if more else rows


def _speed(model: TransformersModel, reference: Reference, device: str) -> dict[str, float | int]:
    """Return tokens per second and number of threads; nothing if the device is a GPU.

    The other formats are timed on a CPU, so a speed on a GPU could not be compared with theirs.
    """
    if device != "cpu":
        return {}
    speed = model.tokens_per_second(
        reference.generation.prompt_ids, num_tokens=quality.NUM_SPEED_TOKENS
    )
    return {"tokens_per_second": round(speed, 2), "num_threads": num_threads()}


def _weight_files(model_dir: Path) -> list[Path]:
    return sorted(model_dir.glob("*.safetensors"))


def _tensors(files: list[Path]) -> list[dict[str, Any]]:
    """Return dtype, shape and offsets of each tensor in weight files."""
    return [tensor for file in files for tensor in read_header(file).values()]
