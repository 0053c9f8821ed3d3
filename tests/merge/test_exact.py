"""Each fault of one merged tensor is found by its name, however little it changes the answers."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tuneline.errors import ProofError
from tuneline.merge.adapter import Adapter
from tuneline.merge.exact import check_piece
from tuneline.merge.pieces import Piece
from tuneline.models.checkpoint import Checkpoint, Spec
from tuneline.models.sharded_files import write_sharded
from tuneline.record import sha256_of_file

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

    written = Checkpoint(merged)
    for name in written.specs:
        module = name.removesuffix(".weight")
        update = adapter.update(module, name) if module in adapter.modules else None
        check_piece(name, written.read(name), Piece(checkpoint.read(name), update))
    return len(written.specs)


def test_a_merged_model_passes(merged: Path, tiny_model_dir: Path, adapter_dir: Path) -> None:
    num_tensors = len(load_file(merged / "model.safetensors"))
    assert check(merged, tiny_model_dir, adapter_dir) == num_tensors == 20


def one_nan(weight: torch.Tensor) -> torch.Tensor:
    weight.view(-1)[7] = float("nan")
    return weight


def two_units(weight: torch.Tensor) -> torch.Tensor:
    """Return weights that are two units in the last place larger."""
    return (weight.view(torch.int16) + 2).view(torch.bfloat16)


FAULTS: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "scaled": (UP, lambda weight: weight * 1.02),
    "two units in the last place": (UP, two_units),
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


def test_advice_names_the_cause() -> None:
    base = torch.full((2, 4), 7e4)
    for dtype, weight, says in (
        (torch.float16, base, "float16 ends at 65504: set merge.dtype to bfloat16"),
        (torch.bfloat16, one_nan(base.clone()), "numbers that are not finite: lower train.learn"),
        (torch.bfloat16, base * 2, "the sum was computed wrongly: report it"),
    ):
        with pytest.raises(ProofError) as raised:
            check_piece(UP, weight.to(dtype), Piece(base))
        assert says in str(raised.value)


def test_what_was_written_is_what_is_hashed(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}
    specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    written = write_sharded(tmp_path, specs, lambda name: [tensors[name]], max_shard_bytes=24)
    assert written == {path.name: sha256_of_file(path) for path in tmp_path.glob("*.safetensors")}
    assert len(written) == 2
