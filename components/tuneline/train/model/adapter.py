"""The LoRA adapter: its number format, and its files."""

from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils import ModulesToSaveWrapper

from tuneline.artifacts import ModelOrigin
from tuneline.errors import TrainingError
from tuneline.models.adapter_files import make_portable
from tuneline.train.config import LoraConfig


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
    config: Any = model.peft_config["default"]
    config.base_model_name_or_path = origin.source
    config.revision = origin.revision
    if config.target_parameters:
        # peft loads no adapter that has both. Dropout has an effect in training only.
        config.lora_dropout = 0.0
    # Otherwise peft asks the Hub whether the vocabulary has grown. This step never changes it.
    model.save_pretrained(str(directory), save_embedding_layers=False)
    defaults: Any = peft.LoraConfig()
    make_portable(directory, defaults.to_dict())
    # peft's model card is an empty form. The publish step writes a card with the scores.
    (directory / "README.md").unlink(missing_ok=True)
