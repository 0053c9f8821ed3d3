"""The patched model against the stock one of transformers and PEFT on the CPU."""

import pytest
import torch
from patch_cases import FAMILIES, assert_same, batch, fused_layers, make_model, make_nf4_model, step

from tuneline.kernels import patching, spec
from tuneline.kernels.patching import patch, unpatch


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
    # ../experts/test_experts_layer.py compares the families with routed experts.
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
