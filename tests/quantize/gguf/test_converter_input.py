"""Files that the converter wants beside tokenizer.json, as models saved by transformers 5 lack."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import LlamaTokenizer

from tuneline.models.sampling import FILE, Preset, set_sampling
from tuneline.quantize.gguf import converter, converter_input
from tuneline.quantize.gguf.llama_model import LlamaFile
from tuneline.quantize.proof import probes


@pytest.fixture
def pieces_dir(tmp_path: Path, train_pieces: Callable[..., Any]) -> Path:
    """A directory with tokenizer.model, and the tokenizer.json that transformers makes of it."""
    path = tmp_path / "model"
    path.mkdir()
    pieces = train_pieces(path)
    vocabulary = {pieces.id_to_piece(index): index for index in range(pieces.vocab_size())}
    # As transformers makes merges of pieces, which are in the order of their scores.
    merges = [
        (piece[:cut], piece[cut:])
        for piece in vocabulary
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    LlamaTokenizer(vocab=vocabulary, merges=merges).save_pretrained(path)
    (path / "config.json").write_text(json.dumps({"model_type": "phi3"}))
    return path


def test_pieces_are_those_that_the_tokenizer_was_made_from(pieces_dir: Path) -> None:
    file = pieces_dir / "tokenizer.model"
    original = sentencepiece.SentencePieceProcessor(str(file))
    file.rename(pieces_dir.parent / "original.model")
    with converter_input.complete(pieces_dir) as directory:
        ours = sentencepiece.SentencePieceProcessor(str(directory / "tokenizer.model"))
        assert (directory / "tokenizer.json").read_bytes() == (
            pieces_dir / "tokenizer.json"
        ).read_bytes()
    assert ours.vocab_size() == original.vocab_size()
    for index in range(ours.vocab_size()):
        assert ours.id_to_piece(index) == original.id_to_piece(index)
        assert ours.is_byte(index) == original.is_byte(index)
        assert ours.is_unknown(index) == original.is_unknown(index)
        assert ours.is_control(index) == original.is_control(index)
    texts = [text for text in probes.texts() if "<" not in text]
    assert len(texts) > 20
    for text in texts:
        assert ours.encode(text) == original.encode(text), text
    assert not directory.exists() and not file.exists()


def test_a_complete_directory_is_used_as_it_is(pieces_dir: Path, tiny_model_dir: Path) -> None:
    for path in (pieces_dir, tiny_model_dir):
        with converter_input.complete(path) as directory:
            assert directory == path


@pytest.mark.parametrize("family", ["Phi-3", "Gemma 2"])
def test_llama_cpp_splits_texts_alike_without_the_pieces(
    family: str, pieces_dir: Path, tmp_path: Path
) -> None:
    """Both of these families' converters stop without tokenizer.model."""
    import torch
    from tiny_families import FAMILIES, new_model

    tokenizer = LlamaTokenizer.from_pretrained(pieces_dir)
    model = new_model(FAMILIES[family], vocab_size=len(tokenizer)).to(torch.bfloat16)
    model.save_pretrained(pieces_dir)
    splits = []
    for number in range(2):
        file = tmp_path / f"{number}.gguf"
        converter.convert(pieces_dir, file)
        with LlamaFile(file, num_context=64) as loaded:
            splits.append([loaded.tokenise(text) for text in probes.texts()])
        (pieces_dir / "tokenizer.model").unlink(missing_ok=True)
    assert splits[0] == splits[1]


def test_phi_4_is_known_by_its_tokens(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The converter knows it by the class's name, which transformers 5 replaces."""
    import torch
    from tiny_families import FAMILIES, TOKENIZER_FILES, new_model

    path = tmp_path / "model"
    path.mkdir()
    for name in TOKENIZER_FILES:
        if (tiny_model_dir / name).is_file():
            shutil.copy(tiny_model_dir / name, path)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "TokenizersBackend"
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    vocab_size = json.loads((tiny_model_dir / "config.json").read_text())["vocab_size"]
    new_model(FAMILIES["Phi-3"], vocab_size=vocab_size).to(torch.bfloat16).save_pretrained(path)
    converter.convert(path, tmp_path / "model.gguf")
    with LlamaFile(tmp_path / "model.gguf", num_context=64) as loaded:
        assert len(loaded.tokenise("How many Mi are 3Gi?")) > 3
    assert json.loads((path / "tokenizer_config.json").read_text()) == settings


@pytest.mark.parametrize(("preset", "is_added"), [("greedy", False), ("balanced", True)])
def test_llama_cpp_samples_as_transformers(
    merged_dir: Path, tmp_path: Path, preset: Preset, is_added: bool
) -> None:
    model_dir = tmp_path / "merged"
    shutil.copytree(merged_dir, model_dir, ignore=shutil.ignore_patterns("*.safetensors"))
    set_sampling(model_dir, preset)
    own = json.loads((model_dir / FILE).read_text())
    with converter_input.complete(model_dir) as directory:
        given = json.loads((directory / FILE).read_text())
    assert own.items() <= given.items()
    added = {"min_p": 0.0, "penalty_last_n": 8192}
    assert (added.items() <= given.items()) == is_added == (given != own)
    order = ["penalties", "temperature", "top_k", "top_p", "min_p"]
    assert given.get("sequence", "").split(";") == (order if is_added else [""])
