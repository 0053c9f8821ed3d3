"""The patched model on a GPU in bf16: no further from float32's truth than the stock model is."""

import copy
import itertools
import threading

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tuneline.kernels.decoder.layer import LayerCall

pytestmark = pytest.mark.gpu

SIZES = {
    "vocab_size": 1000,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=100)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES)),
    "phi3": (
        Phi3ForCausalLM,
        Phi3Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}, sliding_window=None),
    ),
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config(**SIZES, sliding_window=100, attn_implementation="eager"),
    ),
}


def make_model(family):
    """Build a small model with LoRA whose B is not zero, in float32 on the GPU."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    cls, config = FAMILIES[family]
    model = get_peft_model(cls(copy.deepcopy(config)), LoraConfig(r=8, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.02 * torch.randn_like(parameter)
    return model.cuda().train()


def gradients(model, inputs):
    """Return the loss and the adapters' gradients in float64."""
    model.zero_grad(set_to_none=True)
    loss = model(**inputs).loss
    loss.backward()
    grads = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
    return loss.double(), grads


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_error_is_at_most_the_stock_models(family, packed):
    from tuneline.kernels.patching import patch, unpatch

    generator = torch.Generator().manual_seed(2)
    inputs = {"input_ids": torch.randint(1, 1000, (1 if packed else 2, 517), generator=generator)}
    if packed:
        lengths = (200, 1, 47, 269)
        inputs["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
    inputs = {name: value.cuda() for name, value in inputs.items()}
    inputs |= {"labels": inputs["input_ids"], "use_cache": False}
    model = make_model(family)
    model.to(torch.bfloat16)
    stock = gradients(model, inputs)
    fused = {}
    for budget in ("lean", "auto"):
        report = patch(model, budget=budget)
        assert len(report.fused) == 3, str(report)
        fused[budget] = gradients(model, inputs)
    unpatch(model)
    truth = gradients(model.float(), inputs)
    assert torch.equal(fused["lean"][0], fused["auto"][0])
    errors = {"stock": 0.0, "fused": 0.0}
    for name, want in truth[1].items():
        assert torch.equal(fused["lean"][1][name], fused["auto"][1][name]), name
        errors["fused"] += ((fused["auto"][1][name] - want).norm() / want.norm()).item()
        errors["stock"] += ((stock[1][name] - want).norm() / want.norm()).item()
    assert errors["fused"] <= 1.05 * errors["stock"], errors
    assert (fused["auto"][0] - truth[0]).abs() <= (stock[0] - truth[0]).abs() + 2e-3 * truth[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_hidden_states_are_no_further_from_the_truth_than_the_stock_models(family):
    from tuneline.kernels.inference import fused_inference, runs_fused

    torch.manual_seed(1)
    cls, config = FAMILIES[family]
    model = cls(copy.deepcopy(config)).cuda().bfloat16().eval()
    generator = torch.Generator().manual_seed(2)
    lengths = (200, 1, 47, 269)
    sequences = [torch.randint(1, 1000, (n,), generator=generator).tolist() for n in lengths]

    @torch.inference_mode()
    def alone():
        inputs = (torch.tensor([ids], device="cuda") for ids in sequences)
        states = [model.model(input_ids=ids, use_cache=False)[0][0] for ids in inputs]
        return torch.cat(states).double()

    stock = alone()
    assert runs_fused(model)
    with fused_inference(model) as fused:
        assert fused.takes(269)
        found = torch.cat(fused.hidden_states(sequences, [0] * 4)).double()
    model.float()
    truth = alone()
    assert (found - truth).norm() <= 1.05 * (stock - truth).norm()


@pytest.mark.parametrize("is_hopper", [False, True])
@pytest.mark.parametrize("window", [None, 100])
def test_wide_capped_heads_with_the_tiles_of_each_gpu(window, is_hopper, monkeypatch):
    from tuneline.kernels.ops import flash
    from tuneline.kernels.ops.attention import (
        AttentionConfig,
        AttentionPlan,
        attention_backward,
        attention_forward,
        attention_reference,
    )

    if is_hopper and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the tiles of Hopper need its shared memory")
    monkeypatch.setattr(flash, "_is_hopper", lambda tensor: is_hopper)
    # Gemma 2's heads.
    config = AttentionConfig(8, 4, 256, 256**-0.5, window=window, softcap=5.0)
    plan = AttentionPlan.packed([0, 300, 301], 513, torch.device("cuda"))
    generator = torch.Generator("cuda").manual_seed(3)
    q, k, v, upstream = (
        torch.randn(1, 513, heads, 256, generator=generator, device="cuda").bfloat16()
        for heads in (8, 4, 4, 8)
    )
    o = torch.empty_like(q)
    saved = attention_forward(q, k, v, plan, config, out=o)
    grads = tuple(torch.empty_like(x) for x in (q, k, v))
    dq, dk = attention_backward(upstream, q, k, v, o, saved, plan, config, out=grads)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    truth = attention_reference(*leaves, plan, config)
    wanted = torch.autograd.grad(truth, leaves, upstream.double())
    for got, want in zip((o, dq, dk, grads[2]), (truth, *wanted), strict=True):
        assert (got.double() - want).norm() <= 1e-2 * want.norm()


def test_the_host_stash_gives_back_what_it_took():
    from tuneline.kernels.decoder.stash import HostStash

    stash = HostStash()
    parked = [torch.randn(64, 1024, 33, device="cuda") for _ in range(4)]
    truth = [x.clone() for x in parked]
    tickets = [stash.put([x, x[0].clone()]) for x in parked]
    parked = [None] * 4
    noise = [torch.randn(64, 1024, 33, device="cuda") for _ in range(4)]
    for i in (3, 2, 1, 0):
        whole, first = stash.get(tickets[i])
        assert torch.equal(whole, truth[i]) and torch.equal(first, truth[i][0])
    assert torch.equal(stash.get(tickets[2])[0], truth[2])
    assert len(noise) == 4


def test_the_host_stash_pins_once_for_steps_of_unlike_lengths():
    from tuneline.kernels.decoder.stash import HostPool

    pool, seen = HostPool(), set()
    for num_tokens in (8192, 8150, 8101, 8192):
        views = [pool.take(torch.empty(num_tokens, width, device="cuda")) for width in (64, 96)]
        assert all(view.is_pinned() and view.is_contiguous() for view in views)
        assert [view.shape[1] for view in views] == [64, 96]
        seen |= {view.data_ptr() for view in views}
        pool.give(views)
    assert len(seen) == 2


def test_graphs_give_the_bits_of_the_eager_run(monkeypatch):
    from tuneline.kernels import limits, patch

    model = make_model("llama").to(torch.bfloat16)
    generator = torch.Generator().manual_seed(4)
    batches = torch.randint(1, 1000, (4, 2, 300), generator=generator).cuda()
    patch(model)
    monkeypatch.setattr(limits, "GRAPH_MAX_TOKENS", 0)
    eager = [gradients(model, {"input_ids": ids, "labels": ids}) for ids in batches]
    monkeypatch.setattr(limits, "GRAPH_MAX_TOKENS", 2048)
    replayed = [gradients(model, {"input_ids": ids, "labels": ids}) for ids in batches]
    graphs = model.get_base_model().model._tuneline_engine.graphs._graphs
    assert [type(g).__name__ for g in graphs.values()] == ["GraphedStack"]
    for (loss, grads), (want_loss, want) in zip(replayed, eager, strict=True):
        assert torch.equal(loss, want_loss)
        assert all(torch.equal(grads[name], want[name]) for name in want)
    # Two forwards before a backward: the second finds the graph taken.
    model.zero_grad(set_to_none=True)
    losses = [model(input_ids=ids, labels=ids).loss for ids in batches[:2]]
    sum(losses).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            want = eager[0][1][name] + eager[1][1][name]
            assert (parameter.grad.double() - want).norm() <= 1e-2 * want.norm(), name


def test_a_loader_may_pin_its_batches_while_a_graph_is_captured(monkeypatch):
    from tuneline.kernels import limits, patch

    monkeypatch.setattr(limits, "GRAPH_MAX_TOKENS", 2048)
    model = make_model("llama").to(torch.bfloat16)
    patch(model)
    row = packed_row((300, 213), 7)
    done = threading.Event()

    def pin():
        kept = []
        while not done.wait(0.001):
            # Kept, because freed pinned memory is not allocated anew.
            kept.append(torch.empty(2**16, dtype=torch.uint8).pin_memory())

    loader = threading.Thread(target=pin)
    loader.start()
    try:
        for _ in range(3):
            gradients(model, row)
    finally:
        done.set()
        loader.join()
    graphs = model.get_base_model().model._tuneline_engine.graphs._graphs
    assert [type(g).__name__ for g in graphs.values()] == ["GraphedStack"]


def packed_row(lengths, seed):
    """Return inputs of one packed row of such sequences."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 1000, (1, sum(lengths)), generator=generator).cuda()
    positions = torch.cat([torch.arange(n) for n in lengths])[None].cuda()
    return {"input_ids": ids, "labels": ids, "position_ids": positions}


def test_one_graph_serves_packed_rows_of_many_lengths(monkeypatch):
    from tuneline.kernels import limits, patch

    model = make_model("llama").to(torch.bfloat16)
    rows = [
        packed_row(lengths, seed)
        for seed, lengths in enumerate(
            [(120, 1, 47, 129), (130, 126, 100, 20, 8), (9, 80, 140, 60), (140, 100, 30, 20, 10)]
        )
    ]
    patch(model)
    monkeypatch.setattr(limits, "GRAPH_MAX_TOKENS", 0)
    eager = [gradients(model, row) for row in rows]
    monkeypatch.setattr(limits, "GRAPH_MAX_TOKENS", 2048)
    replayed = [gradients(model, row) for row in rows]
    graphs = model.get_base_model().model._tuneline_engine.graphs._graphs
    assert [type(g).__name__ for g in graphs.values()] == ["GraphedStack"]
    for (loss, grads), (want_loss, want) in zip(replayed, eager, strict=True):
        # A product of another number of rows may round otherwise.
        assert (loss - want_loss).abs() <= 1e-3 * want_loss
        for name in want:
            assert (grads[name] - want[name]).norm() <= 2e-2 * want[name].norm(), name


def test_graphs_of_several_rooms_share_their_memory(monkeypatch):
    from tuneline.kernels import limits, patch

    model = make_model("llama").to(torch.bfloat16)
    all_lengths = [(120, 1, 47, 129), (64,) * 8, (300, 213)]
    rows = [packed_row(lengths, seed) for seed, lengths in enumerate(all_lengths)]
    patch(model)
    monkeypatch.setattr(limits, "GRAPH_MAX_TOKENS", 0)
    eager = [gradients(model, row) for row in rows]
    monkeypatch.setattr(limits, "GRAPH_MAX_TOKENS", 2048)
    for _ in range(2):
        replayed = [gradients(model, row) for row in rows]
    graphs = list(model.get_base_model().model._tuneline_engine.graphs._graphs.values())
    assert [type(graph).__name__ for graph in graphs] == ["GraphedStack"] * 3
    assert len({id(graph.memory) for graph in graphs}) == 1
    assert len({graph._flat_grads.data_ptr() for graph in graphs}) == 1
    for (loss, grads), (want_loss, want) in zip(replayed, eager, strict=True):
        assert (loss - want_loss).abs() <= 1e-3 * want_loss
        for name in want:
            assert (grads[name] - want[name]).norm() <= 2e-2 * want[name].norm(), name
    # The order of the captures is none that the replays have to keep.
    for order in itertools.permutations(range(3)):
        for index in order:
            loss, grads = gradients(model, rows[index])
            assert torch.equal(loss, replayed[index][0])
            assert all(torch.equal(grads[name], replayed[index][1][name]) for name in grads)


@pytest.mark.parametrize("kept_layers", [0, 1, 2])
def test_what_is_parked_comes_back_the_same(kept_layers, monkeypatch):
    from tuneline.kernels import decisions, patch
    from tuneline.kernels.decoder.budget import kept_bytes

    model = make_model("llama").to(torch.bfloat16)
    row = packed_row((300, 213), 7)
    patch(model, budget="lean")
    want = gradients(model, row)
    states, *_ = model.get_base_model().model._tuneline_engine.bound.values()
    (weights,) = states.values()
    monkeypatch.setattr(decisions, "STASH_MIN_TOKENS", 1)
    patch(model, budget=(kept_layers + 0.5) * kept_bytes(weights, 513, 2) / 2**30)
    for _ in range(2):
        loss, grads = gradients(model, row)
        engine = model.get_base_model().model._tuneline_engine
        assert engine.last_kept.num_layers == kept_layers and engine.stash.last is not None
        assert torch.equal(loss, want[0])
        assert all(torch.equal(grads[name], want[1][name]) for name in grads)


def test_a_graph_is_captured_after_a_forward_that_parks(monkeypatch):
    from tuneline.kernels import decisions, limits, patch
    from tuneline.kernels.decoder.budget import kept_bytes

    model = make_model("llama").to(torch.bfloat16)
    short, long = packed_row((300, 213), 7), packed_row((900, 1100), 8)
    patch(model, budget="lean")
    want = gradients(model, short)
    states, *_ = model.get_base_model().model._tuneline_engine.bound.values()
    (weights,) = states.values()
    monkeypatch.setattr(decisions, "STASH_MIN_TOKENS", 1)
    monkeypatch.setattr(limits, "GRAPH_MAX_TOKENS", 2048)
    # Three layers of the short row are kept, and none of the long one.
    patch(model, budget=3.2 * kept_bytes(weights, 513, 2) / 2**30)
    engine = model.get_base_model().model._tuneline_engine
    num_kept = []
    for row in (short, long, short, short):
        loss, grads = gradients(model, row)
        num_kept.append(engine.last_kept.num_layers)
    assert num_kept == [3, 0, 3, 3]
    graphs = engine.graphs._graphs
    assert [type(g).__name__ for g in graphs.values()] == ["GraphedStack"]
    # The graph's row is padded, and a product of another number of rows may round otherwise.
    assert (loss - want[0]).abs() <= 1e-3 * want[0]
    for name, grad in want[1].items():
        assert (grads[name] - grad).norm() <= 2e-2 * grad.norm(), name


def test_without_host_memory_nothing_is_parked(monkeypatch):
    from tuneline.kernels import decisions, patch

    model = make_model("llama").to(torch.bfloat16)
    monkeypatch.setattr(decisions, "STASH_MIN_TOKENS", 1)
    row = packed_row((300, 213), 7)
    for host_bytes, parks in ((0, False), (2**30, True), (None, True)):
        patch(model, budget="lean", host_bytes=host_bytes)
        loss = model(**row).loss
        engine = model.get_base_model().model._tuneline_engine
        assert (engine.stash.last is not None) == parks
        assert host_bytes is None or engine.host_bytes == host_bytes
        loss.backward()


def quantized_llama(**sizes):
    """Build a small Llama on NF4 with double quantisation, and LoRA whose B is not zero."""
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **sizes})).to(torch.bfloat16)
    for parent in list(model.model.modules()):
        for name, linear in list(parent.named_children()):
            if isinstance(linear, torch.nn.Linear):
                new = bnb.nn.Linear4bit(
                    linear.in_features, linear.out_features, bias=False,
                    compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=True,
                )  # fmt: skip
                new.weight = bnb.nn.Params4bit(
                    linear.weight.data, requires_grad=False, quant_type="nf4"
                )
                setattr(parent, name, new)
    model = get_peft_model(model.cuda(), LoraConfig(r=8, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.02 * torch.randn_like(parameter)
    return model.train()


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="needs Hopper"
)
@pytest.mark.parametrize("budget", ["lean", "auto"])
def test_fp8_is_off_by_its_rounding_and_no_more(budget):
    from tuneline.kernels.patching import patch

    model = quantized_llama(intermediate_size=1408)
    ids = torch.randint(1, 1000, (2, 640), generator=torch.Generator().manual_seed(2)).cuda()
    inputs = {"input_ids": ids, "labels": ids}
    patch(model, budget=budget)
    want = gradients(model, inputs)
    report = patch(model, budget=budget, fp8=True)
    assert report.num_fp8_groups == 12
    got, again = gradients(model, inputs), gradients(model, inputs)
    assert abs(got[0] - want[0]) < 5e-3 * want[0]
    for name, grad in want[1].items():
        # Three layers of products, each off by 3.7 %.
        assert (got[1][name] - grad).norm() < 0.25 * grad.norm(), name
        assert torch.equal(got[1][name], again[1][name]), name


def test_repeated_decisions_take_the_sequences_of_their_own_forward():
    from tuneline.kernels.patching import check_layers_once, patch

    model = quantized_llama()
    ids = torch.randint(1, 1000, (1, 300), generator=torch.Generator().manual_seed(2)).cuda()
    packs, want = [], []
    for first in (200, 130, 170):
        positions = torch.cat([torch.arange(first), torch.arange(300 - first)])[None].cuda()
        packs.append({"input_ids": ids, "labels": ids, "position_ids": positions})
        patch(model)
        want.append(gradients(model, packs[-1]))
    decoder = model.get_base_model().model

    def assert_near(got, expected):
        assert abs(got[0] - expected[0]) < 2e-3 * expected[0]
        for name, grad in expected[1].items():
            assert (got[1][name] - grad).norm() < 0.02 * grad.norm(), name

    patch(model)
    check_layers_once(model)
    for _ in range(3):
        for pack, expected in zip(packs, want, strict=True):
            assert_near(gradients(model, pack), expected)
    assert len(decoder._tuneline_engine.repeated) == 1
    # While a backward is outstanding, the graph is not free, and a forward runs layer by layer.
    outstanding = model(**packs[0]).loss
    assert_near(gradients(model, packs[1]), want[1])
    outstanding.backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2)
    changed = gradients(model, packs[2])
    patch(model)
    assert_near(changed, gradients(model, packs[2]))


@pytest.mark.parametrize("length", [300, 3000])
def test_tables_on_the_host_change_no_bit(length, monkeypatch):
    from tuneline.kernels import decisions
    from tuneline.kernels.patching import patch, unpatch

    def wide(*args, narrow, **kwargs):
        """Return the call of a layer whose chunks are as large as without the tables."""
        return LayerCall(*args, **kwargs)

    model = quantized_llama()
    # Two sequences in one row: cuDNN's attention, which computes dense rows, sums dq in any order.
    shape, generator = (1, 2 * length), torch.Generator().manual_seed(2)
    ids = torch.randint(1, 1000, shape, generator=generator).cuda()
    positions = torch.arange(length).repeat(2)[None].cuda()
    inputs = {"input_ids": ids, "labels": ids, "position_ids": positions}
    patch(model, budget="lean")
    want = gradients(model, inputs)
    head = model.get_output_embeddings()
    tables = {m: m.weight.clone() for m in (model.get_input_embeddings(), head)}
    logits = model(input_ids=ids).logits
    patch(model, budget="lean", tables_on_host=True)
    assert all(module.weight.is_pinned() for module in tables)
    monkeypatch.setattr(decisions, "LayerCall", wide)
    for _ in range(3):
        # The second forward captures a graph if the batch is small, and the third replays it.
        got = gradients(model, inputs)
        assert torch.equal(got[0], want[0])
        assert all(torch.equal(got[1][name], want[1][name]) for name in want[1])
        assert head._tuneline_copy is None
    assert torch.equal(model(input_ids=ids).logits, logits)
    monkeypatch.undo()
    got = gradients(model, inputs)
    assert abs(got[0] - want[0]) < 1e-3 * want[0]
    for name, grad in want[1].items():
        assert (got[1][name] - grad).norm() < 0.02 * grad.norm(), name
    model.eval()
    held = torch.cuda.memory_allocated()
    with torch.no_grad():
        loss = model(**inputs).loss.item()
    assert abs(loss - want[0].item()) < 0.02 and torch.cuda.memory_allocated() == held
    unpatch(model)
    for module, table in tables.items():
        assert type(module) in (torch.nn.Embedding, torch.nn.Linear)
        assert module.weight.is_cuda and torch.equal(module.weight, table)
