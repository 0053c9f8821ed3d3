"""The patched model against the stock one of transformers and PEFT on the CPU."""

import copy
import itertools
import re

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

from tuneline.kernels import binding, binding_adapter, patching, spec
from tuneline.kernels.decoder import operands
from tuneline.kernels.decoder.attention_half import Saved
from tuneline.kernels.decoder.budget import Kept, kept_bytes, normed_bytes, wide_bytes
from tuneline.kernels.decoder.layer import LayerCall
from tuneline.kernels.ops import activation_lora
from tuneline.kernels.ops.nf4 import dequantize_nf4
from tuneline.kernels.patching import patch, unpatch

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


@pytest.fixture(autouse=True)
def references_unless_interpreted(request):
    """Let the ops run their references, but for tests that ask for `interpreted`.

    The kernels have tests of their own; here they show that the layer hands them what they want.
    """
    if "interpreted" not in request.fixturenames:
        request.getfixturevalue("references")


@pytest.fixture
def interpreted(monkeypatch):
    """Run the kernels; programs of few tokens leave little masked work to interpret."""
    monkeypatch.setattr(activation_lora, "_ROWS", 16)


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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", ["lean", "auto"])
def test_gradients_match_stock(family, budget):
    model = make_model(family)
    want = step(model, batch())
    report = patch(model, budget=budget)
    assert report.fused == (0, 1) and not report.unfused and report.loss == "fused"
    assert fused_layers(model) == 2
    assert_same(step(model, batch()), want)
    unpatch(model)
    assert fused_layers(model) == 0
    assert_same(step(model, batch()), want, tolerance=1e-7)


def test_positions_that_scale_q_run_the_stock_layers():
    model = make_model("ministral3")
    want = step(model, batch(1, 20))
    patch(model, budget="lean")
    # A fused layer would not scale q at positions 16 to 19.
    assert_same(step(model, batch(1, 20)), want)
    model(**batch(1, 16)).loss.backward()
    assert fused_layers(model) == 2


def test_every_family_of_the_table_is_compared_with_the_stock_model():
    # experts/test_experts_layer.py compares the families with routed experts.
    names = [family.name for family in spec.FAMILIES.values() if family.router is None]
    assert {patch(make_model(family)).family for family in FAMILIES} == set(names)
    assert len(names) == len(set(names))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_hands_its_layers_as_many_ropes_as_the_table_says(family):
    model = make_model(family)
    decoder = model.get_base_model().model
    tables = []
    for layer in decoder.layers:
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: tables.append(kwargs["position_embeddings"][0]),
            with_kwargs=True,
        )
    model(**batch())
    assert len(tables) == len(decoder.layers) == 2
    assert len({id(table) for table in tables}) == spec.family_spec(decoder.layers[0]).num_ropes


