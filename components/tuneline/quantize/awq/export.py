"""Make AWQ checkpoints with gptqmodel, and load them again with transformers.

AWQ scales the input channels of a layer by the size of their activations before it rounds, and
divides the norm or the layer before by the same scales. Weights are 4 bits with a scale and a zero
point per group, in the layout that AutoAWQ calls GEMM.
"""

import json
from pathlib import Path
from typing import Any, Literal

from tuneline.artifacts import QuantizedModel
from tuneline.errors import ModelError
from tuneline.quantize.awq.families import awq_problem
from tuneline.quantize.checkpoint.calibrated import export_calibrated
from tuneline.quantize.checkpoint.experts import check_experts
from tuneline.quantize.checkpoint.layers import choose_group_size, linear_layers
from tuneline.quantize.config import QuantizeConfig

# What vLLM loads, according to its awq_marlin.py and marlin_utils.py of 2026.
VLLM_GROUP_SIZES = (32, 64, 128)
LARGEST_GROUP_SIZE = 128
"""Largest group that gptqmodel's AWQ kernels support, which transformers loads checkpoints with."""
NUM_PACKED, NUM_CLIPPED = 8, 64
"""Numbers that the outputs of a layer must be multiples of. AWQ packs eight outputs in a word, and
gptqmodel looks for the bounds at which weights are clipped for 64 outputs at a time."""
NOT_CLIPPED = ("q_", "k_", "query", "key", "Wqkv")
"""Parts of the names of layers whose weights gptqmodel does not clip."""


def export(
    config: QuantizeConfig, *, format: str, merged_dir: Path, dataset_dir: Path, target: Path
) -> QuantizedModel:
    """Make and check one AWQ checkpoint, on a GPU if the model fits and on the CPU otherwise.

    Args:
        config: the `quantize` section of the recipe.
        format: name of the format.
        merged_dir: directory of the merged model.
        dataset_dir: directory that prepare made; the scales are calibrated on its training rows.
        target: directory to write the checkpoint to.

    Returns:
        The record of the checkpoint.

    Raises:
        DataError: there are no training rows.
        ModelError: AWQ cannot store the model, see `check`.
        ToolError: gptqmodel is missing or failed.
        ProofError: the checkpoint does not load or does not answer, or its predictions are further
            from the merged model's than the bound allows.
    """
    group_size, note = check(config, merged_dir)
    notes = [note] if note else []
    for_vllm = group_size in VLLM_GROUP_SIZES
    if not for_vllm:
        notes.append(f"vLLM has no kernel for AWQ in groups of {group_size}")
    record = export_calibrated(
        config,
        format=format,
        merged_dir=merged_dir,
        dataset_dir=dataset_dir,
        target=target,
        group_size=group_size,
        desc_act=False,
        dtype=_dtype(merged_dir),
    )
    return record.model_copy(
        update={"group_size": group_size, "vllm_has_kernel": for_vllm, "notes": notes}
    )


def check(config: QuantizeConfig, model_dir: Path) -> tuple[int, str | None]:
    """Check that AWQ can store a model; return the group size, and a note if it is not the wanted.

    Args:
        config: the `quantize` section of the recipe.
        model_dir: directory of the merged model, or of the base model, whose layers are the same.

    Raises:
        ModelError: gptqmodel does not support the family, no group size fits the inputs of the
            model's layers, the number of outputs of a layer is not a multiple of what AWQ works
            on, or the model is a mixture of experts.
    """
    check_experts(model_dir, "awq")
    problem = awq_problem(_settings(model_dir))
    if problem is not None:
        raise ModelError(f"{problem}: set quantize.awq to [], and take gptq-4bit or fp8")
    widths: dict[int, str] = {}
    for name, (num_inputs, num_outputs) in linear_layers(model_dir).items():
        is_clipped = not any(part in name for part in NOT_CLIPPED)
        divisor = NUM_CLIPPED if is_clipped else NUM_PACKED
        if num_outputs % divisor:
            raise ModelError(
                f"AWQ cannot store this model: {name} has {num_outputs} outputs, which is not a "
                f"multiple of {divisor}: set quantize.awq to []"
            )
        widths.setdefault(num_inputs, name)
    return choose_group_size(widths, config.group_size, kind="awq", largest=LARGEST_GROUP_SIZE)


def _dtype(model_dir: Path) -> Literal["float16", "bfloat16"]:
    """Return the dtype to compute and to store scales in: the model's, or bfloat16."""
    settings = _settings(model_dir)
    dtype = settings.get("dtype") or settings.get("torch_dtype")
    return "float16" if dtype == "float16" else "bfloat16"


def _settings(model_dir: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    return settings
