"""Tiny random models with routed experts, one for each way that transformers stores these."""

from pathlib import Path
from typing import Any

import torch
import transformers

_COMMON: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
_SHARED: dict[str, Any] = {
    "moe_intermediate_size": 48,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 48,
        "head_dim": 32,
        "norm_topk_prob": True,
    },
    "DeepseekV2": _SHARED
    | {
        "q_lora_rank": None,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "head_dim": 16,
    },
    "GptOss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 32,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 32,
    },
    "Glm4Moe": _SHARED | {"head_dim": 32},
}
"""Settings of the tiny configs, by the name that a family's classes begin with."""


def make_expert_model(family: str, directory: Path, **settings: Any) -> Path:
    """Save a model with random weights in a new directory, and return the directory.

    Args:
        family: A key of `FAMILIES`.
        directory: Where to write.
        settings: Settings of the config that differ from those of `FAMILIES`.
    """
    config = getattr(transformers, f"{family}Config")(**_COMMON | FAMILIES[family] | settings)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("_bias", "bias")):
            # Biases begin as zeros, which would hide that they are not added.
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(directory)
    return directory
