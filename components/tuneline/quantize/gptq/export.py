"""Make GPTQ checkpoints with gptqmodel, and load them again with transformers."""

import importlib.util
import json
import logging
import math
import os
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from tuneline.artifacts import QuantizedModel
from tuneline.errors import ModelError, ProofError, ToolError
from tuneline.models.nf4 import empty_model
from tuneline.models.tokenizer import files as tokenizer_files
from tuneline.models.weight_files import SINGLE_FILE, read_header
from tuneline.quantize import formats
from tuneline.quantize.calibration import read_rows
from tuneline.quantize.child_process import run_to_end
from tuneline.quantize.config import QuantizeConfig
from tuneline.quantize.gptq.experts import check_experts
from tuneline.quantize.machine import few_threads, num_threads, raise_if_full
from tuneline.quantize.proof import quality
from tuneline.quantize.proof.reference import Reference, for_export
from tuneline.quantize.proof.transformers_model import TransformersModel, choose_device
from tuneline.runtime.scratch import scratch_directory

logger = logging.getLogger(__name__)

MAX_ROW_TOKENS = 2048
"""Number of tokens of a calibration row that are used. It limits memory: the device holds the
inputs and the outputs of a layer for all rows. At the width of an 8B model, 128 rows of this length
take 2 x 2.1 GB in bf16, in addition to the layer and its Hessians."""
# What vLLM loads, according to its auto_gptq.py and marlin_utils.py of 2026-11, for symmetric
# quantisation (all exports here are symmetric).
VLLM_BITS, VLLM_GROUP_SIZES = (4, 8), (32, 64, 128)


def export(
    config: QuantizeConfig, *, format: str, merged_dir: Path, dataset_dir: Path, target: Path
) -> QuantizedModel:
    """Make and check one GPTQ checkpoint, on a GPU if the model fits and on the CPU otherwise.

    Args:
        config: the `quantize` section of the recipe.
        format: name of the format.
        merged_dir: directory of the merged model.
        dataset_dir: directory that prepare made; the rounding is calibrated on its training rows.
        target: directory to write the checkpoint to.

    Returns:
        The record of the checkpoint.

    Raises:
        DataError: there are no training rows.
        ModelError: no group size fits the model's layers, or the model is a mixture of experts.
        ToolError: gptqmodel is missing or failed.
        ProofError: the checkpoint does not load or does not answer, or its predictions are further
            from the merged model's than the bound allows.
    """
    check_experts(merged_dir)
    device = choose_device(merged_dir)
    rows = read_rows(
        dataset_dir,
        config.num_calibration_rows,
        setting="num_calibration_rows",
        purpose="GPTQ calibrates",
    )
    bits = formats.FORMATS[format].bits
    assert bits is not None
    group_size, note = choose_group_size(linear_widths(merged_dir), config.group_size)
    notes = [note] if note else []
    for_vllm = bits in VLLM_BITS and group_size in VLLM_GROUP_SIZES
    if not for_vllm:
        notes.append(f"vLLM has no kernel for {bits} bits in groups of {group_size}")
    with few_threads():
        merged = for_export(config, merged_dir, dataset_dir, device)
        _quantise(
            merged_dir,
            target,
            rows=[row[:MAX_ROW_TOKENS] for row in rows],
            bits=bits,
            group_size=group_size,
            desc_act=config.desc_act,
        )
        _take_companions(merged_dir, target)
        record = _prove(config, merged_dir, target, format=format, reference=merged, device=device)
    return record.model_copy(
        update={"group_size": group_size, "vllm_has_kernel": for_vllm, "notes": notes}
    )


def _prove(
    config: QuantizeConfig,
    merged_dir: Path,
    target: Path,
    *,
    format: str,
    reference: Reference,
    device: str,
) -> QuantizedModel:
    """Load the checkpoint, generate, compare with the merged model, and return the record."""
    bound = formats.bound_of(format, config.max_mean_kl, config.min_top1_agreement)
    try:
        model = TransformersModel(target, dtype=torch.float16, device=device)
    except ModelError as error:
        raise ProofError(f"the export {format} does not load again: {error}") from error
    generated = model.generate(reference.generation.prompt_ids, num_tokens=reference.num_tokens)
    if not generated.text.strip() and reference.generation.text.strip():
        raise ProofError(
            f"the export {format} generates nothing where the merged model generates "
            f"{reference.generation.text[:60]!r}. Raise quantize.num_calibration_rows (now "
            f"{config.num_calibration_rows})"
            + (f", or {quality.more_bits(format)}" if quality.more_bits(format) else "")
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
        kind="gptq",
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
        **_speed(model, reference, device),
        **distance.record(),
        **(reference.benchmark.record(model) if reference.benchmark else {}),
    )


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


