"""What llama.cpp takes for granted about a family, which a model of the family may do otherwise.

Such a model is converted without an error, and then refused or computed differently. Only
config.json is needed to tell.
"""

from typing import Any

_LITE_LAYERS = 27
"""Number of layers by which llama.cpp knows DeepSeek V2 Lite."""


def gguf_problem(config: dict[str, Any]) -> str | None:
    """Return why llama.cpp cannot run a model; None: no reason is known.

    Args:
        config: the content of the model's config.json.
    """
    kind = config.get("model_type")
    # The defaults are those of transformers' classes.
    if kind == "qwen3_moe" and not config.get("norm_topk_prob", False):
        return (
            "config.json has norm_topk_prob false, but llama.cpp always normalises the weights of "
            "the experts of this family"
        )
    if kind == "qwen2_moe" and config.get("norm_topk_prob", False):
        return (
            "config.json has norm_topk_prob true, but llama.cpp never normalises the weights of "
            "the experts of this family"
        )
    if kind == "phimoe":
        return (
            "the routers of this family weight each expert by itself (SparseMixer), but llama.cpp "
            "divides the weights among a token's experts"
        )
    if kind == "deepseek_v2" and config.get("q_lora_rank", 1536) is None:
        num_layers = config.get("num_hidden_layers")
        if num_layers != _LITE_LAYERS:
            return (
                f"it has {num_layers} layers and no q_lora_rank, but llama.cpp knows a DeepSeek V2 "
                f"without q_lora_rank by its {_LITE_LAYERS} layers"
            )
    return None
