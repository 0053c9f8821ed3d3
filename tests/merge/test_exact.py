"""Each fault of one merged tensor is found by its name, however little it changes the answers."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tuneline.errors import ProofError
from tuneline.merge.adapter import Adapter
from tuneline.merge.exact import check_tensors
from tuneline.merge.pieces import Piece
from tuneline.models.checkpoint import Checkpoint

UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture
def merged(tiny_model_dir: Path, adapter_dir: Path, tmp_path: Path) -> Path:
    """Base plus adapter in bfloat16."""
    path = tmp_path / "merged"
    shutil.copytree(tiny_model_dir, path)
    adapter = Adapter(adapter_dir)
    tensors = load_file(path / "model.safetensors")
    for module in adapter.modules:
        weight = f"{module}.weight"
        tensors[weight] = adapter.update(module, weight).add_to(tensors[weight])
    (path / "model.safetensors").unlink()
    save(path, {name: tensor.bfloat16() for name, tensor in tensors.items()})
    return path


def save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def check(merged: Path, base: Path, adapter_dir: Path) -> int:
    adapter, checkpoint = Adapter(adapter_dir), Checkpoint(base)

    def pieces(name: str) -> list[Piece]:
        module = name.removesuffix(".weight")
        update = adapter.update(module, name) if module in adapter.modules else None
        return [Piece(checkpoint.read(name), update)]

    return check_tensors(merged, pieces)


def test_a_merged_model_passes(merged: Path, tiny_model_dir: Path, adapter_dir: Path) -> None:
    num_tensors = len(load_file(merged / "model.safetensors"))
    assert check(merged, tiny_model_dir, adapter_dir) == num_tensors == 20


def one_nan(weight: torch.Tensor) -> torch.Tensor:
    weight.view(-1)[7] = float("nan")
    return weight


FAULTS: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "scaled": (UP, lambda weight: weight * 1.02),
    "rows swapped": (UP, lambda weight: weight.roll(1, 0)),
    "one weight": (UP, lambda weight: weight.index_fill(0, torch.tensor(3), 0.0)),
    "a norm": (NORM, lambda weight: weight * 1.02),
    "not finite": (UP, one_nan),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_one_tensor(
    merged: Path, tiny_model_dir: Path, adapter_dir: Path, fault: str
) -> None:
    name, change = FAULTS[fault]
    tensors = load_file(merged / "model.safetensors")
    save(merged, tensors | {name: change(tensors[name].clone()).contiguous()})
    with pytest.raises(ProofError, match=f"the merged tensor {name} is not base plus adapter"):
        check(merged, tiny_model_dir, adapter_dir)


def test_an_adapter_that_is_left_out_of_one_layer(
    merged: Path, tiny_model_dir: Path, adapter_dir: Path
) -> None:
    base = load_file(tiny_model_dir / "model.safetensors")
    tensors = load_file(merged / "model.safetensors")
    save(merged, tensors | {UP: base[UP].bfloat16()})
    with pytest.raises(ProofError, match=rf"{UP} .* of 32768 weights, first"):
        check(merged, tiny_model_dir, adapter_dir)
