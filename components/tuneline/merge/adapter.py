"""Read an adapter, and add its updates to the base model's weights."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tuneline.errors import ModelError
from tuneline.models.adapter_files import CONFIG_FILE, WEIGHTS_FILE

_PREFIX = "base_model.model."
_A = ".lora_A.weight"
_B = ".lora_B.weight"

# Settings of peft.LoraConfig that affect the merged weight -> the only value supported here.
_PLAIN: dict[str, Any] = {
    "fan_in_fan_out": False,
    "use_dora": False,
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "bias": "none",
}


class Adapter:
    """A LoRA adapter: low-rank updates, and weights that were trained in full.

    Attributes:
        modules: the base model's names of the modules that have a low-rank update.
        replaced: weights that were trained in full, by the base model's name of the tensor that
            each one replaces.
    """

    def __init__(self, adapter_dir: str | Path) -> None:
        """Read the adapter.

        Raises:
            ModelError: a file is missing, or this kind of adapter is not supported.
        """
        directory = Path(adapter_dir)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (directory / name).is_file():
                raise ModelError(f"{directory} has no {name}: give the directory that train made")
        self._config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
        _check_plain(self._config, directory)
        tensors = load_file(directory / WEIGHTS_FILE)
        self._a = _with_suffix(tensors, _A)
        self._b = _with_suffix(tensors, _B)
        if set(self._a) != set(self._b):
            odd = sorted(set(self._a) ^ set(self._b))
            raise ModelError(
                f"{directory}: {odd[0]} has only one of lora_A and lora_B; train again"
            )
        self.modules = set(self._a)
        others = [name for name in tensors if not name.endswith((_A, _B))]
        strange = [name for name in others if "lora_" in name or not name.startswith(_PREFIX)]
        if strange:
            raise ModelError(
                f"{directory}: cannot merge the tensor {strange[0]}: only LoRA on linear layers "
                "and modules_to_save are supported"
            )
        self.replaced = {
            name.removeprefix(_PREFIX).replace(".modules_to_save.default", ""): tensors[name]
            for name in others
        }

    def factors(self, module: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Return A [rank, in], B [out, rank] and the scale s of a module's update s * B @ A."""
        a_ri, b_or = self._a[module], self._b[module]
        rank, alpha = a_ri.shape[0], self._config["lora_alpha"]
        scale = alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)
        return a_ri, b_or, scale

    def add_to(self, weight: torch.Tensor, module: str) -> torch.Tensor:
        """Return W + s * B @ A in fp32, [out_features, in_features]."""
        a_ri, b_or, scale = self.factors(module)
        # One call, because a separate product B @ A would be one more matrix of the weight's size.
        return torch.addmm(weight.float(), b_or.float(), a_ri.float(), alpha=scale)


def _check_plain(config: dict[str, Any], directory: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise ModelError(
            f"{directory} is a {config.get('peft_type')} adapter: only LORA is supported"
        )
    for key, plain in _PLAIN.items():
        if config.get(key, plain) not in (plain, None):
            raise ModelError(
                f"{directory}: the adapter has {key}={config[key]!r}, which is not supported: "
                "remove it from the adapter's config and train again"
            )


def _with_suffix(tensors: dict[str, torch.Tensor], suffix: str) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix(_PREFIX).removesuffix(suffix): tensor
        for name, tensor in tensors.items()
        if name.endswith(suffix)
    }