# The others differ from these by a window, which on a CPU no kernel knows, or by a bias.
@pytest.mark.parametrize(
    "family", ["llama", "llama_tied_bias", "qwen3", "phi3", "gemma2", "gemma3"]
)
def test_kernels_match_float64(family, interpreted):
    model = make_model(family, dtype=torch.float32)
    assert patch(model, budget="lean").fused == (0, 1)
    ours = step(model, batch(2, 5))
    # In float64 every op is its reference, which the test above holds against the stock model.
    assert_same(ours, step(model.double(), batch(2, 5)))


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_row_equals_its_sequences_alone(family):
    lengths = [8, 1, 4]
    ids = batch(1, sum(lengths))["input_ids"]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    labels = ids.clone()
    labels[positions == 0] = -100
    model = make_model(family)
    patch(model, budget="lean")
    packed = step(model, {"input_ids": ids, "labels": labels, "position_ids": positions})
    # Whoever knows where the sequences start does not have them looked for in the positions.
    starts = patching.find_sequences(ids, None, positions)
    assert starts == [0, 8, 9]
    told = {"input_ids": ids, "labels": labels, "position_ids": positions}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(patching, "find_sequences", None)
        assert_same(step(model, {**told, "sequence_starts": starts}), packed)
    num_items = int((labels != -100).sum())
    losses, grads = [], []
    for piece, target in zip(ids.split(lengths, 1), labels.split(lengths, 1), strict=True):
        alone = {"input_ids": piece, "labels": target, "num_items_in_batch": num_items}
        loss, grad = step(model, alone)
        losses.append(loss)
        grads.append(grad)
    total = {n: sum(g[n] for g in grads) for n in grads[0] if n != "dX"}
    total["dX"] = torch.cat([g["dX"] for g in grads], 1)
    assert_same(packed, (sum(losses), total))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_any_budget_gives_the_same_bits(family, interpreted):
    model = make_model(family, dtype=torch.float32)
    patch(model, budget="lean")
    loss, expected = step(model, batch(1, 5))
    engine = model.get_base_model().model._tuneline_engine
    assert engine.last_kept == Kept(0, 0)
    weights = [weights for states in engine.bound.values() for weights in states.values()]
    layer, normed = (max(size(w, 5, 4) for w in weights) for size in (kept_bytes, normed_bytes))
    wide = max(wide_bytes(w, 4) for w in weights)
    wanted = {
        1.5 * layer: Kept(1, 0),
        2 * layer + 0.5 * normed: Kept(2, 0),
        2 * layer + 1.5 * normed: Kept(2, 1),
        2 * layer + 2 * normed + 1.5 * wide: Kept(2, 2, 1 if wide else 0),
        2**30: Kept(2, 2, 2 if wide else 0),
    }
    for num_bytes, kept in wanted.items():
        patch(model, budget=num_bytes / 2**30)
        found, grads = step(model, batch(1, 5))
        assert model.get_base_model().model._tuneline_engine.last_kept == kept
        assert torch.equal(found, loss)
        for name, grad in expected.items():
            assert torch.equal(grads[name], grad), name


@pytest.mark.parametrize("choice", list(itertools.product((False, True), repeat=3)))
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_whatever_waits_for_the_backward_gives_the_same_bits(family, choice, monkeypatch):
    model = make_model(family, dtype=torch.float32)
    patch(model, budget="lean")
    loss, expected = step(model, batch())
    seen = []

    def holding(*args, **kwargs):
        seen.append(LayerCall(*args, **{**kwargs, "holds": True, "waits": Saved(*choice)}))
        return seen[-1]

    monkeypatch.setattr(patching, "LayerCall", holding)
    found, grads = step(model, batch())
    assert [call.saved for call in seen] == [Saved(*choice)] * 2
    assert torch.equal(found, loss)
    for name, grad in expected.items():
        assert torch.equal(grads[name], grad), name


def test_chunks_of_the_mlp_add_up(monkeypatch, interpreted):
    model = make_model("gemma2", dtype=torch.float32)
    monkeypatch.setattr("tuneline.kernels.decoder.mlp_half.MLP_CHUNK_TOKENS", 4)
    patch(model, budget="lean")
    ours = step(model, batch(2, 5))
    monkeypatch.undo()
    assert_same(ours, step(model.double(), batch(2, 5)))


def test_right_padding_matches_stock_and_left_padding_takes_the_stock_path():
    inputs = batch()
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][0, 6:] = 0
    inputs["labels"][0, 6:] = -100
    model = make_model()
    want = step(model, inputs)
    patch(model)
    loss, grads = step(model, inputs)
    # What stands on padding has no meaning, and no gradient either way.
    assert_same((loss, grads), want)
    flipped = {name: value.flip(1) for name, value in inputs.items()}
    got = step(model, flipped)
    unpatch(model)
    assert_same(got, step(model, flipped), tolerance=1e-6)


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        ({"lora_dropout": 0.5}, "lora_dropout=0.5"),
        ({"use_dora": True}, "variant"),
        ({"lora_bias": True}, "lora_bias"),
    ],
)
def test_other_adapters_fall_back_with_a_reason_and_the_right_numbers(lora, reason):
    model = make_model(**lora)
    torch.manual_seed(5)
    want = step(model, batch())
    report = patch(model)
    assert report.fused == () and all(reason in why for why in report.unfused.values())
    torch.manual_seed(5)
    assert_same(step(model, batch()), want)


