"""When a captured graph may be replayed, and what autograd sees of it: neither needs a GPU."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from tuneline.kernels import decisions, patching
from tuneline.kernels.decoder.budget import kept_bytes, normed_bytes
from tuneline.kernels.decoder.graph import (
    GraphedStack,
    Room,
    _shapes,
    equal_tokens,
    graph_addresses,
    held_bytes,
)
from tuneline.kernels.decoder.layer import LayerCall, layer_backward, layer_forward
from tuneline.kernels.decoder.layer_weights import LayerWeights
from tuneline.kernels.ops.attention import AttentionConfig, AttentionPlan
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
    assert equal_tokens(weights, eight_b) == num_weights


class _Unrecorded(GraphedStack):
    """A stack that computes where the true one replays."""

    def __init__(self, layers):
        self.generation = self.num_claims = 0
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
        return _Unrecorded(layers)


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
