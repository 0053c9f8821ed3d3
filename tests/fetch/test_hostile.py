"""Model directories and files that were made to harm."""

import json
import os
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from tuneline.errors import ModelError
from tuneline.fetch import FetchConfig
from tuneline.fetch.early import check
from tuneline.fetch.gguf.header import check_header
from tuneline.fetch.model_card import licence_of
from tuneline.fetch.run import run
from tuneline.fetch.trial import try_tokenizer
from tuneline.fetch.weight_headers import read_header
from tuneline.models import weight_files
from tuneline.models.tokenizer.files import TEMPLATES_DIR


def string(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def header(num_tensors: int, num_entries: int, *entries: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_entries) + b"".join(entries)


def entry(kind: int, value: bytes, key: bytes = b"key") -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def number(key: str, value: int) -> bytes:
    return entry(10, struct.pack("<Q", value), key.encode())


def texts(key: str, *values: bytes) -> bytes:
    return entry(
        9, struct.pack("<IQ", 8, len(values)) + b"".join(map(string, values)), key.encode()
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"GGML" + b"\0" * 40, "does not begin with the letters GGUF"),
        (header(2**60, 0), "states 1152921504606846976 tensors and 0 keys, more than its 24 bytes"),
        (header(0, 2**60), "1152921504606846976 keys"),
        (header(0, 1, entry(8, string(b"x", 2**60))), "a value states 1152921504606846976 bytes"),
        (
            header(0, 1, entry(9, struct.pack("<IQ", 4, 2**60))),
            "bytes, more than the file has left",
        ),
        (header(0, 1, entry(9, struct.pack("<IQ", 8, 2**60))), "an array states 11529215046068"),
        (header(0, 1, entry(99, b"\0" * 8)), "the unknown type 99"),
        (header(0, 1, string(b"key", 2**63)), "more than the file has left"),
        (header(0, 1)[:10], "not a whole GGUF file"),
    ],
)
def test_counts_that_a_file_cannot_hold(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content + (b"" if len(content) < 30 else b"\0" * 16))
    started = time.monotonic()
    with pytest.raises(ModelError, match=says):
        check_header(path)
    assert time.monotonic() - started < 1


LLAMA = (entry(8, string(b"llama"), b"general.architecture"), number("llama.context_length", 8))
VOCABULARY = (
    entry(8, string(b"gpt2"), b"tokenizer.ggml.model"),
    texts("tokenizer.ggml.tokens", b"a", b"b"),
    # Neither the pair nor the token that it makes exists, at which the tokenizers library panics.
    texts("tokenizer.ggml.merges", b"a b"),
)
TENSOR = string(b"x") + struct.pack("<IQIQ", 1, 8, 0, 0)


