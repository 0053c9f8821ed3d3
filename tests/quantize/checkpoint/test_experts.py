"""A mixture of experts is refused before the work, not after it with random experts."""

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig, MixtralConfig, Qwen3MoeConfig

from tuneline.errors import ModelError
from tuneline.kinds import ExportKind
from tuneline.quantize.checkpoint.experts import check_experts

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2}


@pytest.mark.parametrize("kind", ["gptq", "awq", "fp8"])
@pytest.mark.parametrize("config_class", [MixtralConfig, Qwen3MoeConfig])
def test_experts_that_transformers_joins(
    config_class: type, kind: ExportKind, tmp_path: Path
) -> None:
    config_class(**SIZES).save_pretrained(tmp_path)
    words = rf"mixture of experts \(.*experts.*{kind.upper()} has.*set quantize.{kind} to"
    with pytest.raises(ModelError, match=words):
        check_experts(tmp_path, kind)


def test_a_dense_model(tmp_path: Path) -> None:
    LlamaConfig(**SIZES).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
    check_experts(tmp_path, "gptq")
