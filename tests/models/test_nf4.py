"""The 4-bit base: what is in it, what it holds, and that a forward does not change it."""

import bitsandbytes
import bitsandbytes.nn.modules
import pytest
import torch
from safetensors.torch import load_file

from tuneline.errors import ModelError
from tuneline.models.nf4 import empty_model, file_names, load_base, quantized_modules, round_trip


def quantized_layers(model):
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, bitsandbytes.nn.Linear4bit)
    }


def worth(module):
    state = module.weight.quant_state
    return bitsandbytes.functional.dequantize_4bit(module.weight.data, state)


def test_the_named_modules_are_those_that_loading_quantises(tiny_model_dir):
    model = load_base(tiny_model_dir, dtype=torch.float32, device="cpu", quantized=True)
    names = quantized_modules(empty_model(tiny_model_dir))
    assert names == set(quantized_layers(model))
    assert "lm_head" not in names and len(names) == 14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_what_a_loaded_layer_holds(tiny_model_dir, dtype):
    model = load_base(tiny_model_dir, dtype=dtype, device="cpu", quantized=True)
    weights = load_file(tiny_model_dir / "model.safetensors")
    for name, module in quantized_layers(model).items():
        ours = round_trip(weights[f"{name}.weight"], dtype=dtype, device="cpu")
        assert ours.dtype == torch.float32
        # In bfloat16 the layer rounds the product; ours keeps it and rounds here.
        assert torch.equal(ours.to(dtype), worth(module)), name
        assert not torch.equal(ours, weights[f"{name}.weight"].float())


def test_an_eval_forward_leaves_weights_and_gradients_alone(tiny_model_dir, monkeypatch):
    # As on a CPU with AVX512-BF16, where bitsandbytes would repack in place.
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    model = load_base(tiny_model_dir, dtype=torch.float32, device="cpu", quantized=True)
    layers = quantized_layers(model)
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers.values())
    before = {name: worth(layer).clone() for name, layer in layers.items()}
    ids = torch.arange(100, 117)[None]

    def gradient():
        model.train()
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embedded, labels=ids).loss.backward()
        return embedded.grad

    first = gradient()
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
    assert torch.equal(gradient(), first)
    assert all(torch.equal(worth(layer), before[name]) for name, layer in layers.items())


def test_weights_are_called_as_in_the_files(tiny_model_dir, tmp_path):
    """Also where transformers renames them: Gemma-3 with a vision tower is kept in other words."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 99}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    for directory in (tiny_model_dir, tmp_path):
        names = file_names(empty_model(directory))
        assert set(load_file(directory / "model.safetensors")) <= set(names.values())
    own = "model.language_model.layers.0.mlp.up_proj.weight"
    assert names[own] == "language_model.model.layers.0.mlp.up_proj.weight"


def test_a_directory_without_config_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"has no config\.json"):
        empty_model(tmp_path)