@pytest.mark.parametrize(
    ("entries", "tensor", "says"),
    [
        ([*LLAMA, number("llama.block_count", 2**31)], TENSOR, "block_count in the header is 2147"),
        (
            [*LLAMA, number("llama.embedding_length", 2**60)],
            TENSOR,
            "files hold 1 tensors, of which the longest side is 8: take weights and the header",
        ),
        ([*LLAMA, *VOCABULARY], TENSOR, "causal language model \\(PanicException: "),
        (
            [*LLAMA],
            TENSOR[:-8] + struct.pack("<Q", 2**60),
            "causal language model \\(ValueError: c",
        ),
        ([*LLAMA], string(b"x", 2**60), "causal language model \\(IndexError: "),
        (
            [*LLAMA, number("llama.embedding_length", 8), number("llama.attention.head_count", 0)],
            TENSOR,
            "causal language model \\(ZeroDivisionError: ",
        ),
    ],
    ids=["layers", "width", "merges", "offset", "name", "heads"],
)
def test_values_at_which_the_readers_of_gguf_fail(
    entries: list[bytes], tensor: bytes, says: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(header(1, len(entries), *entries, tensor) + b"\0" * 64)
    with pytest.raises(ModelError, match=says):
        run(FetchConfig(), source=str(path), base_model_dir=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_ordinary_header_passes(tmp_path: Path) -> None:
    import gguf
    import numpy

    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.license", "mit")
    writer.add_token_list(["a", "bb", ""])
    writer.add_token_scores([0.0, 1.0, 2.0])
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_tensor("x", numpy.zeros((2, 3), dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = check_header(path)
    assert found == {
        "general.architecture": "llama",
        "general.license": "mit",
        "tokenizer.ggml.add_bos_token": True,
    }


@pytest.mark.parametrize("content", [b"[" * 100_000, b"{" * 10, b'{"a":' * 50_000])
def test_headers_of_safetensors_that_no_model_has(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(content)) + content)
    with pytest.raises(ModelError, match="is not a safetensors file, or it was cut off"):
        read_header(path, "mine")
    path.write_bytes(struct.pack("<Q", 2**62) + content)
    with pytest.raises(ModelError, match="is not a safetensors file, or it was cut off"):
        read_header(path, "mine")


def test_a_header_of_a_size_that_no_model_has_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = json.dumps({"__metadata__": {"a": "b" * 500}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(content)) + content)
    assert read_header(path, "mine") == {}
    monkeypatch.setattr(weight_files, "MAX_HEADER_BYTES", 499)
    with pytest.raises(ModelError, match="is not a safetensors file, or it was cut off"):
        read_header(path, "mine")


def test_a_link_out_of_a_model_is_not_followed(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    (tmp_path / "secret").write_text("the key")
    (model / "LICENSE").symlink_to(tmp_path / "secret")
    said = rf"LICENSE is a link that leads out of {model}, to {tmp_path / 'secret'}\."
    with pytest.raises(ModelError, match=said):
        check(FetchConfig(), source=str(model))
    with pytest.raises(ModelError, match=said):
        run(FetchConfig(), source=str(model), base_model_dir=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("store", ["model", "store"])
def test_a_model_may_be_named_by_a_link_and_its_weights_may_be_links(
    store: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    weights = tmp_path / store / "weights"
    weights.parent.mkdir(exist_ok=True)
    (model / "model.safetensors").rename(weights)
    (model / "model.safetensors").symlink_to(weights)
    (tmp_path / "named").symlink_to(model)
    origin = run(
        FetchConfig(), source=str(tmp_path / "named"), base_model_dir=str(tmp_path / "out")
    )
    assert origin.num_bytes == weights.stat().st_size


def test_a_directory_may_hold_links_into_the_hubs_cache(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    blobs, model = tmp_path / "hub" / "models--a--b" / "blobs", tmp_path / "model"
    shutil.copytree(tiny_model_dir, blobs)
    model.mkdir()
    for file in blobs.iterdir():
        (model / file.name).symlink_to(file)
    origin = run(FetchConfig(), source=str(model), base_model_dir=str(tmp_path / "out"))
    assert origin.num_parameters > 0


def test_a_snapshot_of_the_hubs_cache_is_made_of_links(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / ("a" * 40)
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in tiny_model_dir.iterdir():
        (blobs / file.name).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    origin = run(FetchConfig(), source=str(snapshot), base_model_dir=str(tmp_path / "out"))
    assert origin.num_parameters > 0
    # Whoever names a directory "snapshots" gets no further than to such blobs.
    (tmp_path / "models--a--b" / "id_rsa").write_text("the key")
    (snapshot / "LICENSE").symlink_to("../../id_rsa")
    with pytest.raises(ModelError, match=r"LICENSE is a link that leads out of \S+, to \S+"):
        run(FetchConfig(), source=str(snapshot), base_model_dir=str(tmp_path / "second"))


@pytest.mark.parametrize("kind", ["directory", "pipe", "device"])
def test_a_config_that_is_no_file_is_not_opened(model: Path, kind: str) -> None:
    config = model / "config.json"
    config.unlink()
    if kind == "directory":
        config.mkdir()
    elif kind == "pipe":
        os.mkfifo(config)
    else:
        config.symlink_to("/dev/zero")
    assert "has no config.json" in refusal(model)


def test_a_card_of_laughs_is_no_licence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    laughs = "license: &a0 [x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
    )
    (tmp_path / "README.md").write_text(f"---\n{laughs}---\n# Ha")
    assert licence_of(tmp_path) is None
    assert "has a broken header" in caplog.text


@pytest.fixture
def model(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def refusal(model: Path) -> str:
    with pytest.raises(ModelError) as raised:
        run(FetchConfig(), source=str(model), base_model_dir=str(model.parent / "out"))
    assert not (model.parent / "out").exists()
    return str(raised.value)


def test_links_out_of_the_directory_of_templates(model: Path, tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "key.jinja").write_text("the key")
    (model / "additional_chat_templates").symlink_to(tmp_path / "secrets")
    assert f"key.jinja is a link that leads out of {model}, to {tmp_path}" in refusal(model)


@pytest.mark.parametrize(
    ("weight_map", "shown"),
    [
        ({"a": "../other/model.safetensors"}, "'../other/model.safetensors'"),
        ({"a": "/etc/passwd"}, "'/etc/passwd'"),
        ({"a": "a\nb"}, r"'a\nb'"),
        ({"a": 7}, "7"),
        (["model.safetensors"], "['model.safetensors']"),
        (None, "None"),
    ],
)
def test_an_index_that_names_other_files(weight_map: object, shown: str, model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    index = json.dumps({"weight_map": weight_map})
    (model / "model.safetensors.index.json").write_text(index)
    found = refusal(model)
    assert found.endswith(
        f"must name a file of the model's directory for each weight, but names {shown}"
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_hidden_layers": 10**9}, "is 1000000000, but the model's files hold 20 tensors"),
        ({"head_dim": 10**12}, "head_dim in config.json is 1000000000000, but"),
        ({"num_local_experts": 10**9}, "num_local_experts in config.json is 1000000000, but"),
        ({"num_hidden_layers": "2"}, "is '2', but must be a whole number"),
        ({"num_hidden_layers": -2}, "is -2, but must be a whole number"),
        ({"num_attention_heads": 0}, "does not support the model"),
        ({"rope_parameters": {"rope_type": "nonsense"}}, "does not support the model"),
        ({"architectures": "LlamaForCausalLM"}, "must be a list of names"),
        ({"intermediate_size": 10**18}, "does not support the model"),
    ],
)
def test_a_config_of_absurd_numbers(changes: dict[str, Any], says: str, model: Path) -> None:
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    started = time.monotonic()
    assert says in refusal(model)
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    "name",
    ["generation_config.json", "tokenizer_config.json", "tokenizer.json", "added_tokens.json"],
)
def test_json_that_is_nested_without_end(name: str, model: Path) -> None:
    (model / name).write_text('{"a":' * 100_000)
    assert f"{name} is not JSON" in refusal(model)
    (model / name).write_text("[1, 2]")
    assert f"{name} contains a list, but must be a mapping" in refusal(model)


@pytest.mark.parametrize(
    "tensor",
    [
        {"shape": [2]},
        {"data_offsets": [0], "shape": [2]},
        {"data_offsets": "ab", "shape": 3},
        [],
        7,
    ],
)
def test_a_header_whose_tensors_are_none(tensor: object, tmp_path: Path) -> None:
    content = json.dumps({"a": tensor}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(content)) + content)
    with pytest.raises(ModelError, match=r"the header of model.safetensors does not describe tens"):
        read_header(tmp_path / "model.safetensors", "mine")


LOOP = "{% for i in range(99999) %}"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (LOOP * 3 + "{% endfor %}" * 3, "took more than 2 s of computing for a few short texts"),
        ("{{ 'a' * 10000000 }}", "more than 1,048,576 characters"),
        ("{# " + "x" * (1 << 20) + " #}", "more than 1,048,576 characters"),
        ("{{ 'a' * 100000000000 }}", "ended the process that tried it"),
    ],
)
def test_a_chat_template_without_bounds(template: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(ModelError) as raised:
        try_tokenizer(tmp_path, called="mine", max_seconds=2)
    assert says in str(raised.value)
    assert str(raised.value).startswith("the chat template chat_template.jinja of mine ")


def test_every_place_of_a_template_is_tried(tmp_path: Path) -> None:
    entry = {"name": "tool_use", "template": "{{ 'a' * 10000000 }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": [entry]}))
    with pytest.raises(ModelError, match="template tool_use in tokenizer_config.json of mine has"):
        try_tokenizer(tmp_path, called="mine")


def test_templates_that_only_refuse_are_left_to_prepare(tmp_path: Path) -> None:
    """In one directory, because each trial starts a process: an error would end it."""
    templates = {
        "range": "{{ range(10**9) }}",
        "broken": "{% broken",
        "index": "{{ messages[9].content }}",
        "division": "{{ 1 / 0 }}",
        "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    }
    directory = tmp_path / TEMPLATES_DIR
    directory.mkdir()
    for name, template in templates.items():
        (directory / f"{name}.jinja").write_text(template)
    try_tokenizer(tmp_path, called="mine")
    # The last of them, so all were tried.
    (directory / "too_long.jinja").write_text("{{ 'a' * 10000000 }}")
    with pytest.raises(ModelError, match=r"the chat template too_long\.jinja of mine has"):
        try_tokenizer(tmp_path, called="mine")


def test_a_tokenizer_that_multiplies_its_text(model: Path) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 3000} for _ in "123"
        ],
    }
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    found = refusal(model)
    assert found.startswith("the tokenizer (tokenizer.json) of ")
    assert "ended the process that tried it on a few short texts" in found


def byte_level_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the quick brown fox"] * 3, trainer)
    return tokenizer


def sentencepiece_decoder() -> Any:
    """Return the decoder that transformers 5.17 gives a GPT-2 vocabulary from a GGUF file."""
    from tokenizers import decoders

    return decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )


def test_a_tokenizer_that_decodes_to_another_text(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    try_tokenizer(tmp_path, called="good")
    tokenizer.decoder = sentencepiece_decoder()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelError, match="bad has a tokenizer that decodes .* 'the\u0120quick"):
        try_tokenizer(tmp_path, called="bad")


def test_a_tokenizer_that_ignores_case_and_lacks_words_is_none_of_these(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer: Any = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[UNK]"], show_progress=False
    )
    tokenizer.train_from_iterator(["THE quick Brown fox jumps over 12 lazy dogs"] * 3, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    try_tokenizer(tmp_path, called="BERT's")


def test_a_tokenizer_that_changes_when_it_is_written(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    from tuneline.fetch.gguf.convert import check_reloaded

    read = PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer())
    read.save_pretrained(tmp_path)
    check_reloaded(read, tmp_path, Path("model.gguf"))
    written = byte_level_tokenizer()
    written.decoder = sentencepiece_decoder()
    written.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelError, match=r"tokenizer of model\.gguf changes when it is written"):
        check_reloaded(read, tmp_path, Path("model.gguf"))
