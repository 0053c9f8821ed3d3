"""Refuse settings that a base model in 4 bits cannot serve, before its weights are read."""

from pathlib import Path

from tuneline.errors import RecipeError
from tuneline.models.stored_quantisation import stored_type
from tuneline.train.config import TrainConfig


def check_stored_base(config: TrainConfig, base_model_dir: str | Path) -> None:
    """Check that the recipe asks for nothing that only weights in 16 bits have.

    Raises:
        RecipeError: the base model's files hold 4-bit weights, and a setting needs other ones.
    """
    stored = stored_type(base_model_dir)
    if stored is None:
        return
    way_out = "or take as base_model the model in 16 bits that it was made from"
    if not config.load_in_4bit:
        raise RecipeError(
            f"train.load_in_4bit is false, but the base model's files hold its weights in 4 bits "
            f"({stored}): set it to true, {way_out}"
        )
    if config.lora.init_lora_weights == "loftq":
        raise RecipeError(
            "train.lora.init_lora_weights is loftq, which starts from the error of 4-bit weights, "
            f"but the base model's files hold the 4-bit weights ({stored}) alone: set it to "
            f"default, {way_out}"
        )
