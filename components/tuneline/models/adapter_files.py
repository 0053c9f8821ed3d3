"""Write an adapter's configuration so that older versions of peft read it; check its tensors."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tuneline.errors import ModelError

CONFIG_FILE = "adapter_config.json"

_KEYS_OF_PEFT_0_13 = frozenset(
    """
    alpha_pattern auto_mapping base_model_name_or_path bias fan_in_fan_out inference_mode
    init_lora_weights layer_replication layers_pattern layers_to_transform loftq_config lora_alpha
    lora_dropout megatron_config megatron_core modules_to_save peft_type r rank_pattern revision
    target_modules task_type use_dora use_rslora
    """.split()
)
"""peft refuses an adapter with a key that its version does not know."""


def make_portable(directory: Path, defaults: dict[str, Any]) -> None:
    """Drop the keys from adapter_config.json that older versions do not know and do not need.

    A key that has another value than its default stays: an older version must not load an adapter
    that it would compute differently.

    Args:
        directory: directory of the adapter.
        defaults: the defaults of this peft's settings.
    """
    path = directory / CONFIG_FILE
    settings = json.loads(path.read_text(encoding="utf-8"))
    kept = {
        # peft writes sets in any order, so that equal runs would write different files.
        name: sorted(value) if name == "target_modules" and isinstance(value, list) else value
        for name, value in settings.items()
        if name in _KEYS_OF_PEFT_0_13 or (value != defaults.get(name) and name != "peft_version")
    }
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_tensors(stored: Iterable[str], own: Iterable[str], *, called: str) -> None:
    """Check that an adapter that is loaded has the tensors of the model's adapter.

    peft ignores a tensor that the model has no place for, and keeps the value of one that is not
    loaded.

    Args:
        stored: names of the tensors to load.
        own: names of the tensors of the model's adapter.
        called: name of the adapter in messages.

    Raises:
        ModelError: a tensor is only in one of the two.
    """
    odd = sorted(set(stored) ^ set(own))
    if odd:
        raise ModelError(
            f"{called} has other tensors than the model's adapter ({len(odd)} are only in one of "
            f"the two, first {odd[0]}): it was trained with other settings; train again"
        )
