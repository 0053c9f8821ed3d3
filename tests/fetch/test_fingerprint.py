"""What a cache is told of a base model."""

from pathlib import Path

import pytest

from tuneline.errors import ModelError
from tuneline.fetch import FetchConfig
from tuneline.fetch.fingerprint import fingerprint


def of(source: str | Path) -> str:
    return fingerprint(FetchConfig(), source=str(source))


def test_a_directory_counts_by_its_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    found = {of(tmp_path)}
    (tmp_path / "model.safetensors").write_bytes(b"Weights")
    found.add(of(tmp_path))
    (tmp_path / "sub" / "a.json").write_text("{}")
    found.add(of(tmp_path))
    (tmp_path / "sub" / "a.json").rename(tmp_path / "a.json")
    found.add(of(tmp_path))
    assert len(found) == 4
    assert of(tmp_path) in found


def test_a_gguf_file_and_a_builtin(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    before = of(path)
    path.write_bytes(b"GGUF2")
    assert of(path) != before
    assert of("builtin:smollm2-135m") == "builtin:smollm2-135m"
    with pytest.raises(ModelError):
        of(tmp_path / "absent")