@pytest.mark.parametrize(
    "name", ["attention_dropout", "resid_pdrop", "embd_pdrop", "hidden_dropout"]
)
def test_any_dropout_of_the_config_keeps_the_layers_stock(name):
    for value, fused in ((0.0, (0, 1)), (None, (0, 1)), (0.1, ())):
        model = make_model()
        setattr(model.get_base_model().config, name, value)
        report = patch(model)
        assert report.fused == fused
        reason = f"config.{name}=0.1: only 0 is fused"
        assert report.unfused == ({} if fused else dict.fromkeys((0, 1), reason))


PARTS = ["input_layernorm", "self_attn", "self_attn.o_proj", "mlp.up_proj", "self_attn.scaling"]


@pytest.mark.parametrize("part", PARTS)
def test_an_entry_of_the_table_that_describes_another_layer_is_no_error(part):
    model = make_model()
    owner, _, name = ("layers.0." + part).rpartition(".")
    layer = model.get_base_model().model.layers[0]
    stock = type(layer)
    delattr(model.get_base_model().model.get_submodule(owner), name)
    named = "self_attn.q_proj" if part == "self_attn" else part
    reason = f"LlamaDecoderLayer has no {named}: its entry in the table of families (spec.py)"
    with pytest.raises(binding_adapter.Unfusable, match=re.escape(reason)):
        binding.check_parts(layer, spec.family_spec(layer))
    report = patch(model)
    assert report.fused == (1,) and report.unfused[0].startswith(reason)
    assert type(layer) is stock


def test_a_layer_that_cannot_be_fused_stays_stock_beside_fused_ones():
    # Without use_cache=False the stock model makes a cache, and then sees no packing.
    positions = torch.cat([torch.arange(4), torch.arange(6)])[None]
    packed = {**batch(1, 10), "use_cache": False, "position_ids": positions}
    model = make_model()
    norm = model.get_base_model().model.layers[0].input_layernorm
    norm.weight.requires_grad_(True)
    want = step(model, packed)
    report = patch(model)
    assert report.fused == (1,) and "norm" in report.unfused[0]
    assert fused_layers(model) == 1
    got = step(model, packed)
    assert "base_model.model.model.layers.0.input_layernorm.weight" in got[1]
    assert_same(got, want)
    norm.weight.requires_grad_(False)
    assert fused_layers(model) == 2


def test_several_adapters_and_disabled_ones_take_the_stock_path():
    model = make_model()
    model.add_adapter("second", LoraConfig(r=2, target_modules=TARGETS))
    for name, parameter in model.named_parameters():
        if "lora_B.second" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    patch(model)
    assert fused_layers(model) == 2
    with model.disable_adapter():
        base = model.get_base_model()(**batch()).loss
    model.base_model.set_adapter(["default", "second"])
    both = step(model, batch())
    unpatch(model)
    assert_same(both, step(model, batch()))
    with model.disable_adapter():
        stock = model.get_base_model()(**batch()).loss
        torch.testing.assert_close(base, stock, check_dtype=False)
    model.base_model.set_adapter("second")
    alone = step(model, batch())
    patch(model)
    assert fused_layers(model) == 2
    assert_same(step(model, batch()), alone)


def count_fused_layers(monkeypatch):
    """Return a list that gets an entry for every fused layer that runs."""
    calls = []

    def counted(*args):
        calls.append(args)
        return fused_layer(*args)

    fused_layer = patching.fused_layer
    monkeypatch.setattr(patching, "fused_layer", counted)
    return calls


