"""When a captured graph may be replayed: its key, which needs no GPU."""

import pytest
import torch

from tuneline.kernels.attention import AttentionConfig, AttentionPlan
from tuneline.kernels.budget import kept_bytes, normed_bytes
from tuneline.kernels.graph import Room, _key, equal_tokens, held_bytes
from tuneline.kernels.layer import LayerCall
from tuneline.kernels.layer_weights import LayerWeights
from tuneline.kernels.lora import LoraGroup, LoraLinear

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