def choose_group_size(widths: dict[int, str], wanted: int) -> tuple[int, str | None]:
    """Return the largest group size up to `wanted` that divides every width, and a note.

    `widths` are those of `linear_widths`. The note says why the size is not `wanted`; None if it
    is. gptqmodel does not check the group size: with one that does not divide a width, it quantises
    and saves a checkpoint whose first forward pass fails.

    Raises:
        ModelError: no group size divides every width.
    """
    for size in (size for size in formats.GROUP_SIZES if size <= wanted):
        if all(width % size == 0 for width in widths):
            if size == wanted:
                return size, None
            return size, f"group size {size}, not {wanted}: {_odd(widths, wanted)}"
    smallest = formats.GROUP_SIZES[-1]
    raise ModelError(
        f"GPTQ cannot store this model: no group size from {smallest} to {wanted} divides the "
        f"width of each layer ({_odd(widths, smallest)}): set "
        "quantize.gptq to []"
    )


def _odd(widths: dict[int, str], size: int) -> str:
    """Return the widths that `size` does not divide in words, each with a layer that has it."""
    odd = [f"{name} is {width} wide" for width, name in sorted(widths.items()) if width % size]
    return ", ".join(odd)


def linear_widths(model_dir: Path) -> dict[int, str]:
    """Return the input widths of the model's linear layers, each with the first layer that has it.

    The embeddings and the output head are not quantised.

    Raises:
        ModelError: the model has no such layers.
    """
    widths: dict[int, str] = {}
    model: Any = empty_model(model_dir)
    for name, module in model.named_modules():
        if module is model.get_output_embeddings():
            continue
        if isinstance(module, torch.nn.Linear):
            widths.setdefault(module.in_features, name)
        elif isinstance(module, Conv1D):
            widths.setdefault(module.nx, name)
    if not widths:
        raise ModelError(f"{model_dir} has no linear layers that GPTQ could quantise")
    return widths


def _quantise(
    model_dir: Path,
    target: Path,
    *,
    rows: list[list[int]],
    bits: int,
    group_size: int,
    desc_act: bool,
) -> None:
    """Run gptqmodel in a child process (run_gptqmodel.py)."""
    if importlib.util.find_spec("gptqmodel") is None:
        raise ToolError(
            "gptqmodel is not installed, but GPTQ exports need it: run `make install`, use the "
            "gptq image, or set quantize.gptq to [] in the recipe"
        )
    job: dict[str, Any] = {
        "model_dir": str(model_dir.resolve()),
        "target": str(target.resolve()),
        "bits": bits,
        "group_size": group_size,
        "desc_act": desc_act,
        "rows": rows,
        "started_at": time.monotonic(),
        "times_file": "times.json",
    }
    settings = {
        # At least two: on two cores the default is one worker, but gptqmodel then asks for two.
        "GPTQMODEL_CPU_WORKERS": str(max(2, len(os.sched_getaffinity(0)))),
        # By default, waiting OpenMP threads stay in a busy loop. If another process is busy, this
        # takes longer than the work.
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    with scratch_directory() as scratch:
        (scratch / "job.json").write_text(json.dumps(job), encoding="utf-8")
        done = run_to_end(
            [sys.executable, "-m", "tuneline.quantize.gptq.run_gptqmodel", "job.json"],
            cwd=scratch,
            env=settings | os.environ,
        )
        times_file = scratch / job["times_file"]
        if times_file.is_file():
            times = json.loads(times_file.read_text(encoding="utf-8"))
            stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in times.items())
            logger.info("gptqmodel: %s", stages)
    if done.returncode != 0:
        raise_if_full(target / SINGLE_FILE)
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise ToolError(
            f"gptqmodel could not quantise the model: {lines[-1] if lines else done.returncode}"
        )


def _take_companions(model_dir: Path, target: Path) -> None:
    """Replace the tokenizer and settings that gptqmodel saved with those of the merged model.

    gptqmodel saves these files with transformers 5. transformers 4 and servers built on it cannot
    load the tokenizer from such files, or compute with other rotary angles. The files also contain
    a temporary path of this machine.
    """
    quantization = json.loads((target / "config.json").read_text(encoding="utf-8"))
    quantization = quantization["quantization_config"]
    settings = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    _drop(quantization, "offload_to_disk_path")
    for name, content in (
        ("config.json", {**settings, "quantization_config": quantization}),
        ("quantize_config.json", quantization),
    ):
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (target / name).write_text(text, encoding="utf-8")
    tokenizer_files.copy_tokenizer(model_dir, target)
    generation = model_dir / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, target / generation.name)


def _drop(node: object, key: str) -> None:
    if isinstance(node, dict):
        node.pop(key, None)
        for value in node.values():
            _drop(value, key)


def _weight_files(model_dir: Path) -> list[Path]:
    return sorted(model_dir.glob("*.safetensors"))


def _tensors(files: list[Path]) -> list[dict[str, Any]]:
    """Return dtype, shape and offsets of each tensor in weight files."""
    return [tensor for file in files for tensor in read_header(file).values()]
