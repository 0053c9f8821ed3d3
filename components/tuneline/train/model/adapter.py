"""The LoRA adapter: which modules it may be attached to, its number format, and its files."""

import difflib
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils import ModulesToSaveWrapper
from transformers import PreTrainedModel

from tuneline.artifacts import ModelOrigin
from tuneline.errors import ModelError, TrainingError
from tuneline.models.adapter_files import make_portable
from tuneline.models.nf4 import empty_model
from tuneline.train.config import LoraConfig
from tuneline.train.model.expert_targets import check_experts, target_experts

logger = logging.getLogger(__name__)


def check_targets(lora: LoraConfig, base_model_dir: str | Path) -> None:
    """Check that the base model has the modules that the recipe names, without reading weights.

    Raises:
        ModelError: a name matches no module, or a module that cannot be trained in this way.
    """
    model: Any = empty_model(base_model_dir)
    check_experts(lora, model)
    if lora.target_modules == "all-linear" and not lora.modules_to_save:
        return
    ends = {model.get_input_embeddings(): "input", model.get_output_embeddings(): "output"}
    if lora.target_modules != "all-linear":
        for module in _named(model, "target_modules", lora.target_modules):
            if ends.get(model.get_submodule(module)) == "output":
                raise ModelError(
                    f"lora.target_modules names '{module}', the output layer, which cannot have an "
                    "adapter: remove it, or train it in full as one of lora.modules_to_save"
                )
    is_tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    for module in _named(model, "modules_to_save", lora.modules_to_save):
        if is_tied and model.get_submodule(module) in ends:
            raise ModelError(
                f"lora.modules_to_save names '{module}', but the input and output embeddings of "
                f"{type(model).__name__} are one matrix here (tie_word_embeddings): an adapter "
                "cannot replace both as one; remove it from lora.modules_to_save"
            )


def _named(model: PreTrainedModel, key: str, names: Iterable[str]) -> list[str]:
    """Return the full names of the modules that the recipe's names for a key refer to."""
    kinds: tuple[type, ...] = (torch.nn.Linear,)
    what = "linear layer"
    if key == "modules_to_save":
        kinds, what = (torch.nn.Linear, torch.nn.Embedding), "linear layer or embedding"
    candidates = [name for name, module in model.named_modules() if type(module) in kinds]
    modules = []
    for wanted in names:
        matched = [name for name in candidates if is_called(name, wanted)]
        if not matched:
            ends = sorted({name.rsplit(".", 1)[-1] for name in candidates})
            near = difflib.get_close_matches(wanted, ends, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(ends)}"
            raise ModelError(
                f"lora.{key} names '{wanted}', but {type(model).__name__} has no {what} of this "
                f"name: {hint}"
            )
        modules += matched
    return modules


def is_called(module: str, name: str) -> bool:
    """Return whether a module's full name equals a name in the recipe, or ends with that name."""
    return module == name or module.endswith(f".{name}")


def lora_config(lora: LoraConfig, model: PreTrainedModel) -> peft.LoraConfig:
    """Return peft's settings of the adapter.

    Args:
        lora: the recipe's LoRA settings.
        model: the base model, before it has an adapter.
    """
    names = lora.target_modules
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        use_rslora=lora.use_rslora,
        target_modules=names if isinstance(names, str) else list(names),
        modules_to_save=list(lora.modules_to_save) or None,
        bias="none",
    )
    target_experts(config, lora, model)
    return config


def keep_adapter_in_fp32(model: torch.nn.Module) -> None:
    """Undo TRL's cast of a 4-bit model's adapter to bfloat16.

    bfloat16 has 8 bits of mantissa: late in the schedule an update is smaller than the last bit
    and is lost. The adapter is under a hundredth of the model, so fp32 costs little memory, and
    autocast still multiplies in the compute type. Modules that are trained in full are copied from
    the base again, to restore the bits that the cast removed.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for copy in module.modules_to_save.values():
                copy.load_state_dict(module.original_module.state_dict())


def keep_hidden_states_in(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Make a trained embedding, whose weights are fp32, return values in the compute type.

    Otherwise the hidden states of all layers would be fp32.
    """
    pretrained: Any = model
    embedding = pretrained.get_input_embeddings()
    if any(parameter.requires_grad for parameter in embedding.parameters()):
        embedding.register_forward_hook(lambda module, inputs, output: output.to(dtype))


def check_it_has_learned(model: peft.PeftModel, lora: LoraConfig) -> None:
    """Refuse an adapter that changes nothing: its matrices B are zero, as before training.

    Raises:
        TrainingError: no step has changed the adapter.
    """
    if lora.init_lora_weights != "default" or lora.modules_to_save:
        return
    up = [weight for name, weight in model.named_parameters() if "lora_B" in name]
    if not any(bool(weight.any()) for weight in up):
        raise TrainingError(
            f"training changed none of the {len(up)} matrices B of the adapter, so the tuned model "
            "would be the base model: no gradient reached them. Check that the rows teach "
            "something (that answers are not empty, and that the two answers of a pair differ), "
            "and that train.learning_rate is not tiny"
        )


def save_adapter(model: peft.PeftModel, directory: Path, origin: ModelOrigin) -> None:
    """Write adapter_model.safetensors and adapter_config.json, without paths of this machine."""
    config = model.peft_config["default"]
    config.base_model_name_or_path = origin.source
    config.revision = origin.revision
    # Otherwise peft asks the Hub whether the vocabulary has grown. This step never changes it.
    model.save_pretrained(str(directory), save_embedding_layers=False)
    defaults: Any = peft.LoraConfig()
    make_portable(directory, defaults.to_dict())
    # peft's model card is an empty form. The publish step writes a card with the scores.
    (directory / "README.md").unlink(missing_ok=True)
