"""What a lean layer parks in the host's memory, by the shapes of real families."""

import pytest
import torch

from tuneline.kernels.decoder.attention_half import Saved
from tuneline.kernels.decoder.budget import HostRoom, kept_bytes, parked, share_out
from tuneline.kernels.decoder.layer_weights import LayerWeights
from tuneline.kernels.limits import HEAD_ROOM
from tuneline.kernels.ops.attention import AttentionConfig, AttentionPlan
from tuneline.kernels.ops.lora import LoraGroup, LoraLinear


def layer(hidden, mlp, num_heads, num_kv_heads, head_dim, *, sandwich=False, fp8=False):
    """Build a layer's weights, empty; with an adapter of rank 16 on o_proj."""

    def group(num_out, num_in):
        weight = torch.empty(num_out, num_in, dtype=torch.bfloat16, device="meta")
        adapter = torch.empty(16, num_in, device="meta"), torch.empty(num_out, 16, device="meta")
        return LoraGroup(
            (LoraLinear(weight, num_out, num_in, None, *adapter),),
            largest=torch.ones(()) if fp8 else None,
        )

    query, key_value = num_heads * head_dim, num_kv_heads * head_dim
    norm = torch.empty(hidden, device="meta")
    return LayerWeights(
        group(query + 2 * key_value, hidden),
        group(hidden, query),
        group(2 * mlp, hidden),
        group(hidden, mlp),
        AttentionConfig(num_heads, num_kv_heads, head_dim, head_dim**-0.5),
        "silu",
        1e-5,
        False,
        norm,
        norm,
        after_attention_norm=norm if sandwich else None,
        after_mlp_norm=norm if sandwich else None,
    )


LLAMA_8B = (4096, 14336, 32, 8, 128)
PHI_35 = (3072, 8192, 32, 32, 96)
GEMMA_2_9B = (3584, 14336, 16, 8, 256)


@pytest.mark.parametrize(
    ("sizes", "sandwich", "expected"),
    [
        (LLAMA_8B, False, Saved(qkv=True, output=True, branch=True)),
        # All of its q, k and v are 18 of 30 KB a token, which a forward of 0.32 us cannot hide.
        (PHI_35, False, Saved(qkv=False, output=True, branch=True)),
        # d goes along.
        (GEMMA_2_9B, True, Saved(qkv=False, output=True, branch=True)),
    ],
)
def test_a_lean_layer_parks_what_its_forward_hides(sizes, sandwich, expected):
    assert parked(layer(*sizes, sandwich=sandwich), AttentionPlan(), 2048, 2) == expected


def test_long_rows_hide_more():
    weights = layer(*PHI_35)
    assert parked(weights, AttentionPlan(), 32768, 2) == Saved(True, True, True)
    # As sequences packed into the same row they do not.
    starts = list(range(0, 32768, 128))
    plan = AttentionPlan.packed(starts, 32768, torch.device("cpu"))
    assert not parked(weights, plan, 32768, 2).qkv


def test_fp8_is_done_before_so_much_is_copied():
    assert parked(layer(*LLAMA_8B, fp8=True), AttentionPlan(), 2048, 2) != Saved(True, True, True)


def test_wide_numbers_may_leave_only_x():
    assert parked(layer(*PHI_35), AttentionPlan(), 16, 8) == Saved()


@pytest.mark.parametrize(
    ("gib", "expected"),
    [
        # 31 layers: x, q k v, the attention's output and x2 in blocks of 512 to 1024 MiB.
        (93.0, Saved(qkv=True, output=True, branch=True)),
        (92.9, Saved(qkv=True, output=True, branch=False)),
        (15.5, Saved()),
        (15.4, None),
    ],
)
def test_a_lean_layer_parks_what_the_host_has_room_for(gib, expected):
    host = HostRoom(int(gib * 2**30), 31, 65536)
    assert parked(layer(*LLAMA_8B), AttentionPlan(), 65536, 2, host) == expected


@pytest.mark.parametrize("num_tokens", [1024, 2048, 8192])
@pytest.mark.parametrize("head_bytes", [0, 2 * 128256 * 4096])
def test_kept_layers_leave_room_for_the_head_and_the_forward_beside_it(
    head_bytes, num_tokens, monkeypatch
):
    gib, layers = 2**30, [layer(*LLAMA_8B)] * 32
    free, total = int(3.5 * gib), 8 * gib
    # There is no GPU here whose memory could be measured.
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    kept = share_out(
        *("auto", layers),
        num_tokens=num_tokens,
        itemsize=2,
        device=torch.device("cuda"),
        head_bytes=head_bytes,
    )
    row = 2 * 4096 * num_tokens
    # Micro-batches of 4096 tokens or more have their inputs in host memory.
    stored = 32 * row if num_tokens < 4096 else 0
    stored += kept.num_layers * kept_bytes(layers[0], num_tokens, 2)
    # The MLP's weights; gate, up and their product; and four tensors of the size of x.
    forward = 2 * 3 * 14336 * (4096 + min(num_tokens, 4096)) + 4 * row
    assert stored + head_bytes + forward <= free - HEAD_ROOM * total
    assert 1 <= kept.num_layers < 32