@pytest.mark.parametrize("family", ["llama_tied_bias", "qwen3", "gemma3"])
def test_the_reference_is_the_policy_bit_for_bit_while_b_is_zero(family, monkeypatch, interpreted):
    model = make_model(family, dtype=torch.float32)
    patch(model, budget="lean")
    calls = count_fused_layers(monkeypatch)
    inputs = {"input_ids": batch(1, 5)["input_ids"], "use_cache": False}
    policy = model(**inputs).logits
    with torch.no_grad(), model.disable_adapter():
        reference = model(**inputs).logits
        unpatch(model)
        torch.testing.assert_close(reference, model(**inputs).logits, rtol=1e-4, atol=1e-5)
    assert len(calls) == 4 and not reference.requires_grad
    assert not torch.equal(policy, reference)
    patch(model, budget="lean")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    assert torch.equal(model(**inputs).logits, reference)
    assert len(calls) == 6


def test_layers_are_bound_once_with_and_once_without_adapters(monkeypatch):
    model, bound = make_model(), []
    patch(model)
    monkeypatch.setattr(
        patching, "bind_layer", lambda *args, **kwargs: bound.append(1) or bind(*args, **kwargs)
    )
    bind, inputs = binding.bind_layer, {**batch(), "use_cache": False}
    for _ in range(3):
        model(**inputs).loss.backward()
        with torch.no_grad(), model.disable_adapter():
            model(**inputs)
    assert len(bound) == 4


def test_layers_are_checked_in_each_forward_or_when_told():
    model = make_model()
    patch(model)
    engine = model.get_base_model().model._tuneline_engine
    step(model, batch())
    weights = engine.current[0]
    model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] *= 2
    changed = step(model, batch())
    assert engine.current[0] is not weights
    patching.check_layers_once(model)
    checks = []
    with pytest.MonkeyPatch.context() as patched:
        fingerprint = patching.fingerprint
        patched.setattr(
            patching, "fingerprint", lambda *of: (checks.append(1), fingerprint(*of))[1]
        )
        for _ in range(3):
            assert_same(step(model, batch()), changed)
        assert len(checks) == 2
        patching.check_layers_once(model)
        step(model, batch())
        assert len(checks) == 4


def test_partial_targets_and_layers_without_adapters():
    model = make_model(target_modules=["q_proj", "v_proj", "down_proj"], layers_to_transform=[1])
    want = step(model, batch())
    report = patch(model, budget="lean")
    assert report.fused == (0, 1)
    assert_same(step(model, batch()), want)


def test_gradient_checkpointing_does_not_run_fused_layers_twice():
    model = make_model()
    want = step(model, batch())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    patch(model, budget="lean")
    assert fused_layers(model) == 2
    assert_same(step(model, batch()), want)
    # The stock path under the patch is still checkpointed, and still right.
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = torch.nn.Dropout(1e-30)
    assert fused_layers(model) == 0
    assert_same(step(model, batch()), want)


def test_accumulation_and_two_forwards_before_one_backward():
    model = make_model()
    one, two = batch(1, 5), batch(2, 8)
    want = [step(model, one)[1], step(model, two)[1]]
    patch(model, budget="lean")
    model.zero_grad(set_to_none=True)
    losses = [model(**inputs).loss for inputs in (one, two)]
    (losses[0] + losses[1]).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            truth = want[0][name] + want[1][name]
            assert (parameter.grad - truth).norm() < 1e-5 * truth.norm(), name
            together = parameter.grad.clone()
            parameter.grad = None
            parameter.together = together
    model(**one).loss.backward()
    model(**two).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            error = (parameter.grad - parameter.together).norm()
            assert error < 1e-6 * parameter.together.norm(), name


