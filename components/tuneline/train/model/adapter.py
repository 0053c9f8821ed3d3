"""A new LoRA adapter on a base model."""

import difflib
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tuneline.artifacts import ModelOrigin
from tuneline.errors import ModelError
from tuneline.models.nf4 import empty_model
from tuneline.train.config import LoraConfig

if TYPE_CHECKING:
    import peft
    import torch
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def check_targets(lora: LoraConfig, base_model_dir: str | Path) -> None:
    """Refuse modules that the model does not have, before its weights are read.

    Raises:
        ModelError: a name matches no layer that can be trained so.
    """
    if lora.target_modules == "all-linear" and not lora.modules_to_save:
        return
    model = empty_model(base_model_dir)
    ends = {model.get_input_embeddings(): "input", model.get_output_embeddings(): "output"}
    if lora.target_modules != "all-linear":
        for module in _named(model, "target_modules", lora.target_modules):
            if ends.get(model.get_submodule(module)) == "output":
                raise ModelError(
                    f"lora.target_modules names '{module}', the output layer, which cannot carry "
                    "an adapter: leave it out, or train it in full as one of lora.modules_to_save"
                )
    is_tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    for module in _named(model, "modules_to_save", lora.modules_to_save):
        if is_tied and model.get_submodule(module) in ends:
            raise ModelError(
                f"lora.modules_to_save names '{module}', and the input and output embeddings of "
                f"{type(model).__name__} are one matrix here (tie_word_embeddings): an adapter "
                "can replace either of them, not both as one; leave it out"
            )


def _named(model: "PreTrainedModel", key: str, names: Iterable[str]) -> list[str]:
    """Return the modules that some names mean, whole names or their last parts."""
    import torch

    kinds: tuple[type, ...] = (torch.nn.Linear,)
    what = "linear layer"
    if key == "modules_to_save":
        kinds, what = (torch.nn.Linear, torch.nn.Embedding), "linear layer or embedding"
    there = [name for name, module in model.named_modules() if type(module) in kinds]
    found = []
    for wanted in names:
        matched = [name for name in there if is_called(name, wanted)]
        if not matched:
            known = sorted({name.rsplit(".", 1)[-1] for name in there})
            near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(known)}"
            raise ModelError(
                f"lora.{key} names '{wanted}', and no {what} of {type(model).__name__} is called "
                f"so: {hint}"
            )
        found += matched
    return found


def is_called(module: str, name: str) -> bool:
    """Whether a module's whole name is, or ends with, one that a recipe gives."""
    return module == name or module.endswith(f".{name}")


def lora_config(lora: LoraConfig) -> "peft.LoraConfig":
    """Return the same settings in peft's words."""
    import peft

    names = lora.target_modules
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        use_rslora=lora.use_rslora,
        target_modules=names if isinstance(names, str) else list(names),
        modules_to_save=list(lora.modules_to_save) or None,
        bias="none",
    )


def keep_adapter_in_fp32(model: "torch.nn.Module") -> None:
    """Undo TRL's cast of a 4-bit model's adapter to bfloat16.

    bfloat16 has 8 bits of mantissa: late in the schedule an update is smaller than the last of
    them and is lost. The adapter is under a hundredth of the model, so fp32 costs little, and
    autocast still multiplies in the compute type. Modules that are trained in full are the base's
    once more: what the cast took from them is in the base.
    """
    from peft.utils import ModulesToSaveWrapper

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for copy in module.modules_to_save.values():
                copy.load_state_dict(module.original_module.state_dict())


def keep_hidden_states_in(model: "torch.nn.Module", dtype: "torch.dtype") -> None:
    """Let an embedding that is trained, in fp32, give what the base's own gives: the compute type.

    Otherwise all layers would run on fp32 hidden states.
    """
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    if any(parameter.requires_grad for parameter in embedding.parameters()):
        embedding.register_forward_hook(lambda module, inputs, output: output.to(dtype))


def save_adapter(model: "peft.PeftModel", directory: Path, origin: ModelOrigin) -> None:
    """Write adapter_model.safetensors and adapter_config.json, with no path of this machine."""
    config = model.peft_config["default"]
    config.base_model_name_or_path = origin.source
    config.revision = origin.revision
    # peft would ask the Hub whether the vocabulary grew; ours never does in this step.
    model.save_pretrained(str(directory), save_embedding_layers=False)
    # Its model card has no content yet; publish writes one with the scores.
    (directory / "README.md").unlink(missing_ok=True)
