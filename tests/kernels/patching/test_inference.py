"""Hidden states of packed rows in fused layers, against each sequence alone in stock layers."""

import copy
from types import SimpleNamespace

import pytest
import torch
from patch_cases import FAMILIES, SIZES, batch
from transformers import Olmo2Config, Olmo2ForCausalLM

from tuneline.kernels import inference, patching
from tuneline.kernels.decoder import attention_half, mlp_half
from tuneline.kernels.inference import fused_inference, runs_fused
from tuneline.kernels.patching import patch

FIRSTS = (7, 0, 2, 5, 0)


@pytest.fixture
def fused_calls(monkeypatch):
    """Return a list that grows by the shapes of input and output per call of a fused layer."""
    calls = []

    def counted(*args):
        output, routing = fused_layer(*args)
        calls.append((args[0].shape[:2], output.shape[:2]))
        return output, routing

    fused_layer = patching.fused_layer
    monkeypatch.setattr(patching, "fused_layer", counted)
    return calls


def make_model(family="llama", **settings):
    """Build a tiny random model in float32; its norms and biases are away from their init."""
    torch.manual_seed(7)
    cls, config = FAMILIES.get(family, (Olmo2ForCausalLM, Olmo2Config(**SIZES)))
    config = copy.deepcopy(config)
    for name, value in settings.items():
        setattr(config, name, value)
    model = cls(config)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def sequences():
    ids = batch(1, 38)["input_ids"][0]
    return [part.tolist() for part in ids.split([8, 1, 11, 13, 5])]


def alone(model):
    """Return what the stock decoder computes for each sequence from its first wanted token on."""
    with torch.inference_mode():
        return [
            model.model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0, first:]
            for ids, first in zip(sequences(), FIRSTS, strict=True)
        ]


def assert_close(found, expected, tolerance=1e-5):
    assert len(found) == len(expected)
    for ours, stock in zip(found, expected, strict=True):
        assert ours.shape == stock.shape and ours.dtype == stock.dtype
        assert (ours - stock).norm() <= tolerance * stock.norm()


# The second number makes three rows of at least 12 2/3 tokens.
@pytest.mark.parametrize("row_tokens", [2**14, 12])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_equal_sequences_alone(family, row_tokens, fused_calls, monkeypatch):
    monkeypatch.setattr(inference, "ROW_TOKENS", row_tokens)
    model = make_model(family)
    expected = alone(model)
    with fused_inference(model) as fused:
        assert fused.takes(13)
        found = fused.hidden_states(sequences(), FIRSTS)
    # The last layer returns the wanted tokens only.
    lengths = [(38, 24)] if row_tokens > 38 else [(20, 11), (13, 8), (5, 5)]
    assert fused_calls == [
        call for n, wanted in lengths for call in (((1, n), (1, n)), ((1, n), (1, wanted)))
    ]
    assert_close(found, expected)


def test_chunks_of_the_mlp_are_larger_than_those_of_training(monkeypatch):
    monkeypatch.setattr(mlp_half, "MLP_CHUNK_TOKENS", 8)
    monkeypatch.setattr(mlp_half, "INFERENCE_MLP_CHUNK_TOKENS", 16)
    sizes = []

    def counted(gate_up, *args, **kwargs):
        sizes.append(len(gate_up))
        return forward(gate_up, *args, **kwargs)

    forward = mlp_half.gated_activation_forward
    monkeypatch.setattr(mlp_half, "gated_activation_forward", counted)
    model = make_model()
    expected = alone(model)
    with fused_inference(model) as fused:
        found = fused.hidden_states(sequences(), FIRSTS)
    # 38 tokens in the first layer, 24 in the last one.
    assert sizes == [13, 13, 12, 12, 12]
    assert_close(found, expected)
    sizes.clear()
    model.requires_grad_(False)
    patch(model.train())
    with torch.no_grad():
        model.model(input_ids=batch(1, 24)["input_ids"], use_cache=False)
    assert sizes == [8] * 6


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_kernels_match_the_stock_model(family, interpreted, fused_calls):
    model = make_model(family)
    expected = alone(model)
    with fused_inference(model) as fused:
        found = fused.hidden_states(sequences()[:2], FIRSTS[:2])
    assert len(fused_calls) == 2
    assert_close(found, expected[:2])


@torch.inference_mode()
def test_padding_on_the_right_runs_fused_and_on_the_left_stock(fused_calls):
    model = make_model()
    inputs = {"input_ids": batch()["input_ids"], "use_cache": False}
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, 6:] = 0
    right, left = (model.model(**inputs, attention_mask=m)[0] for m in (mask, mask.flip(1)))
    with fused_inference(model):
        found = model.model(**inputs, attention_mask=mask)[0]
        assert len(fused_calls) == 2
        assert torch.equal(model.model(**inputs, attention_mask=mask.flip(1))[0], left)
        assert len(fused_calls) == 2
    assert_close([found[mask == 1]], [right[mask == 1]])
    assert not torch.equal(found, right)


