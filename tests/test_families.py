"""The README's table of model families: each of its rows, with a tiny model of the family."""

from pathlib import Path

import pytest
from family_line import (
    BY_THE_LINE,
    UNPACKED,
    can_be_gptq,
    make_gguf,
    reach,
    run_line,
    table,
    write_dataset,
)
from tiny_families import FAMILIES

README = Path(__file__).parents[1] / "README.md"

KINDS = ("Qwen3.5", "DeepSeek V2", "gpt-oss")
"""One family of each kind that no other test trains: layers with a state, shared and routed
experts, experts that the files store as stacks."""


@pytest.fixture(scope="session")
def dataset_dir(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("families") / "data", smollm2_dir)


@pytest.mark.parametrize(
    "name", [name if name in KINDS else pytest.param(name, marks=pytest.mark.slow)
             for name in FAMILIES],
)  # fmt: skip
def test_the_default_recipe_trains_and_its_merge_is_proven(
    name: str, smollm2_dir: Path, dataset_dir: Path, tmp_path: Path, caplog, request
) -> None:
    family = FAMILIES[name]
    with caplog.at_level("WARNING"):
        line = run_line(family, tmp_path, tokenizer_dir=smollm2_dir, dataset_dir=dataset_dir)
    losses = [point.loss for point in line.training.history if point.loss is not None]
    assert losses[-1] < losses[0]
    assert ("train.packing is off" in caplog.text) == (name in UNPACKED)
    assert line.adapted == reach(family)
    assert line.training.base_quantization == "nf4"
    assert line.proof.mean_kl < 1e-5
    assert can_be_gptq(line.base_dir) is not family.has_experts
    if request.node.get_closest_marker("slow") and name in BY_THE_LINE:
        assert make_gguf(line, tmp_path, dataset_dir) < 1e-2


def test_the_readme_has_the_table() -> None:
    text = README.read_text(encoding="utf-8")
    if "| family | default recipe |" in text:
        assert table() in text, "run python tests/support/family_line.py, and paste its table"
