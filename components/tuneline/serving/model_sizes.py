"""The sizes of a model that a server's memory depends on, read from its config.json."""

import json
from dataclasses import dataclass
from pathlib import Path

from tuneline.models.context import context_length
from tuneline.models.multimodal import text_config

GIB = 2**30
_BYTES_PER_VALUE = 2
"""Servers keep keys and values in 16 bits."""


@dataclass(frozen=True)
class ModelSizes:
    """What a server has to know of a model besides the size of its weights."""

    architecture: str
    """Name of the model class; "" if the config names none."""
    num_context: int
    """Context length that the server is started with, in tokens."""
    num_heads: int
    """Number of attention heads; a number of GPUs that share the model divides it."""
    context_bytes: int
    """Memory of the keys and values of one full context, in bytes; an upper bound for models whose
    layers do not all attend to everything. 0 if the config lacks the sizes."""

    @classmethod
    def read(cls, model_dir: Path) -> "ModelSizes":
        """Read the config.json in a model's directory."""
        config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
        text = text_config(config)
        num_context = context_length(model_dir)
        num_heads = int(text.get("num_attention_heads") or 1)
        head_dim = text.get("head_dim") or (text.get("hidden_size") or 0) // num_heads
        num_kv_heads = text.get("num_key_value_heads") or num_heads
        per_token = 2 * (text.get("num_hidden_layers") or 0) * num_kv_heads * head_dim
        return cls(
            architecture=next(iter(config.get("architectures") or ()), ""),
            num_context=num_context,
            num_heads=num_heads,
            context_bytes=_BYTES_PER_VALUE * per_token * num_context,
        )


def in_mib(num_bytes: float) -> str:
    """Return a number of bytes as a Kubernetes quantity, rounded up to a quarter of a GiB."""
    quarters = -(-int(num_bytes) // (GIB // 4))
    return f"{quarters // 4}Gi" if quarters % 4 == 0 else f"{quarters * 256}Mi"
