"""Oddities of model repositories as they are found on the Hub and in clones of them."""

import json
import shutil
import struct
from pathlib import Path

import pytest

from tuneline.errors import ModelError
from tuneline.fetch import directory
from tuneline.fetch.gguf.header import check_header
from tuneline.fetch.model_card import licence_of, made_from
from tuneline.fetch.weight_headers import read_header, read_headers

LFS_POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    "size 12345\n"
)
"""What Git leaves in a clone without Git LFS; the text is that of the specification of Git LFS."""


def refusal(model: Path) -> str:
    with pytest.raises(ModelError) as raised:
        directory.check(model, source="mine", trusted=False)
    return str(raised.value)


def of_header(num_bytes: int, **tensors: tuple[str, list[int], list[int]]) -> bytes:
    """Return a safetensors file with a header of (dtype, shape, offsets) by name."""
    header = {
        name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        for name, (dtype, shape, offsets) in tensors.items()
    }
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(num_bytes)


def of_bytes(*names: str) -> bytes:
    """Return a safetensors file with tensors of one byte, one after another."""
    entries = {name: ("U8", [1], [at, at + 1]) for at, name in enumerate(names)}
    return of_header(len(names), **entries)


@pytest.mark.parametrize(
    ("text", "licence", "base"),
    [
        ("---\nlicense: mit\n---\n# Card", "mit", None),
        ("\ufeff---\nlicense: mit\n---\n", "mit", None),
        ("---\r\nlicense: mit\r\nbase_model:\r\n- a/b\r\n- c\r\n---\r\n", "mit", "a/b and c"),
        ("\n---\nlicense: mit\n---", "mit", None),
        ("--- \nlicense: mit\n---\t\ntext", "mit", None),
        # Dashes within a line of the header do not end it.
        ("---\nmodel_name: a---b\nlicense: mit\n---\n", "mit", None),
        ("---\ntags: [two words, 'a: b']\nlicense: [mit, bsd 3]\n---\n", "mit and bsd 3", None),
        ("# A card\n\n---\nlicense: mit\n---\n", None, None),
        ("---\nlicense: mit\n", None, None),
        ("", None, None),
    ],
)
def test_headers_of_cards(text: str, licence: str | None, base: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(text.encode())
    assert (licence_of(tmp_path), made_from(tmp_path)) == (licence, base)


def test_a_clone_without_git_lfs(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    (model / "pytorch_model.bin").write_text(LFS_POINTER)  # Not needed, and not asked for.
    directory.check(model, source="mine", trusted=False)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        content = (model / name).read_bytes()
        (model / name).write_text(LFS_POINTER)
        assert refusal(model) == (
            f"mine: {name} is a pointer of Git LFS, not the file itself: run git lfs pull in the "
            "clone"
        )
        (model / name).write_bytes(content)
    (model / "model.safetensors").unlink()
    index = {"weight_map": {"a": "x-1.safetensors", "b": "x-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "x-1.safetensors").write_bytes(of_bytes("a"))
    (model / "x-2.safetensors").write_text(LFS_POINTER)
    assert "x-2.safetensors is a pointer of Git LFS" in refusal(model)
    (tmp_path / "model.gguf").write_text(LFS_POINTER)
    with pytest.raises(ModelError, match=r"model\.gguf is a pointer of Git LFS"):
        check_header(tmp_path / "model.gguf")


def test_a_snapshot_whose_blobs_are_gone(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    for name in ("tokenizer.json", "model.safetensors"):
        (model / name).unlink()
        (model / name).symlink_to("../../blobs/4d7a21")
        assert f"mine: {name} is a link to ../../blobs/4d7a21, which does not ex" in refusal(model)
        (model / name).unlink()
        shutil.copy(tiny_model_dir / name, model / name)


def test_a_weight_in_two_shards(tmp_path: Path) -> None:
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    files[0].write_bytes(of_bytes("first", "head"))
    files[1].write_bytes(of_bytes("last"))
    assert list(read_headers(files, "mine")) == ["first", "head", "last"]
    files[1].write_bytes(of_bytes("last", "head"))
    says = r"mine has the weight head twice, in a\.safetensors and in b\.safetensors"
    with pytest.raises(ModelError, match=says):
        read_headers(files, "mine")


@pytest.mark.parametrize(
    "content",
    [
        of_header(6, a=("U8", [4], [0, 4]), b=("U8", [4], [2, 6])),  # two in the same bytes
        of_header(6, a=("U8", [2], [0, 2]), b=("U8", [2], [4, 6])),  # bytes between two
        of_header(4, a=("F32", [4], [0, 4])),  # fewer bytes than the shape has
        of_bytes("a") + b"more",  # bytes after the last one
    ],
)
def test_a_header_that_does_not_fit_its_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"mine: model\.safetensors is damaged .*it again"):
        read_header(path, "mine")