@torch.inference_mode()
def test_layers_write_over_their_input_unless_others_may_read_it(monkeypatch):
    copies = []

    def counted(x, *args):
        copies.append(x.shape)
        return residual_copy(x, *args)

    residual_copy = attention_half.residual_copy
    monkeypatch.setattr(attention_half, "residual_copy", counted)
    model = make_model(num_hidden_layers=3)
    embeddings = model.model.embed_tokens(batch()["input_ids"])
    arguments = {"inputs_embeds": embeddings, "use_cache": False}
    # A copy, because transformers records hidden states with hooks that it leaves behind.
    expected = copy.deepcopy(model).model(**arguments, output_hidden_states=True)
    before, seen = embeddings.clone(), []
    with fused_inference(model):
        found = [model.model(**arguments)[0]]
        # Only the first layer copies its input.
        assert len(copies) == 1
        model.model.layers[0].register_forward_hook(lambda layer, args, output: seen.append(output))
        found.append(model.model(**arguments)[0])
        assert len(copies) == 3
    # Only layers that are patched for inference do.
    model.model.layers[0]._forward_hooks.clear()
    patch(model.requires_grad_(False).train())
    found.append(model.model(**arguments)[0])
    assert len(copies) == 6
    assert torch.equal(embeddings, before)
    assert_close(found + seen, [expected[0]] * 3 + [expected.hidden_states[1]])


def test_all_other_forwards_are_the_stock_ones(fused_calls):
    model = make_model("gemma3")
    ids = batch()["input_ids"]
    settings = {"max_new_tokens": 5, "do_sample": False}
    tokens = model.generate(input_ids=ids, **settings)
    logits = model(input_ids=ids, use_cache=False).logits
    with fused_inference(model) as fused:
        assert torch.equal(model.generate(input_ids=ids, **settings), tokens)
        # With gradients, and in training mode.
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, logits)
        model.train()
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids, use_cache=False).logits, logits)
        model.eval()
        assert fused_calls == [] and fused.takes(9)
        with torch.no_grad():
            found = model(input_ids=ids, use_cache=False).logits
        assert len(fused_calls) == 2
        assert_close([found], [logits])
        assert torch.equal(model.generate(input_ids=ids, **settings), tokens)
        assert len(fused_calls) == 2


@pytest.mark.parametrize("stock_layers", [[1], [0, 1]])
def test_tokens_are_selected_after_a_last_layer_that_runs_stock(stock_layers, fused_calls):
    model = make_model()
    for index in stock_layers:
        model.model.layers[index].mlp.down_proj.register_forward_hook(lambda *args: None)
    expected = alone(model)
    with fused_inference(model) as fused:
        found = fused.hidden_states(sequences(), FIRSTS)
    assert fused_calls == [((1, 38), (1, 38))] * (2 - len(stock_layers))
    assert_close(found, expected)


def test_the_model_is_left_as_it_was():
    model = make_model()
    model.model.embed_tokens.weight.requires_grad_(False)
    trained = [parameter.requires_grad for parameter in model.parameters()]
    before = [(type(module), set(vars(module))) for module in model.modules()]
    with pytest.raises(KeyError), fused_inference(model) as fused:
        assert not any(parameter.requires_grad for parameter in model.parameters())
        fused.hidden_states(sequences(), FIRSTS)
        raise KeyError
    assert [(type(module), set(vars(module))) for module in model.modules()] == before
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert any(trained) and not all(trained)


def test_dropout_is_off_in_eval_mode():
    model = make_model("granite", attention_dropout=0.1)
    expected = alone(model)
    with fused_inference(model) as fused:
        assert fused.takes(13)
        assert_close(fused.hidden_states(sequences(), FIRSTS), expected)
    assert "attention_dropout" in str(patch(model.requires_grad_(False)))


def test_what_cannot_be_fused_is_not_taken():
    with fused_inference(make_model("olmo2, which is not in the table")) as fused:
        assert not fused.takes(1)
    with fused_inference(make_model("ministral3")) as fused:
        # Later positions scale q.
        assert fused.takes(16) and not fused.takes(17)
    hooked = make_model()
    hooked.model.layers[1].mlp.down_proj.register_forward_hook(lambda *args: None)
    with fused_inference(hooked) as fused:
        assert not fused.takes(1)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"device": torch.device("cpu")}, False),
        ({"dtype": torch.float32}, False),
        ({"hf_quantizer": object()}, False),
        ({"capability": (7, 5)}, False),
    ],
)
def test_which_models_run_fused(change, expected, monkeypatch):
    facts = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "capability": (8, 0)} | change
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: facts["capability"])
    monkeypatch.setattr(inference, "_compiles", lambda device: True)
    assert runs_fused(SimpleNamespace(**facts)) is expected


def test_without_a_compiler_the_reason_is_logged(monkeypatch, caplog):
    compiles = inference._compiles.__wrapped__
    assert compiles(torch.device("cpu")) and caplog.text == ""

    def fail(*args):
        raise RuntimeError("Failed to find C compiler.\nSet CC")

    monkeypatch.setattr(inference, "copy_rows", fail)
    assert not compiles(torch.device("cpu"))
    assert "RuntimeError: Failed to find C compiler.): install gcc" in caplog.text
