"""A new LoRA adapter on a base model."""

import difflib
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from tuneline.artifacts import ModelOrigin
from tuneline.errors import ModelError
from tuneline.nf4 import empty_model
from tuneline.train.config import LoraConfig

if TYPE_CHECKING:
    import peft
    import torch

logger = logging.getLogger(__name__)


def check_targets(lora: LoraConfig, base_model_dir: str | Path) -> None:
    """Refuse target modules that the model does not have, before its weights are read.

    Raises:
        ModelError: a name matches no linear layer, or it is the output layer.
    """
    import torch

    if lora.target_modules == "all-linear":
        return
    model = empty_model(base_model_dir)
    linear = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    head = model.get_output_embeddings()
    for target in lora.target_modules:
        matched = [name for name in linear if name == target or name.endswith(f".{target}")]
        if not matched:
            known = sorted({name.rsplit(".", 1)[-1] for name in linear})
            near = difflib.get_close_matches(target, known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(known)}"
            raise ModelError(
                f"lora.target_modules names '{target}', and no linear layer of "
                f"{type(model).__name__} is called so: {hint}"
            )
        if any(model.get_submodule(name) is head for name in matched):
            raise ModelError(
                f"lora.target_modules names '{target}', the output layer, which cannot carry an "
                "adapter: leave it out"
            )


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
        bias="none",
    )


def keep_adapter_in_fp32(model: "torch.nn.Module") -> None:
    """Undo TRL's cast of a 4-bit model's adapter to bfloat16.

    bfloat16 has 8 bits of mantissa: late in the schedule an update is smaller than the last of
    them and is lost. The adapter is under a hundredth of the model, so fp32 costs little, and
    autocast still multiplies in the compute type.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def save_adapter(model: "peft.PeftModel", directory: Path, origin: ModelOrigin) -> None:
    """Write adapter_model.safetensors and adapter_config.json, with no path of this machine."""
    config = model.peft_config["default"]
    config.base_model_name_or_path = origin.source
    config.revision = origin.revision
    # peft would ask the Hub whether the vocabulary grew; ours never does in this step.
    model.save_pretrained(str(directory), save_embedding_layers=False)
    # Its model card has no content yet; publish writes one with the scores.
    (directory / "README.md").unlink(missing_ok=True)
