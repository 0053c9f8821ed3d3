"""What `tuneline verify` finds in artifacts that were changed on purpose."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tuneline.artifacts import MergeProof, QuantizedModel, hash_files
from tuneline.environment import describe_environment
from tuneline.errors import DataError
from tuneline.verify import verify


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    merged, export = tmp_path / "run" / "merged", tmp_path / "run" / "q8_0"
    for path in (merged, export):
        path.mkdir(parents=True)
    (merged / "model.safetensors").write_bytes(b"weights")
    (merged / "sub").mkdir()
    (merged / "sub" / "config.json").write_text("{}")
    MergeProof(
        base="dequantized",
        dtype="bfloat16",
        num_bytes=7,
        num_shards=1,
        num_merged_modules=7,
        num_prompts=8,
        max_logit_difference=0.1,
        mean_kl=3e-4,
        top1_agreement=0.99,
        max_mean_kl=0.01,
    ).write(merged)
    (export / "model.gguf").write_bytes(b"gguf")
    QuantizedModel(
        format="q8_0",
        kind="gguf",
        file="model.gguf",
        num_bytes=4,
        bits_per_weight=8.5,
        prompt="p",
        generated="g",
        made_from={"merged": MergeProof.read(merged).content_sha256()},
    ).write(export)
    return tmp_path / "run"


def differences(run_dir: Path) -> dict[str, list[str]]:
    return {found.path.name: found.differences for found in verify(run_dir)}


def test_what_was_not_touched_is_whole(run_dir: Path) -> None:
    assert differences(run_dir) == {"merged": [], "q8_0": []}
    assert [found.num_files for found in verify(run_dir)] == [2, 1]
    assert all(found.versions == [] for found in verify(run_dir))


def test_each_change_is_named(run_dir: Path) -> None:
    (run_dir / "merged" / "model.safetensors").write_bytes(b"other")
    (run_dir / "merged" / "sub" / "config.json").unlink()
    (run_dir / "q8_0" / "extra.txt").touch()
    found = differences(run_dir)
    assert found["merged"][0] == "sub/config.json is missing"
    assert found["merged"][1].startswith("model.safetensors was changed: sha256 d9298a10d1b0, rec")
    assert found["q8_0"] == ["extra.txt is not in the record"]


def test_an_export_of_another_model(run_dir: Path) -> None:
    record = MergeProof.read(run_dir / "merged")
    (run_dir / "merged" / "model.safetensors").write_bytes(b"trained again")
    record.write(run_dir / "merged")
    found = differences(run_dir)
    assert found["merged"] == []
    assert found["q8_0"][0].startswith(f"made from the merged {record.content_sha256()[:12]}, and")


def test_other_versions_are_told_and_are_no_difference(run_dir: Path) -> None:
    path = run_dir / "q8_0" / "quantized.json"
    torch = describe_environment()["torch"]
    path.write_text(path.read_text().replace(f'"torch": "{torch}"', '"torch": "1.0"'))
    (found,) = verify(run_dir / "q8_0")
    assert found.differences == [] and found.versions == [f"torch 1.0 there, {torch} here"]


def test_an_image_names_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "image" not in describe_environment()
    monkeypatch.setenv("TUNELINE_IMAGE", "tuneline/train@sha256:abc")
    assert describe_environment()["image"] == "tuneline/train@sha256:abc"


def test_nothing_to_check(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no artifact and no published repository"):
        verify(tmp_path)


def test_hashes_are_those_of_sha256sum(run_dir: Path) -> None:
    import hashlib

    found = hash_files(run_dir / "merged", leave_out={"merge.json"})
    assert found["model.safetensors"] == hashlib.sha256(b"weights").hexdigest()


def test_from_the_command_line(run_dir: Path) -> None:
    tool = Path(sys.executable).with_name("tuneline")
    command = [str(tool), "verify", str(run_dir)]
    whole = subprocess.run(command, capture_output=True, text=True)
    assert (whole.returncode, whole.stdout) == (0, "ok: merged (2 files)\nok: q8_0 (1 files)\n")
    shutil.copy(run_dir / "q8_0" / "model.gguf", run_dir / "merged" / "model.safetensors")
    changed = subprocess.run(command, capture_output=True, text=True)
    assert changed.returncode == 1
    assert "differs: merged (2 files)\n  model.safetensors was changed" in changed.stdout
