"""Tiny models with adapters for the tests of `patch`, and how their training steps are compared."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

SIZES = {
    "vocab_size": 67,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PHI3_SIZES = {k: v for k, v in SIZES.items() if k != "head_dim"}
WINDOW = 7
LLAMA4_ROPE = {
    "rope_type": "default",
    "rope_theta": 1e4,
    "llama_4_scaling_beta": 0.3,
    "original_max_position_embeddings": 16,
}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "llama_tied_bias": (
        LlamaForCausalLM,
        LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    ),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=WINDOW)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES)),
    "qwen2_window": (
        Qwen2ForCausalLM,
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES)),
    "smollm3": (
        SmolLM3ForCausalLM,
        SmolLM3Config(**SIZES, no_rope_layers=[1, 0], tie_word_embeddings=False),
    ),
    "granite": (
        GraniteForCausalLM,
        GraniteConfig(
            **PHI3_SIZES,
            residual_multiplier=0.3,
            attention_multiplier=0.2,
            embedding_multiplier=3.0,
            logits_scaling=4.0,
        ),
    ),
    "ministral3": (Ministral3ForCausalLM, Ministral3Config(**SIZES, rope_parameters=LLAMA4_ROPE)),
    "phi3": (Phi3ForCausalLM, Phi3Config(**PHI3_SIZES, sliding_window=WINDOW)),
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config(**SIZES, sliding_window=WINDOW, attn_implementation="eager"),
    ),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig(**SIZES, sliding_window=WINDOW, sliding_window_pattern=2),
    ),
}
TARGETS = "all-linear"


def make_model(family="llama", *, dtype=torch.float64, **lora):
    """Build a tiny random model whose norms, biases and adapters are all away from their init.

    In float32 the gradients of q and k are off by 1e-5, the stock model's as well as ours.
    """
    torch.manual_seed(7)
    cls, config = FAMILIES[family]
    model = cls(copy.deepcopy(config)).to(dtype)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **lora}
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    return model.to(dtype).train()


def make_nf4_model():
    """Build a tiny Llama in NF4; three of its linears have an adapter."""
    bnb = pytest.importorskip("bitsandbytes")
    import bitsandbytes.nn.modules as bnb_modules

    # On CPUs with AVX512-BF16 the first eval forward repacks weights in place.
    bnb_modules.has_avx512bf16 = lambda: False
    torch.manual_seed(11)
    config = LlamaConfig(**{**SIZES, "hidden_size": 64, "intermediate_size": 128})
    base = LlamaForCausalLM(config)
    for layer in base.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if not isinstance(linear, torch.nn.Linear):
                    continue
                quantised = bnb.nn.Linear4bit(
                    linear.in_features,
                    linear.out_features,
                    bias=False,
                    compute_dtype=torch.float32,
                    compress_statistics=True,
                    quant_type="nf4",
                )
                quantised.weight = bnb.nn.Params4bit(
                    linear.weight.data, requires_grad=False, quant_type="nf4"
                )
                setattr(parent, name, quantised.to("cpu"))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "o_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    return model.train()


def batch(num_rows=2, length=9):
    """Random tokens; some labels are ignored."""
    generator = torch.Generator().manual_seed(3)
    input_ids = torch.randint(3, 67, (num_rows, length), generator=generator)
    labels = input_ids.clone()
    labels[:, :3] = -100
    return {"input_ids": input_ids, "labels": labels}


def step(model, inputs):
    """Return the loss and every gradient, adapters' and the embeddings' output's, by name."""
    model.zero_grad(set_to_none=True)
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    rest = {k: v for k, v in inputs.items() if k != "input_ids"}
    loss = model(inputs_embeds=embeddings, **rest).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), {**grads, "dX": embeddings.grad}


def assert_same(got, want, tolerance=1e-5):
    """Compare losses and gradients, each relative to its own norm, in the wider dtype."""
    torch.testing.assert_close(got[0], want[0], rtol=tolerance, atol=0, check_dtype=False)
    assert got[1].keys() == want[1].keys()
    for name, grad in want[1].items():
        assert grad.norm() > 0, name
        error = (got[1][name] - grad).norm() / grad.norm()
        assert error < tolerance, f"{name}: relative error {error:.2e}"


def engine_of(model):
    """Return the state of a patched model between forwards."""
    return model.get_base_model().model._tuneline_engine


def fused_layers(model):
    """Count the layers whose autograd node is ours."""
    hits = []
    loss = model(**batch()).loss
    todo, seen = [loss.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        hits.append(type(node).__name__ == "_LayerFunctionBackward")
        todo += [parent for parent, _ in node.next_functions]
    return sum(hits)
