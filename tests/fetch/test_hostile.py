"""Model directories and files that were made to harm."""

import struct
import time
from pathlib import Path

import pytest

from tuneline.errors import ModelError
from tuneline.fetch import FetchConfig
from tuneline.fetch.gguf_header import check_header
from tuneline.fetch.model_card import licence_of
from tuneline.fetch.run import run
from tuneline.fetch.weight_headers import read_header


def string(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def header(num_tensors: int, num_entries: int, *entries: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_entries) + b"".join(entries)


def entry(kind: int, value: bytes) -> bytes:
    return string(b"key") + struct.pack("<I", kind) + value


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
    check_header(path)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"{" * 10, b'{"a":' * 50_000])
def test_headers_of_safetensors_that_no_model_has(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(content)) + content)
    with pytest.raises(ModelError, match="is not a safetensors file, or it was cut off"):
        read_header(path, "mine")
    path.write_bytes(struct.pack("<Q", 2**62) + content)
    with pytest.raises(ModelError, match="is not a safetensors file, or it was cut off"):
        read_header(path, "mine")


def test_a_link_out_of_a_model_is_not_followed(tiny_model_dir: Path, tmp_path: Path) -> None:
    import shutil

    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    (tmp_path / "secret").write_text("the key")
    (model / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match="LICENSE is a link that leads out of the model's direct"):
        run(FetchConfig(), source=str(model), base_model_dir=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


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


def test_a_card_of_laughs_is_no_licence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    laughs = "license: &a0 [x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
    )
    (tmp_path / "README.md").write_text(f"---\n{laughs}---\n# Ha")
    assert licence_of(tmp_path) is None
    assert "has a broken header" in caplog.text
