"""What a base model was published with does not decide how the tuned model samples."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from tuneline.merge import MergeConfig
from tuneline.models.sampling import Sampling, is_greedy, set_sampling, with_sampling

QWEN = {
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
    "repetition_penalty": 1.05,
    "eos_token_id": [151645, 151643],
}


def test_as_gated_is_greedy() -> None:
    ours = with_sampling(QWEN, "greedy")
    assert is_greedy(ours) and not is_greedy(QWEN)
    assert ours == {
        "eos_token_id": [151645, 151643],
        "do_sample": True,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 1,
        "repetition_penalty": 1.0,
    }


def test_a_preset_and_numbers(tmp_path: Path) -> None:
    ours = with_sampling(QWEN, "creative")
    assert (ours["temperature"], ours["top_p"], ours["repetition_penalty"]) == (0.8, 0.95, 1.15)
    numbers = MergeConfig.parse('{"sampling": {"temperature": 0.3, "top_k": 5}}').sampling
    assert numbers == Sampling(temperature=0.3, top_k=5)
    (tmp_path / "config.json").write_text('{"eos_token_id": 2, "bos_token_id": 1}')
    set_sampling(tmp_path, numbers)
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert (written["eos_token_id"], written["bos_token_id"]) == (2, 1)
    assert (written["do_sample"], written["temperature"], written["top_k"]) == (True, 0.3, 5)


def test_numbers_have_bounds() -> None:
    for wrong in ({"temperature": 0}, {"top_p": 1.5}, {"top_k": 0}):
        with pytest.raises(ValidationError):
            Sampling(**wrong)


def test_every_reader_reads_greedy(tmp_path: Path) -> None:
    from transformers import GenerationConfig

    for settings in ({}, QWEN):
        (tmp_path / "generation_config.json").write_text(
            json.dumps(with_sampling(settings, "greedy"))
        )
        # A file that transformers calls invalid could not be saved again by its users.
        GenerationConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
