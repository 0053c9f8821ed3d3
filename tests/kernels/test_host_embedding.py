"""The embedding on the host: rows, the way there and back, and what is left where it is."""

import pytest
import torch
from torch import nn

from tuneline.kernels.ops.host_embedding import gather_rows, move_back, move_to_host

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


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: TinyCausal(tied=True), "is tied to the head"),
        (lambda: _trained(TinyCausal()), "trained"),
        (lambda: _subclassed(TinyCausal()), "a Scaled, not an nn.Embedding"),
        (TinyCausal, "on cpu, not on a GPU"),
    ],
)
def test_what_cannot_move_is_left_with_a_reason(make, reason):
    model = make()
    kind, table = type(model.embedding), model.embedding.weight
    address, before = table.data_ptr(), table.clone()
    why = move_to_host(model)
    assert reason in why
    move_back(model)
    assert type(model.embedding) is kind and model.embedding.weight is table
    assert table.data_ptr() == address and torch.equal(table, before)


@pytest.mark.gpu
def test_there_and_back_changes_no_bit(device, generator):
    model = TinyCausal().to(device)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.randint(11, (5, 3), generator=generator, device=device)
    assert move_to_host(model) is None
    weight = model.embedding.weight
    assert weight.is_pinned() and isinstance(model.embedding, nn.Embedding)
    assert torch.equal(model.embedding(ids), before["embedding.weight"][ids])
    assert "not an nn.Embedding" in move_to_host(model)
    move_back(model)
    assert type(model.embedding) is nn.Embedding and model.embedding.weight is weight
    assert not hasattr(model.embedding, "_tuneline_device")
    for name, tensor in model.state_dict().items():
        assert tensor.device.type == device and torch.equal(tensor, before[name])
