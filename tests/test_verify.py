"""What `tuneline verify` finds in artifacts that were changed on purpose."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tuneline.artifacts import (
    DatasetManifest,
    MergeProof,
    ModelOrigin,
    QuantizedModel,
    TrainingSummary,
)
from tuneline.errors import DataError
from tuneline.merge import MergeConfig
from tuneline.record import hash_files
from tuneline.runtime.environment import describe_environment
from tuneline.train import TrainConfig
from tuneline.verify import verify


def new_training() -> TrainingSummary:
    return TrainingSummary(
        method="sft",
        num_steps=10,
        num_tokens=900,
        final_loss=0.5,
        num_trainable_parameters=10,
        num_parameters=1000,
        base_quantization="nf4",
        compute_dtype="float32",
        device="cpu",
        tokens_per_second=100.0,
        peak_memory_bytes=1,
        history=[],
        base_sha256="1" * 64,
        dataset_sha256="2" * 64,
    )


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
    ).write(merged, MergeConfig())
    (export / "model.gguf").write_bytes(b"gguf")
    QuantizedModel(
        format="q8_0",
        kind="gguf",
        file="model.gguf",
        num_bytes=4,
        bits_per_weight=8.5,
        prompt="p",
        generated="g",
    ).write(export, parents=[MergeProof.read(merged)])
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
    assert found["merged"][1].startswith("model.safetensors was changed: SHA-256 d9298a10d1b0, rec")
    assert found["q8_0"] == ["extra.txt is not in the record"]


def test_an_export_of_another_model(run_dir: Path) -> None:
    """It says which settings and versions of the two are not the same."""
    record = MergeProof.read(run_dir / "merged")
    (run_dir / "merged" / "model.safetensors").write_bytes(b"trained again")
    record.write(run_dir / "merged", MergeConfig(dtype="float16"))
    found = differences(run_dir)
    assert found["merged"] == []
    (sentence,) = found["q8_0"]
    assert sentence.startswith(
        f"made from the merged {record.content_sha256()[:12]}, but the one here is "
    )
    assert sentence.endswith(": dtype bfloat16 there, float16 here")


def test_everything_that_an_artifact_goes_back_to_is_held_against_what_is_here(
    run_dir: Path, new_dataset: Callable[..., DatasetManifest]
) -> None:
    """Data, base revision, seed, package, image and kernels: each difference has its words."""
    base, data, adapter = (run_dir / name for name in ("base", "data", "adapter"))
    for path in (base, data, adapter):
        path.mkdir()
    origin = ModelOrigin(
        source="org/base",
        revision="a" * 40,
        architecture="LlamaForCausalLM",
        num_parameters=1,
        num_bytes=1,
        sha256="1" * 64,
    )
    origin.write(base)
    dataset = new_dataset(sha256="2" * 64)
    dataset.write(data)
    summary = new_training()
    summary.write(adapter, TrainConfig(seed=1), parents=[origin, dataset])
    merged = MergeProof.read(run_dir / "merged")
    merged.write(run_dir / "merged", parents=[TrainingSummary.read(adapter)])
    assert differences(run_dir)["merged"] == []

    origin.model_copy(update={"sha256": "3" * 64, "revision": "b" * 40}).write(base)
    new_dataset(sha256="4" * 64).write(data)
    (adapter / "adapter_model.safetensors").write_bytes(b"other")
    summary.write(adapter, TrainConfig(seed=2))
    path = adapter / "training.json"
    record = json.loads(path.read_text())
    record["environment"] |= {"torch": "1.0", "kernels": "0" * 12, "image": "train@sha256:abc"}
    path.write_text(json.dumps(record))
    of_base, of_data, of_adapter = differences(run_dir)["merged"]
    assert of_base.startswith(
        "made from the base_model 111111111111, but the one here is 333333333333: "
    )
    assert of_base.endswith(f"revision {'a' * 40} there, {'b' * 40} here")
    assert of_data == "made from the dataset 222222222222, but the one here is 444444444444"
    assert "; seed 1 there, 2 here; " in of_adapter
    assert "; torch 2" in of_adapter and " there, 1.0 here" in of_adapter
    assert f"kernels {describe_environment()['kernels']} there, 000000000000 here" in of_adapter


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