def test_an_adapter_changed_between_forward_and_backward_is_refused():
    model = make_model()
    patch(model)
    loss = model(**batch()).loss
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_A" in n).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_eval_generate_and_logits_are_the_stock_ones():
    model = make_model("gemma3").eval()
    ids = batch()["input_ids"]
    logits = model(input_ids=ids).logits
    tokens = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    patch(model)
    assert torch.equal(model(input_ids=ids).logits, logits)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=5, do_sample=False), tokens)
    model.train()
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=5, do_sample=False), tokens)
    torch.testing.assert_close(model(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-5)


def test_saving_loading_merging_and_state_dict(tmp_path):
    model = make_model()
    keys = list(model.state_dict())
    patch(model)
    assert list(model.state_dict()) == keys
    assert isinstance(model.get_base_model(), LlamaForCausalLM)
    model.save_pretrained(tmp_path)
    want = step(model, batch())
    torch.manual_seed(7)
    fresh = LlamaForCausalLM(FAMILIES["llama"][1]).double()
    fresh.load_state_dict(
        {
            k.replace("base_model.model.", "").replace(".base_layer", ""): v
            for k, v in model.state_dict().items()
            if "lora_" not in k
        }
    )
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(fresh, tmp_path, is_trainable=True).train()
    assert_same(step(loaded, batch()), want)
    model.merge_adapter()
    assert fused_layers(model) == 0
    torch.testing.assert_close(
        model(**batch()).loss, want[0], rtol=1e-5, atol=1e-6, check_dtype=False
    )
    model.unmerge_adapter()
    assert fused_layers(model) == 2
    merged = model.merge_and_unload().eval()
    torch.testing.assert_close(
        merged(**batch()).loss, want[0], rtol=1e-5, atol=1e-6, check_dtype=False
    )


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


def test_nf4_base_matches_bitsandbytes():
    model = make_nf4_model()
    want = step(model, batch())
    report = patch(model, budget="lean")
    assert report.fused == (0, 1), report
    assert_same(step(model, batch()), want)
    # Not gate and up: they have no adapter. Each of the products is off by 4 %.
    assert patch(model, fp8=True).num_fp8_groups == 6
    loss, grads = step(model, batch())
    assert 1e-5 < abs(loss - want[0]) / want[0] < 1e-2
    for name, grad in want[1].items():
        assert (grads[name] - grad).norm() < 0.25 * grad.norm(), name


@pytest.mark.parametrize("num_wide", [0, 1, 2])
def test_kept_weights_are_dequantised_once_and_give_the_same_bits(num_wide, monkeypatch):
    model = make_nf4_model()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)

    def two_steps():
        found = []
        for _ in range(2):
            found.append(step(model, batch(1, 5)))
            optimizer.step()
        return found

    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    patch(model, budget="lean")
    want = two_steps()
    with torch.no_grad():
        for name, value in start.items():
            model.get_parameter(name).copy_(value)
    engine = model.get_base_model().model._tuneline_engine
    weights = list(engine.current.values())
    stored = sum(2 * max(size(w, 5, 4) for w in weights) for size in (kept_bytes, normed_bytes))
    wide = max(wide_bytes(w, 4) for w in weights)
    patch(model, budget=(stored + (num_wide + 0.5) * wide) / 2**30)
    dequantised = []

    def counted(weight, **kwargs):
        dequantised.append(weight)
        return dequantize_nf4(weight, **kwargs)

    monkeypatch.setattr(operands, "dequantize_nf4", counted)
    got = two_steps()
    assert model.get_base_model().model._tuneline_engine.last_kept == Kept(2, 2, num_wide)
    # Seven linears per layer; without kept weights, one dequantisation per forward and backward.
    assert len(dequantised) == 7 * (num_wide + (2 - num_wide) * 4)
    for (loss, grads), (want_loss, want_grads) in zip(got, want, strict=True):
        assert torch.equal(loss, want_loss)
        assert all(torch.equal(grads[name], grad) for name, grad in want_grads.items())
    assert not torch.equal(got[0][0], got[1][0])


def test_an_embedding_that_stays_where_it_is_is_told(caplog):
    model = make_model()
    patch(model, embedding_on_host=True)
    assert "embedding_on_host=True is ignored: the input embedding is on cpu" in caplog.text
    unpatch(model)
    assert type(model.get_input_embeddings()) is torch.nn.Embedding


def test_bad_budget_and_unknown_model():
    model = make_model()
    with pytest.raises(ValueError, match="'auto', 'lean' or a number"):
        patch(model, budget="much")
    with pytest.raises(ValueError, match="-1"):
        patch(model, budget=-1)
    report = patch(torch.nn.Linear(2, 2))
    assert report.fused == () and "lm_head is a NoneType" in report.loss
