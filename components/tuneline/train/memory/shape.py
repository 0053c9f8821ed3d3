"""Read from a base model's config the sizes that determine memory, without its weights."""

from pathlib import Path
from typing import Any

from torch import nn

from tuneline.kernels.spec import family_spec
from tuneline.models.experts.stacks import Stack, quantized_experts
from tuneline.models.nf4 import empty_model, quantized_modules
from tuneline.train.config import LoraConfig
from tuneline.train.memory.estimate import EXPERT_COUNTS, TOP_K, WHOLE_SCORES, Experts, Shape
from tuneline.train.model.targets import adapted_modules, is_called


def model_shape(base_model_dir: str | Path, lora: LoraConfig) -> Shape | None:
    """Return the shape of a model with an adapter.

    Returns:
        None for a model whose config lacks the usual keys, or whose experts are not stored as
        stacks: no estimate is better than a wrong one.
    """
    model: Any = empty_model(base_model_dir)
    config: Any = model.config.get_text_config()
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    if any(not isinstance(getattr(config, name, None), int) for name in names):
        return None
    stacks = quantized_experts(model)
    experts = _experts(stacks, model, config)
    if experts is None and any(getattr(config, name, None) for name in EXPERT_COUNTS):
        return None
    # A model whose layers all have experts needs no width for dense ones.
    mlp = getattr(config, "intermediate_size", None) or (experts and _widest_mlp(model))
    if not isinstance(mlp, int):
        return None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if getattr(config, "qk_nope_head_dim", None):
        # Latent attention: every head has its own keys.
        head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
        num_kv_heads = config.num_attention_heads
    layers = [model.get_submodule(name) for name in adapted_modules(model, lora)]
    num_adapter = sum(lora.r * (layer.in_features + layer.out_features) for layer in layers)
    for name, module in model.named_modules():
        if any(is_called(name, saved) for saved in lora.modules_to_save):
            num_adapter += sum(parameter.numel() for parameter in module.parameters())
    if lora.experts:
        num_adapter += sum(
            lora.r * stack.num_experts * (stack.in_features + stack.out_features)
            for stack in stacks.values()
        )
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    weights: dict[str, Any] = {
        name: module.weight for name, module in model.named_modules() if hasattr(module, "weight")
    }
    num_quantized = sum(weights[name].numel() for name in quantized_modules(model))
    num_quantized += sum(stack.numel for stack in stacks.values())
    tables, num_copied = _tables(model, lora)
    return Shape(
        num_layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        query=config.num_attention_heads * head_dim,
        key_value=num_kv_heads * head_dim,
        mlp=mlp,
        vocab=config.vocab_size,
        num_quantized=num_quantized,
        num_other=num_parameters - num_quantized,
        num_adapter=num_adapter,
        num_tables=sum(tables),
        num_copied=num_copied,
        fused_qkv=_fused_qkv(model),
        experts=experts,
        is_fused=_is_fused(model),
        score_heads=config.num_attention_heads if config.model_type in WHOLE_SCORES else 0,
    )


def _tables(model: Any, lora: LoraConfig) -> tuple[list[int], int]:
    """Return the sizes of the tables that kernels can keep in host memory, and of the head in them.

    The rules are those of `kernels.ops.host_tables`, which moves them.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    trained = {
        module
        for name, module in model.named_modules()
        if any(is_called(name, saved) for saved in lora.modules_to_save)
    }
    moves = {
        embedding: type(embedding) is nn.Embedding and embedding not in trained,
        head: type(head) is nn.Linear and head.bias is None and head not in trained,
    }
    if head is not None and head.weight is embedding.weight:
        size = embedding.weight.numel() if all(moves.values()) else 0
        return [size], size
    sizes = [module.weight.numel() if can_move else 0 for module, can_move in moves.items()]
    return sizes, sizes[-1]


def _experts(stacks: dict[str, Stack], model: Any, config: Any) -> Experts | None:
    """Return the sizes of the layers with experts; None if there are none, or are not known."""
    top_k = next((getattr(config, name) for name in TOP_K if hasattr(config, name)), None)
    down = [stack for name, stack in stacks.items() if name.endswith(".down_proj")]
    if not down or not isinstance(top_k, int):
        return None
    shared = [
        module.out_features
        for name, module in model.named_modules()
        if name.endswith(("shared_expert.up_proj", "shared_experts.up_proj"))
    ]
    return Experts(
        num_layers=len(down),
        num_experts=down[0].num_experts,
        top_k=top_k,
        width=down[0].in_features,
        shared=max(shared, default=0),
    )


def _widest_mlp(model: nn.Module) -> int:
    """Return the width of a model's widest MLP beside its experts; 0 if there is none."""
    widths = [
        module.out_features
        for name, module in model.named_modules()
        if name.endswith(".up_proj") and isinstance(module, nn.Linear)
    ]
    return max(widths, default=0)


def _is_fused(model: Any) -> bool:
    layers = getattr(model.get_decoder(), "layers", ())
    return bool(layers) and all(family_spec(layer) is not None for layer in layers)


def _fused_qkv(model: nn.Module) -> int:
    fused = (module for name, module in model.named_modules() if name.endswith("qkv_proj"))
    width = getattr(next(fused, None), "out_features", 0)
    return int(width)
