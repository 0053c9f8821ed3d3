"""The tables on the host: rows, the way there and back, and what is left where it is."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tuneline.kernels.ops.host_tables import (
    HostHead,
    gather_rows,
    head_weight,
    move_back,
    move_to_host,
)

pytestmark = pytest.mark.usefixtures("poisoned")


class TinyCausal(nn.Module):
    """What `move_to_host` asks a causal LM for."""

    def __init__(self, *, tied=False):
        super().__init__()
        self.embedding = nn.Embedding(11, 12)
        self.head = nn.Linear(12, 11, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.requires_grad_(False)

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.head


@pytest.mark.parametrize("width", [1, 12, 97])
def test_rows_have_the_bits_of_the_table(width, dtype, device, generator):
    table = torch.randn(11, width, generator=generator, device=device).to(dtype)
    if device == "cuda":
        table = table.cpu().pin_memory()
    ids = torch.randint(11, (5, 3), generator=generator, device=device).t()
    ids = ids.to(torch.int32) if width == 12 else ids
    rows = gather_rows(ids, table)
    assert rows.device == ids.device
    assert torch.equal(rows.cpu(), table[ids.cpu()])


def _trained(model):
    model.embedding.weight.requires_grad_(True)
    return model


def _subclassed(model):
    class Scaled(nn.Embedding):
        """An embedding that does more."""

    model.embedding.__class__ = Scaled
    return model


def _with_bias(model):
    model.head = nn.Linear(12, 11).requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("make", "reasons"),
    [
        (lambda: _trained(TinyCausal()), ["input embedding is trained", "head is on cpu"]),
        (
            lambda: _trained(TinyCausal(tied=True)),
            ["input embedding is trained", "head is trained"],
        ),
        (
            lambda: _subclassed(TinyCausal(tied=True)),
            ["embedding is a Scaled, not an nn.Embedding", "head is a Scaled, not an nn.Embedding"],
        ),
        (
            lambda: _with_bias(TinyCausal()),
            ["embedding is on cpu, not on a GPU", "head has a bias"],
        ),
        (TinyCausal, ["embedding is on cpu, not on a GPU", "head is on cpu, not on a GPU"]),
    ],
)
def test_what_cannot_move_is_left_with_a_reason(make, reasons):
    model = make()
    kinds = [type(module) for module in model.children()]
    addresses = [table.data_ptr() for table in model.parameters()]
    found = move_to_host(model)
    assert len(found) == len(reasons)
    assert all(part in reason for part, reason in zip(reasons, found, strict=True)), found
    move_back(model)
    assert [type(module) for module in model.children()] == kinds
    assert [table.data_ptr() for table in model.parameters()] == addresses


@pytest.mark.parametrize(
    ("trained", "reasons"),
    [
        (
            "lm_head",
            [
                "input embedding is also the weight of lm_head.original_module",
                "head is a ModulesToSaveWrapper, not an nn.Linear",
            ],
        ),
        (
            "embed_tokens",
            [
                "input embedding is a ModulesToSaveWrapper, not an nn.Embedding",
                "head is also the weight of model.embed_tokens.original_module",
            ],
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Model with:UserWarning")
def test_a_table_of_a_third_module_is_left_where_it_is(trained, reasons):
    # Without its adapter, the model computes with PEFT's original module.
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=11, num_hidden_layers=1, tie_word_embeddings=True)
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[trained])
    causal = get_peft_model(LlamaForCausalLM(config), lora).get_base_model()
    assert move_to_host(causal) == [f"the {reason}" for reason in reasons]


def _as_if_moved(device):
    """Return a model whose head is taken to be on the host of a device."""
    model = TinyCausal()
    model.head.__class__ = HostHead
    model.head._tuneline_device = torch.device(device)
    return model


def test_a_table_on_the_host_stays_there_when_the_model_moves():
    model = _as_if_moved("cpu").to("meta")
    assert model.head.weight.device.type == "cpu" and model.embedding.weight.device.type == "meta"


def test_a_table_on_the_host_is_read_on_the_device_to_which_the_model_moved():
    head = _as_if_moved("cpu").to("meta").head
    assert head_weight(head).device.type == "meta" and head.weight.device.type == "cpu"


def test_a_copy_of_a_model_shares_no_state_of_a_forward():
    model = _as_if_moved("cpu")
    with model.head.expected():
        model.head.begin()
        twin = copy.deepcopy(model).head
    assert isinstance(twin, HostHead) and twin._tuneline_device == torch.device("cpu")
    assert twin._tuneline_copy is None and not twin._tuneline_is_expected
    assert torch.equal(head_weight(twin), model.head.weight)


def test_a_table_on_the_host_is_not_converted_without_a_word():
    with pytest.raises(ValueError, match="stays in torch.float32: to convert the model to .*16"):
        _as_if_moved("cpu").half()


def test_a_copy_of_the_head_is_there_only_where_it_is_expected(generator):
    model = _as_if_moved("cpu")
    head = model.head
    head.begin()
    assert head._tuneline_copy is None
    with pytest.raises(KeyError), head.expected():
        head.begin()
        copy = head._tuneline_copy[0]
        head.begin()
        assert head._tuneline_copy[0] is copy and head_weight(head) is copy
        with head.expected(torch.zeros(1)):
            assert head_weight(head) is copy
        assert head_weight(head) is copy
        raise KeyError
    assert head._tuneline_copy is None
    assert torch.equal(head_weight(head), head.weight) and head._tuneline_copy is None
    assert head_weight(model.embedding) is model.embedding.weight
    hidden = torch.randn(3, 12)
    assert torch.equal(head(hidden), hidden @ head.weight.T)


@pytest.mark.gpu
@pytest.mark.parametrize("tied", [False, True])
def test_there_and_back_changes_no_bit(tied, device, generator):
    model = TinyCausal(tied=tied).to(device)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.randint(11, (5, 3), generator=generator, device=device)
    hidden = torch.randn(5, 12, generator=generator, device=device)
    logits = model.head(hidden)
    assert move_to_host(model) == []
    tables = list(model.parameters())
    assert len(tables) == 2 - tied and all(table.is_pinned() for table in tables)
    assert isinstance(model.embedding, nn.Embedding) and isinstance(model.head, nn.Linear)
    model.to(device)
    assert all(table.is_pinned() for table in tables)
    assert torch.equal(model.embedding(ids), before["embedding.weight"][ids])
    assert torch.equal(model.head(hidden), logits)
    with model.head.expected():
        model.head.begin()
        assert torch.equal(head_weight(model.head), before["head.weight"])
    twin = copy.deepcopy(model)
    assert all(table.is_pinned() for table in twin.parameters())
    assert len(list(twin.parameters())) == len(tables)
    assert torch.equal(twin.embedding(ids), before["embedding.weight"][ids])
    assert torch.equal(twin.head(hidden), logits)
    assert all("is a Host" in reason for reason in move_to_host(model))
    move_back(model)
    assert [type(module) for module in model.children()] == [nn.Embedding, nn.Linear]
    assert list(model.parameters()) == tables
    assert not any(name.startswith("_tuneline") for name in vars(model.head))
    for name, tensor in model.state_dict().items():
        assert tensor.device.type == device and torch.equal(tensor, before[name])
