"""When a captured graph may be replayed, and what autograd sees of it: neither needs a GPU."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from tuneline.kernels import decisions, patching
from tuneline.kernels.decoder import graph
from tuneline.kernels.decoder.budget import kept_bytes, normed_bytes, workspace_bytes
from tuneline.kernels.decoder.graph import (
    GraphCache,
    GraphedStack,
    GraphMemory,
    Room,
    _shapes,
    graph_addresses,
    held_bytes,
)
from tuneline.kernels.decoder.layer import LayerCall, layer_backward, layer_forward
from tuneline.kernels.decoder.layer_weights import LayerWeights
from tuneline.kernels.limits import equal_tokens
from tuneline.kernels.ops.attention import AttentionConfig, AttentionPlan
from tuneline.kernels.ops.flatten import Scaled
from tuneline.kernels.ops.lora import LoraGroup, LoraLinear
from tuneline.kernels.patching import patch

TENSORS = ["weight", "bias", "lora_a", "lora_b", "attention_norm", "mlp_norm", "q_norm", "k_norm"]
TENSORS += ["after_attention_norm", "after_mlp_norm"]


def _layers(tensors, *, keep=True, scaling=1.0):
    """Build one layer that reads each of the tensors."""
    names = ("weight", "bias", "lora_a", "lora_b")
    first = LoraLinear(
        num_out=8, num_in=8, scaling=scaling, **{name: tensors[name] for name in names}
    )
    plain = LoraGroup((LoraLinear(tensors["other"], 8, 8),))
    weights = LayerWeights(
        LoraGroup((first,)), plain, plain, plain, AttentionConfig(1, 1, 8, 1.0), "silu", 1e-6,
        False, **{name: tensors[name] for name in TENSORS if name.endswith("norm")},
    )  # fmt: skip
    return [(weights, LayerCall(AttentionPlan(), keep))]


def _key(layers, x, cos):
    """Return all that the graph of these layers depends on."""
    return _shapes(layers, x, cos), graph_addresses(layers)


@pytest.fixture
def tensors():
    sizes = {"weight": (8, 8), "other": (8, 8), "lora_a": (2, 8), "lora_b": (8, 2)}
    return {name: torch.ones(sizes.get(name, (8,))) for name in [*TENSORS, "other"]}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_elsewhere_asks_for_another_graph(name, tensors):
    x = torch.ones(1, 3, 8)
    moved = _key(_layers({**tensors, name: tensors[name].clone()}), x, x)
    assert moved != _key(_layers(tensors), x, x)
    # The shape stands apart, so that what is stale of it can be found.
    assert moved[0] == _key(_layers(tensors), x, x)[0]


def test_the_same_call_finds_its_graph_and_others_do_not(tensors):
    x = torch.ones(1, 3, 8)
    key = _key(_layers(tensors), x, x)
    assert key == _key(_layers(tensors), x.clone(), x.clone())
    assert key != _key(_layers(tensors, keep=False), x, x)
    assert key != _key(_layers(tensors, scaling=2.0), x, x)
    assert key != _key(_layers(tensors), x[:, :2], x)
    assert key != _key(_layers(tensors), x.half(), x)


def _plan(*lengths):
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return AttentionPlan.packed(starts, sum(lengths), torch.device("cpu"))


def test_packed_rows_share_a_room():
    assert Room.of(AttentionPlan(), 300) is None
    room = Room.of(_plan(200, 1, 47, 52), 300)
    assert room == Room(num_tokens=384, num_sequences=8, longest=256)
    assert room == Room.of(_plan(255, 50, 5, 5, 5, 5, 3), 328)
    # Eight sequences and the one at the end are more than eight.
    assert room != Room.of(_plan(200, 1, 47, 20, 20, 5, 5, 2), 300)
    plan = room.plan(torch.device("cpu"))
    assert plan.longest(384) == 256 and plan.cu_seqlens.numel() == 9


def test_rows_of_one_room_find_one_graph(tensors):
    keys = []
    for lengths in [(200, 100), (150, 140), (20, 200)]:
        layers = [(weights, LayerCall(_plan(*lengths), True)) for weights, _ in _layers(tensors)]
        keys.append(_key(layers, torch.ones(1, sum(lengths), 8), torch.ones(1, sum(lengths), 4)))
    assert keys[0] == keys[1] != keys[2]


def test_a_graph_holds_what_its_layers_keep(tensors):
    (weights, _), *_ = _layers(tensors)
    plan = AttentionPlan()
    lean, kept, all_of_it = (
        held_bytes([(weights, LayerCall(plan, keep, keep_normed=normed))], 5, 2)
        for keep, normed in [(False, False), (True, False), (True, True)]
    )
    assert lean == 5 * 8 * 2
    assert kept - lean == kept_bytes(weights, 5, 2)
    assert all_of_it - kept == normed_bytes(weights, 5, 2)


def test_tokens_count_by_the_weights_that_they_meet(tensors):
    (weights, _), *_ = _layers(tensors)
    num_weights = sum(group.num_out * group.num_in for group in weights.groups())
    assert num_weights == 4 * 64
    # Llama-3.1-8B's layer: q and o, k and v, the MLP.
    eight_b = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    assert equal_tokens(weights.multiplied_weights, eight_b) == num_weights


class _Unrecorded(GraphedStack):
    """A stack that computes where the true one replays."""

    def __init__(self, layers, memory):
        self.memory = memory
        self._layers = layers
        self._parameters = [weights.parameters() for weights, _ in layers]

    def replay_forward(self, plan, x_BLC, cos, sin):
        self._tables, self._saved, x = (cos, sin), [], x_BLC
        for weights, call in self._layers:
            y, _, _, saved = layer_forward(x, cos, sin, weights, call)
            self._saved.append(saved)
            x = y
        return x

    def replay_backward(self, dy_BLC):
        grads = []
        for saved, (weights, call) in zip(
            reversed(self._saved), reversed(self._layers), strict=True
        ):
            dy_BLC, of_layer = layer_backward(dy_BLC, saved, *self._tables, weights, call)
            adapters = weights.parameters()
            grads.insert(0, [g.value(p.dtype) for g, p in zip(of_layer, adapters, strict=True)])
        return dy_BLC, grads


class _Always:
    """In place of the cache: every forward finds a stack."""

    num_found = 0

    def find(self, layers, *inputs):
        self.num_found += 1
        return _Unrecorded(layers, GraphMemory())


def _model():
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=67, hidden_size=32, intermediate_size=40, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, pad_token_id=0,
    )  # fmt: skip
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(config).double(), lora).double().train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    return model


def _arrivals(model, ids):
    """Run a step; return the names of parameters as their gradients come, and the gradients."""
    model.zero_grad(set_to_none=True)
    names = {parameter: name for name, parameter in model.named_parameters()}
    order, trained = [], [p for p in model.parameters() if p.requires_grad]
    hooks = [
        p.register_post_accumulate_grad_hook(lambda p: order.append(names[p])) for p in trained
    ]
    model(input_ids=ids, labels=ids).loss.backward()
    for hook in hooks:
        hook.remove()
    return order, {names[p]: p.grad for p in trained}


def test_gradients_of_a_stack_come_in_the_order_of_layers_run_alone(references, monkeypatch):
    # ZeRO-2 sums buckets over ranks in this order, and a rank with a graph may meet one without.
    model, ids = _model(), torch.randint(1, 67, (2, 9), generator=torch.Generator().manual_seed(5))
    patch(model)
    alone, want = _arrivals(model, ids)
    always, decide = _Always(), decisions.decide
    monkeypatch.setattr(
        patching, "decide", lambda *args: decisions.ModelCall(decide(*args).layers, always)
    )
    stacked, got = _arrivals(model, ids)
    assert always.num_found == 1
    assert stacked == alone
    assert len(alone) == len(set(alone)) == 3 * 7 * 2
    # The last layer's come first, whole.
    assert [int(name.split("layers.")[1][0]) for name in alone] == [2] * 14 + [1] * 14 + [0] * 14
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.fixture
def unrecorded(monkeypatch):
    """Let the cache build stacks that compute where true ones replay, and name their pools."""
    made = []

    class Stack(_Unrecorded):
        def __init__(self, layers, x_BLC, cos, sin, memory):
            super().__init__(layers, memory)
            memory.pool = memory.pool or object()
            made.append(memory.pool)

    monkeypatch.setattr(graph, "GraphedStack", Stack)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**30))
    return made


def _find(cache, layers, length):
    x = torch.ones(1, length, 8)
    return cache.find(layers, graph_addresses(layers), x, x, x)


def test_while_a_forward_waits_no_graph_of_the_model_is_replayed_or_captured(tensors, unrecorded):
    layers, cache = _layers(tensors), GraphCache()
    assert [_find(cache, layers, n) for n in (3, 4, 5)] == [None] * 3
    one, other = _find(cache, layers, 3), _find(cache, layers, 4)
    assert one is not other and one.memory is other.memory
    waiting = graph._Replay(one)
    # Another shape's activations lie in the same memory.
    assert [_find(cache, layers, n) for n in (3, 4, 5)] == [None] * 3
    assert len(unrecorded) == 2
    waiting.release()
    assert _find(cache, layers, 3) is one and _find(cache, layers, 4) is other
    # A replay that no backward follows is deleted, and frees the memory too.
    waiting = graph._Replay(one)
    assert _find(cache, layers, 4) is None
    del waiting
    assert _find(cache, layers, 4) is other
    assert _find(cache, layers, 5).memory is one.memory and len(set(unrecorded)) == 1


def test_a_backward_after_another_graphs_forward_is_refused(tensors, unrecorded):
    layers, cache = _layers(tensors), GraphCache()
    for length in (3, 4):
        _find(cache, layers, length)
    one, other = _find(cache, layers, 3), _find(cache, layers, 4)
    first, _ = graph._Replay(one), graph._Replay(other)
    with pytest.raises(RuntimeError, match="overwritten by a later one"):
        first.backward(torch.ones(1, 3, 8))


def test_a_pool_without_graphs_is_not_used_again(tensors, unrecorded):
    cache = GraphCache()
    for scaling in (1.0, 2.0, 2.0):
        for length in (3, 4):
            _find(cache, _layers(tensors, scaling=scaling), length)
            _find(cache, _layers(tensors, scaling=scaling), length)
    # The second adapter's graph of 3 tokens replaces the first's while that of 4 tokens is there.
    assert [unrecorded.index(pool) for pool in unrecorded] == [0, 0, 0, 0]
    alone = GraphCache()
    for scaling in (1.0, 2.0):
        _find(alone, _layers(tensors, scaling=scaling), 3)
        _find(alone, _layers(tensors, scaling=scaling), 3)
    assert unrecorded[4] is not unrecorded[5]


def test_a_graph_that_would_fill_the_gpu_is_not_captured(tensors, unrecorded, monkeypatch):
    layers, cache = _layers(tensors), GraphCache()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 900))
    _find(cache, layers, 3)
    assert held_bytes(layers, 3, 4) > 450
    assert _find(cache, layers, 3) is None and not unrecorded


def test_the_number_of_captured_shapes_has_a_limit(tensors, unrecorded):
    layers, cache = _layers(tensors), GraphCache()
    for length in range(1, graph.MAX_GRAPHS + 3):
        _find(cache, layers, length)
        stack = _find(cache, layers, length)
        assert (stack is None) == (length > graph.MAX_GRAPHS)
    assert len(unrecorded) == graph.MAX_GRAPHS
    assert _find(cache, layers, 1) is not None
    # A graph of other weights takes the place of one of the same shape.
    for _ in range(2):
        other = _find(cache, _layers(tensors, scaling=2.0), 1)
    assert other is not None and len(unrecorded) == graph.MAX_GRAPHS + 1


def test_layers_without_adapters_have_no_gradients_in_the_flat_tensor(tensors):
    (adapted, call), *_ = _layers(tensors)
    plain = replace(adapted, qkv=adapted.o)
    stack = _Unrecorded([(plain, call), (adapted, call), (plain, call)], GraphMemory())
    flatteners = stack._create_flatteners(torch.device("cpu"))
    assert stack._flat_grads.shape == (2 * 2 * 8,)
    a, b = torch.randn(2, 8), torch.randn(8, 2)
    for flattener, grads in zip(flatteners, ([], [Scaled(a), Scaled(b, 2.0)], []), strict=True):
        flattener.launch(grads)
        flattener.fill()
    assert torch.equal(stack._flat_grads, torch.cat([a.flatten(), 2 * b.flatten()]))


def test_packed_rows_are_captured_if_there_is_room_without_a_graph_too(
    tensors, unrecorded, monkeypatch
):
    (weights, call), *_ = _layers(tensors)
    layers = [(weights, replace(call, plan=_plan(200, 100)))]
    twice = 2 * (held_bytes(layers, 384, 4) + workspace_bytes(weights, 384, 4))
    for free, idle, is_captured in [
        (twice - 1, 0, False), (twice, 0, True), (0, twice, True), (twice - 8, 7, False),
    ]:  # fmt: skip
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 2**30))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device, idle=idle: 100 + idle)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
        cache = GraphCache()
        assert _find(cache, layers, 300) is None
        assert (_find(cache, layers, 300) is not None) == is_captured
    # A row that is not packed has one shape.
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 100)
    cache = GraphCache()
    assert [_find(cache, _layers(tensors), 300) is None for _ in range(2)] == [True, False]
