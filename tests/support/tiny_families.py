"""Tiny random checkpoints of the model families that the line trains.

Each has the family's real config class, its tensors' real names, and the parts that matter to
training: routed and shared experts, sliding windows, layers of linear attention, fused projections,
latent attention. Weights are random, and the tokenizer is that of another model.

usage: python tests/support/tiny_families.py TOKENIZER_DIR OUT_DIR [FAMILY ...]
"""

import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedModel

from tuneline.fetch.config import FetchConfig
from tuneline.fetch.run import run as fetch

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja"),
)

_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "initializer_range": 0.05,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}

_LATENT: dict[str, Any] = {
    "num_key_value_heads": 2,
    "head_dim": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}

_SHARED: dict[str, Any] = {
    "moe_intermediate_size": 64,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}

_LINEAR_ATTENTION: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}

_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}

_SLIDING: dict[str, Any] = {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 32,
}


@dataclass(frozen=True)
class Family:
    """A family of models, and the sizes of its tiny checkpoint."""

    name: str
    """The family's name, as in the README."""
    stem: str
    """What the family's classes in transformers begin with: LlamaConfig, LlamaForCausalLM."""
    sizes: dict[str, Any] = field(default_factory=dict)
    """Settings of the config beside the common ones."""
    has_experts: bool = False
    """Whether the model has routed experts."""
    config: str = ""
    """Name of the config class, if it does not begin with the stem."""

    @property
    def architecture(self) -> str:
        """Name of the model's class."""
        return f"{self.stem}ForCausalLM"


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("Llama 3", "Llama"),
        Family("Yi", "Llama", {"rms_norm_eps": 1e-5}),
        Family("Mistral", "Mistral"),
        Family("Ministral 3", "Ministral3", {"max_position_embeddings": 2**18}),
        Family("Phi-3", "Phi3"),
        Family("Qwen2", "Qwen2", {"tie_word_embeddings": True}),
        Family("Qwen3", "Qwen3", {"tie_word_embeddings": True}),
        Family("Gemma 2", "Gemma2", {"tie_word_embeddings": True} | _SLIDING),
        Family("Gemma 3", "Gemma3", {"tie_word_embeddings": True} | _SLIDING, config="Gemma3Text"),
        Family("SmolLM3", "SmolLM3", {"no_rope_layers": [1, 0]}),
        Family("Granite", "Granite"),
        Family("OLMo 3", "Olmo3", _SLIDING),
        Family("Cohere 2", "Cohere2", {"tie_word_embeddings": True} | _SLIDING),
        Family("GLM-4", "Glm4"),
        Family("Qwen3.5", "Qwen3_5", _LINEAR_ATTENTION, config="Qwen3_5Text"),
        Family("Qwen3-Next", "Qwen3Next", _LINEAR_ATTENTION | _EXPERTS, has_experts=True),
        Family(
            *("Qwen3.5-MoE", "Qwen3_5Moe", _LINEAR_ATTENTION | _EXPERTS),
            has_experts=True,
            config="Qwen3_5MoeText",
        ),
        Family(
            "Mixtral",
            "Mixtral",
            {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64},
            has_experts=True,
        ),
        Family(
            "Phi-3.5-MoE",
            "Phimoe",
            {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64},
            has_experts=True,
        ),
        Family("Qwen2-MoE", "Qwen2Moe", _EXPERTS, has_experts=True),
        Family("Qwen3-MoE", "Qwen3Moe", _EXPERTS | {"norm_topk_prob": True}, has_experts=True),
        Family("DeepSeek V2", "DeepseekV2", _LATENT | _SHARED, has_experts=True),
        Family(
            "DeepSeek V3",
            "DeepseekV3",
            _LATENT | _SHARED | {"q_lora_rank": 32},
            has_experts=True,
        ),
        Family("GLM-4-MoE", "Glm4Moe", _SHARED, has_experts=True),
        Family(
            "gpt-oss",
            "GptOss",
            {
                **{"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64},
                **{"max_position_embeddings": 2**17, **_SLIDING},
            },
            has_experts=True,
        ),
    )
}


def new_model(family: Family, *, vocab_size: int, **settings: Any) -> PreTrainedModel:
    """Return a tiny random model of a family, in float32.

    Args:
        family: an entry of FAMILIES.
        vocab_size: number of token IDs.
        **settings: settings of the config that replace those of the family.
    """
    config_class: Any = getattr(transformers, f"{family.config or family.stem}Config")
    model_class: Any = getattr(transformers, family.architecture)
    torch.manual_seed(0)
    values = {"vocab_size": vocab_size} | _COMMON | family.sizes | settings
    model: PreTrainedModel = model_class(config_class(**values))
    return model


def write_checkpoint(
    family: Family,
    directory: Path,
    *,
    tokenizer_dir: Path,
    dtype: torch.dtype = torch.bfloat16,
    **settings: Any,
) -> Path:
    """Write a tiny random checkpoint, as a repository on the Hub holds it; return its directory.

    Args:
        family: an entry of FAMILIES.
        directory: directory to write; it must not exist.
        tokenizer_dir: directory whose tokenizer is copied.
        dtype: number format of the weights.
        **settings: settings of the config that replace those of the family.
    """
    directory.mkdir(parents=True)
    for name in TOKENIZER_FILES:
        if (tokenizer_dir / name).is_file():
            shutil.copy(tokenizer_dir / name, directory / name)
    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_dir))
    special = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    model = new_model(family, vocab_size=len(tokenizer), **(special | settings)).to(dtype)
    model.save_pretrained(directory)
    return directory


EXPERT_FAMILIES = ("Mixtral", "Qwen3-MoE", "DeepSeek V2", "gpt-oss", "GLM-4-MoE")
"""Families that differ in how they route tokens to experts, or in what experts compute."""


def save_experts(name: str, directory: Path, **settings: Any) -> Path:
    """Save a model of an expert family whose rows of weights are no multiple of a block of NF4.

    Args:
        name: an entry of EXPERT_FAMILIES.
        directory: directory to write.
        **settings: settings of the config that replace those of the family.
    """
    sizes = {"intermediate_size": 96, "moe_intermediate_size": 48, "initializer_range": 0.2}
    model = new_model(FAMILIES[name], **{"vocab_size": 260} | sizes | settings)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            # Biases begin as zeros, which would hide that they are not added.
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(directory)
    return directory


def fetch_family(family: Family, directory: Path, *, tokenizer_dir: Path, **settings: Any) -> Path:
    """Write and fetch a checkpoint; return the directory of the fetched model.

    Args:
        family: an entry of FAMILIES.
        directory: parent of the two directories, source and model.
        tokenizer_dir: directory whose tokenizer is copied.
        **settings: as for `write_checkpoint`.
    """
    source = write_checkpoint(family, directory / "source", tokenizer_dir=tokenizer_dir, **settings)
    fetch(FetchConfig(), source=str(source), base_model_dir=str(directory / "model"))
    return directory / "model"


def main() -> None:
    """Write and fetch the checkpoints that the command line names, or all."""
    tokenizer_dir, out, *names = sys.argv[1:]
    for name in names or FAMILIES:
        print(fetch_family(FAMILIES[name], Path(out, name), tokenizer_dir=Path(tokenizer_dir)))


if __name__ == "__main__":
    main()
