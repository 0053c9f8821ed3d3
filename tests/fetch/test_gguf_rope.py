"""A .gguf base keeps the scaling of its rotary embeddings, or is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tuneline.errors import ModelError
from tuneline.fetch import FetchConfig
from tuneline.fetch.gguf.rope import read_scaling
from tuneline.fetch.run import run
from tuneline.quantize.gguf import converter

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


class Named:
    """A tensor or a field of a GGUF file, with the attributes that are read."""

    def __init__(self, value: Any, name: str = "") -> None:
        self.name, self.data = name, value

    def contents(self) -> Any:
        return self.data


class Config:
    rope_parameters = {"rope_theta": 5e5}
    max_position_embeddings = 4096


def scaling_of(tensors: dict[str, list[float]], **metadata: Any) -> dict[str, Any]:
    class Reader:
        pass

    reader: Any = Reader()
    reader.tensors = [Named(value, name) for name, value in tensors.items()]
    reader.fields = {
        f"llama.rope.{name.replace('__', '.')}": Named(value) for name, value in metadata.items()
    }
    return read_scaling(reader, Path("m.gguf"), Config)


@pytest.mark.parametrize(
    "scaling",
    [
        LLAMA3,
        *(
            pytest.param(other, marks=pytest.mark.slow)
            for other in (LLAMA3 | {"factor": 32.0}, LINEAR, YARN)
        ),
    ],
)
def test_what_llama_cpps_converter_writes_is_read_back(
    tiny_model_dir: Path, tmp_path: Path, scaling: dict[str, Any]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    settings = json.loads((base / "config.json").read_text())
    settings["rope_parameters"] = {**scaling, "rope_theta": 5e5}
    (base / "config.json").write_text(json.dumps(settings))
    converter.convert(base, tmp_path / "m.gguf")
    out = tmp_path / "out"
    run(FetchConfig(), source=str(tmp_path / "m.gguf"), base_model_dir=str(out))
    read = json.loads((out / "config.json").read_text())["rope_parameters"]
    assert read == {**scaling, "rope_theta": 5e5}


@pytest.mark.slow
def test_a_file_without_a_weight_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    """transformers would fill the gap with random values, and fetch would write them."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    weights = load_file(base / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    converter.convert(base, tmp_path / "m.gguf")
    with pytest.raises(ModelError, match=r"m.gguf lacks weights .* model.layers.1.mlp.up_proj"):
        run(FetchConfig(), source=str(tmp_path / "m.gguf"), base_model_dir=str(tmp_path / "out"))


def test_other_files() -> None:
    assert scaling_of({}) == {}
    assert scaling_of({"rope_freqs.weight": [1.0] * 32}) == {}
    assert scaling_of({}, scaling__type="none", scaling__factor=1.0) == {}
    assert scaling_of({}, scale_linear=2.0) == {"rope_type": "linear", "factor": 2.0}
    yarn = scaling_of({}, scaling__type="yarn", scaling__factor=2.0, scaling__attn_factor=0.5)
    assert yarn["attention_factor"] == pytest.approx(0.5 * 1.0693147)
    assert yarn["original_max_position_embeddings"] == 4096


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"rope_factors_long.weight": [1.0]}, {}, "with longrope, which cannot be read"),
        ({}, {"scaling__type": "su"}, "with su, which cannot be read"),
        (
            {},
            {"scaling__type": "yarn", "scaling__yarn_log_multiplier": 0.1},
            r"with yarn \(yarn_log_multiplier\)",
        ),
        ({"rope_freqs.weight": [1.0, 3.0, 2.0]}, {}, "divides its rotary frequencies by 1 to 3"),
    ],
)
def test_what_cannot_be_said_is_refused(
    tensors: dict[str, list[float]], metadata: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        scaling_of(tensors, **metadata)
