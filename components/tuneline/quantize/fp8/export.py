"""Write FP8 checkpoints of compressed-tensors, and load them again with transformers.

The scheme is the one that compressed-tensors calls FP8_DYNAMIC. Weights are 8-bit floats (E4M3)
with a scale per output channel. Activations are rounded to FP8 when the model runs, with a scale
per token, so nothing is calibrated.
"""

import functools
import importlib.util
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tuneline.artifacts import QuantizedModel
from tuneline.errors import ModelError, ToolError
from tuneline.models.checkpoint import Checkpoint, Spec
from tuneline.models.nf4 import empty_model
from tuneline.models.sharded_files import write_sharded
from tuneline.quantize.checkpoint.companions import take_companions
from tuneline.quantize.checkpoint.experts import check_experts
from tuneline.quantize.checkpoint.layers import linear_layers
from tuneline.quantize.checkpoint.proof import prove
from tuneline.quantize.config import QuantizeConfig
from tuneline.quantize.machine import few_threads
from tuneline.quantize.proof.reference import for_export
from tuneline.quantize.proof.transformers_model import choose_device

logger = logging.getLogger(__name__)

SCHEME = "FP8_DYNAMIC"
MAX_SHARD_BYTES = 4 << 30


def export(
    config: QuantizeConfig, *, format: str, merged_dir: Path, dataset_dir: Path, target: Path
) -> QuantizedModel:
    """Make and check an FP8 checkpoint, on a GPU if the model fits and on the CPU otherwise.

    Args:
        config: the `quantize` section of the recipe.
        format: name of the format.
        merged_dir: directory of the merged model.
        dataset_dir: directory that prepare made; the export is compared on its held-out rows.
        target: directory to write the checkpoint to.

    Returns:
        The record of the checkpoint.

    Raises:
        ModelError: FP8 cannot store the model, see `check`.
        ToolError: compressed-tensors is missing.
        ProofError: the checkpoint does not load or does not answer, or its predictions are further
            from the merged model's than the bound allows.
    """
    if importlib.util.find_spec("compressed_tensors") is None:
        raise ToolError(
            "compressed-tensors is not installed, but FP8 exports need it: run `make install`, use "
            "the gptq image, or set quantize.fp8 to [] in the recipe"
        )
    layers = check(merged_dir)
    device = choose_device(merged_dir)
    with few_threads():
        # First, because it refuses a model that computes NaN.
        merged = for_export(config, merged_dir, dataset_dir, device)
        write_fp8(merged_dir, target, layers)
        write_config(merged_dir, target)
        take_companions(merged_dir, target)
        record = prove(
            config,
            merged_dir,
            target,
            format=format,
            reference=merged,
            dtype=torch.float32 if device == "cpu" else "auto",
            device=device,
            has_speed=False,
        )
    return record.model_copy(update={"vllm_has_kernel": True})


def check(model_dir: Path) -> set[str]:
    """Check that FP8 can store a model; return the names of the weights to quantise.

    Args:
        model_dir: directory of the merged model, or of the base model, whose layers are the same.

    Raises:
        ModelError: the model is a mixture of experts, or its files name the weights of its linear
            layers in another way than transformers does.
    """
    check_experts(model_dir, "fp8")
    weights = {f"{name}.weight" for name in linear_layers(model_dir)}
    specs = Checkpoint(model_dir).specs
    for name in sorted(weights):
        if name not in specs or len(specs[name].shape) != 2:
            raise ModelError(
                f"FP8 cannot store this model: its files have no matrix {name}, as transformers "
                "calls the weight of a linear layer: set quantize.fp8 to [], and take gptq-8bit in "
                "quantize.gptq or q8_0 in quantize.gguf"
            )
    return weights


def write_fp8(model_dir: Path, target: Path, layers: set[str]) -> None:
    """Write the weights of a model, those of linear layers in FP8, one tensor at a time.

    Args:
        model_dir: directory of the model.
        target: directory to write the files to.
        layers: names of the weights to quantise.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = _scheme()
    compressor: Any = BaseCompressor.get_value_from_registry("float-quantized")
    checkpoint = Checkpoint(model_dir)
    specs: dict[str, Spec] = {}
    weight_of: dict[str, str] = {}
    for name, spec in checkpoint.specs.items():
        specs[name] = spec
        if name in layers:
            specs[name] = Spec(scheme.weights.pytorch_dtype(), spec.shape)
            scale = f"{name}_scale"
            specs[scale] = Spec(spec.dtype, (spec.shape[0], 1))
            weight_of[scale] = name

    @functools.lru_cache(maxsize=1)  # A weight's scale is written right after the weight.
    def compressed(name: str) -> dict[str, torch.Tensor]:
        weight_OI = checkpoint.read(name)
        low_O1, high_O1 = torch.aminmax(weight_OI, dim=1, keepdim=True)
        scale_O1, _ = calculate_qparams(low_O1, high_O1, scheme.weights)
        made: dict[str, torch.Tensor] = compressor.compress(
            {"weight": weight_OI, "weight_scale": scale_O1}, scheme
        )
        return made

    def make(name: str) -> Iterator[torch.Tensor]:
        if name in layers:
            yield compressed(name)["weight"]
        elif name in weight_of:
            yield compressed(weight_of[name])["weight_scale"]
        else:
            yield checkpoint.read(name)

    write_sharded(target, specs, make, max_shard_bytes=MAX_SHARD_BYTES)
    logger.info("%d of %d tensors are in FP8", len(layers), len(checkpoint.specs))


def write_config(model_dir: Path, target: Path) -> None:
    """Write the model's config.json with the `quantization_config` of compressed-tensors.

    Args:
        model_dir: directory of the model.
        target: directory of the checkpoint.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    model: Any = empty_model(model_dir)
    head = model.get_output_embeddings()
    ignore = [name for name, module in model.named_modules() if module is head]
    scheme = _scheme()
    scheme.format = "float-quantized"
    quantization = QuantizationConfig(
        config_groups={"group_0": scheme},
        format="float-quantized",
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=ignore,
    )
    shutil.copyfile(model_dir / "config.json", target / "config.json")
    ModelCompressor(quantization_config=quantization).update_config(str(target))


def _scheme() -> Any:
    from compressed_tensors.quantization import preset_name_to_scheme

    return preset_name_to_scheme(SCHEME, targets=["Linear"])
