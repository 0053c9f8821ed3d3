"""Merge weights: W' + s B A, where W' is the base's weight as training saw it."""

import json
import logging
import shutil
from pathlib import Path

import torch

from tuneline.artifacts import ModelOrigin, TrainingSummary
from tuneline.errors import ModelError
from tuneline.merge.adapter import Adapter
from tuneline.merge.checkpoint import Checkpoint, write_sharded
from tuneline.merge.config import MergeConfig
from tuneline.nf4 import empty_model, quantized_modules, round_trip

logger = logging.getLogger(__name__)

# Files of an adapter's directory that are not the tokenizer.
_ADAPTERS_OWN = ("adapter_config.json", "adapter_model.safetensors", TrainingSummary.filename)


def merge_weights(
    config: MergeConfig,
    *,
    base_model_dir: Path,
    adapter: Adapter,
    training: TrainingSummary,
    directory: Path,
    device: str,
) -> int:
    """Write the merged weights and config.json into `directory`; return the number of files.

    Every sum is made in fp32 and rounded once, to `config.dtype`.

    Raises:
        ModelError: the base's files name a weight otherwise than the model does.
    """
    base = Checkpoint(base_model_dir)
    dtype = getattr(torch, config.dtype)
    trained_dtype = getattr(torch, training.compute_dtype)
    in_4bit = set()
    if training.base_quantization == "nf4" and config.base == "dequantized":
        in_4bit = {f"{name}.weight" for name in quantized_modules(empty_model(base_model_dir))}
    adapted = {f"{name}.weight": name for name in adapter.modules}
    _check_names(base, in_4bit | set(adapted) | set(adapter.replaced), base_model_dir)
    _check_tied(adapter, base_model_dir)

    def make(name: str) -> torch.Tensor:
        weight = adapter.replaced.get(name)
        if weight is None:
            weight = base.read(name)
        if not weight.is_floating_point():
            return weight
        if name in in_4bit:
            weight = round_trip(weight, dtype=trained_dtype, device=device)
        if name in adapted:
            weight = weight.float() + adapter.delta(adapted[name])
        return weight.to(dtype)

    sizes = {
        name: base.num_elements(name) * dtype.itemsize
        if base.is_floating(name)
        else base.read(name).nbytes
        for name in base.names
    }
    logger.info(
        "merging %d of %d tensors, %d of them from NF4", len(adapted), len(sizes), len(in_4bit)
    )
    num_shards = write_sharded(directory, sizes, make, max_shard_bytes=config.max_shard_bytes)
    settings = json.loads((base_model_dir / "config.json").read_text(encoding="utf-8"))
    settings.pop("torch_dtype", None)
    settings["dtype"] = config.dtype
    (directory / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return num_shards


def copy_companions(*, base_model_dir: Path, adapter_dir: Path, directory: Path) -> None:
    """Carry along what stands beside the weights.

    From the base: generation_config.json, licence, tokenizer. From the adapter: the tokenizer
    and the chat template again, because training may have used another template.
    """
    left_out = ("config.json", ModelOrigin.filename)
    for path in sorted(base_model_dir.iterdir()):
        is_weight = ".safetensors" in path.name or path.suffix in (".bin", ".gguf", ".pt", ".pth")
        if path.is_file() and not is_weight and path.name not in left_out:
            shutil.copyfile(path, directory / path.name)
    for path in sorted(adapter_dir.iterdir()):
        if path.is_file() and path.name not in (*_ADAPTERS_OWN, "README.md"):
            shutil.copyfile(path, directory / path.name)


def _check_names(base: Checkpoint, needed: set[str], base_model_dir: Path) -> None:
    missing = sorted(needed - set(base.names))
    if missing:
        raise ModelError(
            f"{base_model_dir} has no tensor {missing[0]}, which the model's own names call for "
            f"({len(missing)} such): the adapter is for another model, or this architecture's "
            "files name or fuse weights differently, which is not merged here"
        )


def _check_tied(adapter: Adapter, base_model_dir: Path) -> None:
    """Refuse retrained embeddings where input and output share one matrix."""
    if not adapter.replaced:
        return
    model = empty_model(base_model_dir)
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    ends = {model.get_input_embeddings(), model.get_output_embeddings()}
    for name in adapter.replaced:
        module = name.rpartition(".")[0]
        if tied and model.get_submodule(module) in ends:
            raise ModelError(
                f"the adapter retrained {module}, and this model's input and output embeddings "
                "are one matrix: train without it in modules_to_save"
            )
