from pathlib import Path

import pytest

from tuneline.errors import ModelError
from tuneline.quantize.checkpoint.layers import (
    choose_group_size,
    linear_layers,
    linear_widths,
)


@pytest.mark.parametrize(
    ("widths", "wanted", "taken"),
    [({4096, 14336}, 128, 128), ({576, 1536}, 128, 64), ({96}, 128, 32), ({80}, 128, 16)],
)
def test_the_largest_group_that_divides(widths: set[int], wanted: int, taken: int) -> None:
    named = {width: f"layer_{width}" for width in widths}
    size, note = choose_group_size(named, wanted, kind="gptq")
    assert size == taken
    assert all(width % size == 0 for width in widths)
    assert (note is None) == (taken == wanted)
    assert note is None or note.startswith(f"group size {taken}, not {wanted}")


def test_no_group_divides() -> None:
    with pytest.raises(ModelError, match=r"from 16 to 128 divides .* \(q_proj is 100 wide\)"):
        choose_group_size({100: "q_proj", 256: "down_proj"}, 128, kind="gptq")


def test_widths_are_inputs_of_linear_layers(merged_dir: Path) -> None:
    widths = linear_widths(merged_dir)
    assert widths == {128: "model.layers.0.self_attn.q_proj", 256: "model.layers.0.mlp.down_proj"}


def test_the_largest_group_of_a_kind() -> None:
    size, note = choose_group_size({1024: "q_proj"}, 512, kind="awq", largest=128)
    assert size == 128
    assert note == "group size 128, not 512: the kernels for AWQ support groups of up to 128"
    with pytest.raises(ModelError, match=r"AWQ cannot .* from 16 to 128 .*set quantize.awq to"):
        choose_group_size({1000: "q_proj"}, 512, kind="awq", largest=128)


def test_embeddings_and_head_are_no_layers(merged_dir: Path) -> None:
    layers = linear_layers(merged_dir)
    assert len(layers) == 14 and "lm_head" not in layers
    assert layers["model.layers.1.mlp.down_proj"] == (256, 128)
