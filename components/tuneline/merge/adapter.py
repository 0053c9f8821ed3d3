"""Read an adapter: low-rank updates of linear layers and of stacks of experts.

peft adapts a stack of experts by its parameter (`target_parameters`). Where it adapts two of a
module's parameters, it nests one wrapper in the other:

    experts.base_layer.lora_A.weight [E r, inputs], lora_B.weight [outputs, r E]    the first one
    experts.lora_A.weight, experts.lora_B.weight                                    the last one

Legend: E experts, r the rank, I inputs and O outputs of a layer.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file

from tuneline.errors import ModelError
from tuneline.models.adapter_files import CONFIG_FILE, WEIGHTS_FILE

_PREFIX = "base_model.model."
_A = ".lora_A.weight"
_B = ".lora_B.weight"
_NESTED = ".base_layer"

# Settings of peft.LoraConfig that affect the merged weight -> the only value supported here.
_PLAIN: dict[str, Any] = {
    "fan_in_fan_out": False,
    "use_dora": False,
    "lora_bias": False,
    "bias": "none",
}


@dataclass(frozen=True)
class Update:
    """A low-rank update s B A of a weight [outputs, inputs]."""

    a_rI: torch.Tensor
    b_Or: torch.Tensor
    scale: float

    def rows(self, start: int, stop: int) -> "Update":
        """Return the update of some rows of the weight."""
        return Update(self.a_rI, self.b_Or[start:stop], self.scale)

    @property
    def transposed(self) -> "Update":
        """The update of the transposed weight."""
        return Update(self.b_Or.T, self.a_rI.T, self.scale)

    def add_to(self, weight: torch.Tensor) -> torch.Tensor:
        """Return W + s * B @ A in fp32."""
        # One call, because a separate product B @ A would be one more matrix of the weight's size.
        return torch.addmm(weight.float(), self.b_Or.float(), self.a_rI.float(), alpha=self.scale)


class Adapter:
    """A LoRA adapter: low-rank updates, and weights that were trained in full.

    Attributes:
        modules: names of what has a low-rank update, as in the adapter's file.
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
                "and experts, and modules_to_save, are supported"
            )
        self.replaced = {
            name.removeprefix(_PREFIX).replace(".modules_to_save.default", ""): tensors[name]
            for name in others
        }

    def targets(self, model: torch.nn.Module) -> dict[str, str]:
        """Return the entries of `modules` by the names of the model's parameters that they update.

        Args:
            model: the base model, empty.

        Raises:
            ModelError: the model has no such parameter.
        """
        names: dict[str, str] = {}
        levels: dict[str, list[str]] = {}
        for key in self.modules:
            levels.setdefault(key.replace(_NESTED, ""), []).append(key)
        parameters = dict(model.named_parameters())
        for module, keys in levels.items():
            updated = [f"{module}.weight"]
            if updated[0] not in parameters:
                # As peft nests wrappers: the first parameter's is the innermost.
                updated = [
                    name
                    for name in parameters
                    if name.rpartition(".")[0] == module and self._targets_parameter(name)
                ]
            if len(updated) != len(keys):
                raise ModelError(
                    f"the adapter has {len(keys)} updates of {module}, but the base model has "
                    f"{len(updated)} weights there that they could belong to: the adapter belongs "
                    "to another model"
                )
            innermost_first = sorted(keys, key=lambda key: -key.count(_NESTED))
            names.update(zip(updated, innermost_first, strict=True))
        return names

    def update(self, key: str, parameter: str) -> Update:
        """Return the update of a weight [outputs, inputs].

        Args:
            key: an entry of `modules`.
            parameter: name of the parameter that it updates, see `targets`.
        """
        a_rI, b_Or = self._a[key], self._b[key]
        return Update(a_rI, b_Or, self._scale(parameter, a_rI.shape[0]))

    def expert_update(self, key: str, parameter: str, expert: int, num_experts: int) -> Update:
        """Return the update of one expert of a stack, as a weight [outputs, inputs].

        Args:
            key: an entry of `modules`.
            parameter: name of the stack's parameter.
            expert: number of the expert.
            num_experts: number of experts in the stack.
        """
        a, b = self._a[key], self._b[key]
        a_rI = a.view(num_experts, -1, a.shape[1])[expert]
        b_Or = b.view(b.shape[0], -1, num_experts)[..., expert]
        return Update(a_rI, b_Or, self._scale(parameter, a_rI.shape[0]))

    def _scale(self, parameter: str, rank: int) -> float:
        patterns: Any = self._config.get("alpha_pattern") or {}
        # peft matches a linear layer by its module's name, and a stack by its parameter's.
        name = parameter.removesuffix(".weight")
        alpha: Any = patterns.get(get_pattern_key(patterns, name), self._config["lora_alpha"])
        return float(alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank))

    def _targets_parameter(self, name: str) -> bool:
        targets = self._config.get("target_parameters") or ()
        return any(name == target or name.endswith(f".{target}") for target in targets)


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
