import pytest
import torch

from tuneline.errors import RecipeError
from tuneline.train import TrainConfig
from tuneline.train.model.precision import choose_dtype


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
    ],
)
def test_auto_on_a_cpu_follows_its_instructions(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert choose_dtype(TrainConfig(), "cpu") == expected


def test_a_named_type_is_taken():
    assert choose_dtype(TrainConfig(dtype="bfloat16"), "cpu") == torch.bfloat16


def test_float16_on_a_cpu_is_refused():
    with pytest.raises(RecipeError, match="float16 needs a GPU"):
        choose_dtype(TrainConfig(dtype="float16"), "cpu")
