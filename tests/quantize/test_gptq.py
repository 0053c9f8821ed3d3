import json
from pathlib import Path

import pytest

from tuneline.artifacts import QuantizedModel
from tuneline.errors import DataError, ModelError
from tuneline.quantize import QuantizeConfig, run
from tuneline.quantize.gptq import choose_group_size, linear_widths


@pytest.mark.parametrize(
    ("widths", "wanted", "taken"),
    [({4096, 14336}, 128, 128), ({576, 1536}, 128, 64), ({96}, 128, 32), ({80}, 128, 16)],
)
def test_the_largest_group_that_divides(widths: set[int], wanted: int, taken: int) -> None:
    size, note = choose_group_size(widths, wanted)
    assert size == taken
    assert all(width % size == 0 for width in widths)
    assert (note is None) == (taken == wanted)
    assert note is None or note.startswith(f"group size {taken}, not {wanted}")


def test_no_group_divides() -> None:
    with pytest.raises(ModelError, match=r"no group size up to 128 divides .*\[100\]"):
        choose_group_size({100}, 128)


def test_widths_are_inputs_of_linear_layers(merged_dir: Path) -> None:
    assert linear_widths(merged_dir) == {128, 256}


def test_no_training_rows(merged_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="calibrates on training rows"):
        run(
            QuantizeConfig(),
            format="gptq-4bit",
            merged_dir=str(merged_dir),
            dataset_dir=str(tmp_path),
            quantized_dir=str(tmp_path / "out"),
        )


def test_round_trip(merged_dir: Path, dataset_dir: Path, tmp_path: Path) -> None:
    target = tmp_path / "gptq"
    record = run(
        QuantizeConfig(num_calibration_rows=8, group_size=64, num_check_tokens=4),
        format="gptq-8bit",  # at 4 bits a random model's argmax is another token
        merged_dir=str(merged_dir),
        dataset_dir=str(dataset_dir),
        quantized_dir=str(target),
    )
    settings = json.loads((target / "config.json").read_text())["quantization_config"]
    assert (settings["bits"], settings["group_size"]) == (8, 64)
    for path in target.glob("*.json"):
        assert str(tmp_path.parent) not in path.read_text()
        assert '"offload_to_disk_path"' not in path.read_text()
    assert record.group_size == 64
    assert record.generated == record.reference
    assert QuantizedModel.read(target).reference
