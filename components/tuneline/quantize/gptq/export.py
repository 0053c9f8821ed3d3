"""Make GPTQ checkpoints with gptqmodel, and load them again with transformers."""

from pathlib import Path

from tuneline.artifacts import QuantizedModel
from tuneline.quantize import formats
from tuneline.quantize.checkpoint.calibrated import export_calibrated
from tuneline.quantize.checkpoint.experts import check_experts
from tuneline.quantize.checkpoint.layers import choose_group_size, linear_widths
from tuneline.quantize.config import QuantizeConfig

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
    group_size, note = check(config, merged_dir)
    notes = [note] if note else []
    bits = formats.FORMATS[format].bits
    for_vllm = bits in VLLM_BITS and group_size in VLLM_GROUP_SIZES
    if not for_vllm:
        notes.append(f"vLLM has no kernel for {bits} bits in groups of {group_size}")
    record = export_calibrated(
        config,
        format=format,
        merged_dir=merged_dir,
        dataset_dir=dataset_dir,
        target=target,
        group_size=group_size,
        desc_act=config.desc_act,
        dtype="float16",
    )
    return record.model_copy(
        update={"group_size": group_size, "vllm_has_kernel": for_vllm, "notes": notes}
    )


def check(config: QuantizeConfig, model_dir: Path) -> tuple[int, str | None]:
    """Check that GPTQ can store a model; return the group size, and a note if it is not the wanted.

    Args:
        config: the `quantize` section of the recipe.
        model_dir: directory of the merged model, or of the base model, whose layers are the same.

    Raises:
        ModelError: no group size fits the model's layers, or the model is a mixture of experts.
    """
    check_experts(model_dir, "gptq")
    return choose_group_size(linear_widths(model_dir), config.group_size, kind="gptq")
