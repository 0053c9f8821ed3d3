"""A server of a GGUF file gives the model the prompts of training, and stops where it does."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from transformers import AutoTokenizer

from tuneline.artifacts import MergeProof
from tuneline.errors import ProofError
from tuneline.models.sampling import with_sampling
from tuneline.quantize.formats import FORMATS
from tuneline.quantize.gguf import converter
from tuneline.quantize.gguf import proof as gguf_proof
from tuneline.quantize.gguf.llama_model import LlamaFile
from tuneline.quantize.proof.reference import Reference, measure
from tuneline.quantize.run import convert

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def reference(merged_dir: Path, dataset_dir: Path) -> Reference:
    return measure(merged_dir, dataset_dir=dataset_dir, num_rows=4, num_tokens=4)


def test_a_file_that_ends_every_prompt(
    merged_dir: Path, reference: Reference, tmp_path: Path
) -> None:
    """A base that is published with add_eos_token, as its own training wanted it."""
    settings = json.loads((merged_dir / "tokenizer_config.json").read_text())
    broken = copy_with(merged_dir, tmp_path / "broken", settings | {"add_eos_token": True})
    converter.convert(broken, tmp_path / "model.gguf")
    with pytest.raises(
        ProofError, match=r"a prompt of \d+ tokens has \d+: .* ends with .*'<\|im_end\|>'\]"
    ):
        gguf_proof.prove(
            tmp_path / "model.gguf",
            format="f16",
            reference=reference,
            bound=FORMATS["f16"].bound,
        )


def test_a_file_that_begins_every_prompt_with_bos(
    merged_dir: Path, reference: Reference, tmp_path: Path
) -> None:
    converter.convert(merged_dir, tmp_path / "with.gguf", adds_bos=True)
    without = dataclasses.replace(reference, tokenizer=copy.deepcopy(reference.tokenizer))
    without.tokenizer.chat_template = CHATML.replace("<|im_start|>", ">")
    without = dataclasses.replace(without, prompts=[])
    with LlamaFile(tmp_path / "with.gguf", num_context=64) as loaded:
        with pytest.raises(ProofError, match=r"it begins with \['<\|im_start\|>', '>'\]"):
            gguf_proof.check_prompts(loaded, without)
    # A template that writes the token itself may be asked to leave it to the program.
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    settings = json.loads((merged_dir / "tokenizer_config.json").read_text())
    own = copy_with(merged_dir, tmp_path / "own", settings | {"chat_template": template})
    (own / "chat_template.jinja").write_text(template)
    ours = measure(own, dataset_dir=None, num_rows=1, num_tokens=1)
    assert ours.adds_bos() is None
    for adds_bos in (True, False):
        converter.convert(own, tmp_path / "own.gguf", adds_bos=adds_bos)
        with LlamaFile(tmp_path / "own.gguf", num_context=64) as loaded:
            gguf_proof.check_prompts(loaded, dataclasses.replace(ours, prompts=[]))


def test_an_end_of_turn_that_llama_cpp_does_not_know_by_name(
    merged_dir: Path, tmp_path: Path
) -> None:
    """Found with <issue_closed>, which SmolLM2 has as a special token and llama.cpp does not."""
    template = CHATML.replace("<|im_end|>", "<issue_closed>")
    settings = json.loads((merged_dir / "tokenizer_config.json").read_text())
    own = copy_with(merged_dir, tmp_path / "own", settings | {"chat_template": template})
    (own / "chat_template.jinja").write_text(template)
    tokenizer = AutoTokenizer.from_pretrained(own)
    end = tokenizer.convert_tokens_to_ids("<issue_closed>")
    settings = with_sampling({"eos_token_id": [2, end]}, "greedy")
    (own / "generation_config.json").write_text(json.dumps(settings))
    MergeProof.read(merged_dir).write(own)
    record = convert(merged_dir=str(own), gguf_dir=str(tmp_path / "gguf"))
    assert record.notes == []
    with LlamaFile(tmp_path / "gguf" / record.file, num_context=16) as loaded:
        assert loaded.is_stop(end) and loaded.is_stop(2) and not loaded.is_stop(100)
    fields = GGUFReader(tmp_path / "gguf" / record.file).fields
    assert fields["tokenizer.ggml.eot_token_id"].contents() == end
    # llama.cpp takes its defaults from here.
    assert fields["general.sampling.top_k"].contents() == 1


def copy_with(merged_dir: Path, target: Path, settings: dict[str, Any]) -> Path:
    """Copy a merged model, with other settings of its tokenizer."""
    shutil.copytree(merged_dir, target, ignore=shutil.ignore_patterns("merge.json"))
    (target / "tokenizer_config.json").write_text(json.dumps(settings))
    return target
