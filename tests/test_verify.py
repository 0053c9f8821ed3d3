"""What `tuneline verify` finds in artifacts that were changed on purpose."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from small_records import new_export, new_merge, new_origin, new_training

from tuneline.artifacts import (
    DatasetManifest,
    Decision,
    MergeProof,
    ModelOrigin,
    Scores,
    TaskScore,
    TrainingSummary,
)
from tuneline.errors import DataError, ProofError, WorldError
from tuneline.html.page import render_page
from tuneline.merge import MergeConfig
from tuneline.publish.previous import read_bundle
from tuneline.record import Record, hash_files, sha256_of_file
from tuneline.runtime.environment import describe_environment
from tuneline.seals import broken_seal, seal_page, sealed_json
from tuneline.train import TrainConfig
from tuneline.verify import files_without_hash, verify


@pytest.fixture
def run_dir(tmp_path: Path, new_dataset: Callable[..., DatasetManifest]) -> Path:
    merged, export = tmp_path / "run" / "merged", tmp_path / "run" / "q8_0"
    lineage = (new_origin(revision="a" * 40), new_dataset(sha256="2" * 64), new_training())
    for path in (merged, export):
        path.mkdir(parents=True)
    (merged / "model.safetensors").write_bytes(b"weights")
    (merged / "sub").mkdir()
    (merged / "sub" / "config.json").write_text("{}")
    new_merge().write(merged, MergeConfig(), parents=lineage)
    (export / "model.gguf").write_bytes(b"gguf")
    new_export().write(export, parents=[MergeProof.read(merged)])
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


def test_an_export_of_another_model(
    run_dir: Path, new_dataset: Callable[..., DatasetManifest]
) -> None:
    """It says which settings and versions of the two are not the same."""
    record = MergeProof.read(run_dir / "merged")
    (run_dir / "merged" / "model.safetensors").write_bytes(b"trained again")
    parents = (new_origin(revision="a" * 40), new_dataset(sha256="2" * 64), new_training())
    record.write(run_dir / "merged", MergeConfig(dtype="float16"), parents=parents)
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
    origin = new_origin(revision="a" * 40)
    origin.write(base)
    dataset = new_dataset(sha256="2" * 64)
    dataset.write(data)
    parents = [ModelOrigin.read(base), DatasetManifest.read(data)]
    summary = new_training()
    summary.write(adapter, TrainConfig(seed=1), parents=parents)
    merged = MergeProof.read(run_dir / "merged")
    merged.write(run_dir / "merged", parents=[*parents, TrainingSummary.read(adapter)])
    assert differences(run_dir)["merged"] == []

    origin.model_copy(update={"sha256": "3" * 64, "revision": "b" * 40}).write(base)
    new_dataset(sha256="4" * 64).write(data)
    (adapter / "adapter_model.safetensors").write_bytes(b"other")
    summary.write(adapter, TrainConfig(seed=2), parents=parents)
    path = adapter / "training.json"
    record = json.loads(path.read_text())
    record["environment"] |= {"torch": "1.0", "kernels": "0" * 12, "image": "train@sha256:abc"}
    path.write_text(sealed_json(record))  # as another environment would have written it
    of_base, of_data, of_adapter = differences(run_dir)["merged"]
    assert of_base.startswith(
        "made from the base_model 111111111111, but the one here is 333333333333: "
    )
    assert of_base.endswith(f"revision {'a' * 40} there, {'b' * 40} here")
    assert of_data == "made from the dataset 222222222222, but the one here is 444444444444"
    assert "; seed 1 there, 2 here; " in of_adapter
    assert "; torch 2" in of_adapter and " there, 1.0 here" in of_adapter
    assert f"kernels {describe_environment()['kernels']} there, 000000000000 here" in of_adapter


def small_records(new_dataset: Callable[..., DatasetManifest]) -> list[Record]:
    score = TaskScore(metric="acc", higher_is_better=True, value=0.5, num_samples=4)
    return [
        new_dataset(sha256="2" * 64),
        Scores(model="base", tasks={"heldout_choice": score}, harness="lm-eval"),
        Decision(verdict="hold", reason="no gain \u00e9", comparisons=[]),
    ]


def test_one_altered_byte_of_a_record_is_found_wherever_it_is(
    tmp_path: Path, new_dataset: Callable[..., DatasetManifest]
) -> None:
    for record in small_records(new_dataset):
        record.write(tmp_path)
        path = tmp_path / record.filename
        whole = path.read_bytes()
        unaltered = verify(tmp_path)[0].differences
        assert broken_seal(whole.decode()) == ""
        for index in range(len(whole)):
            altered = whole[:index] + bytes([whole[index] ^ 1]) + whole[index + 1 :]
            assert broken_seal(altered.decode(errors="replace")), (record.filename, index)
            if index % 97 == 0:
                path.write_bytes(altered)
                assert verify(tmp_path)[0].differences != unaltered, (record.filename, index)
        path.unlink()


def test_a_changed_verdict_is_found_by_every_reader(tmp_path: Path) -> None:
    Decision(verdict="hold", reason="no gain", comparisons=[]).write(tmp_path)
    path = tmp_path / "decision.json"
    path.write_text(path.read_text().replace('"hold"', '"promote"'))
    with pytest.raises(ProofError, match=r"decision\.json was changed after it was written"):
        Decision.read(tmp_path)
    (found,) = verify(tmp_path)
    assert found.differences[0].startswith("decision.json was changed after it was written")


def test_a_record_without_its_hash_and_without_lineage(run_dir: Path) -> None:
    path = run_dir / "q8_0" / "quantized.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "record_sha256": "", "made_from": {}}, indent=2))
    assert differences(run_dir)["q8_0"] == [
        "quantized.json has no hash of its own fields, which every record of this version has",
        "quantized.json does not name the merged that it was made from",
    ]


def test_an_ancestor_is_known_by_its_record_too(run_dir: Path) -> None:
    """The weights are the same, and the bound that they were held to is another."""
    path = run_dir / "merged" / "merge.json"
    path.write_text(sealed_json({**json.loads(path.read_text()), "max_mean_kl": 5.0}))
    found = differences(run_dir)
    assert found["merged"] == []
    assert found["q8_0"][0].startswith("made from the merged with the record ")


def test_the_copy_of_a_record_is_checked(run_dir: Path) -> None:
    record = MergeProof.read(run_dir / "merged")
    record.copy_to(run_dir / "record", directory=run_dir / "merged")
    assert differences(run_dir) == {"merged": [], "q8_0": []}
    (run_dir / "record").write_text((run_dir / "record").read_text().replace("0.99", "0.98"))
    (sentence,) = differences(run_dir)["record"]
    assert sentence.startswith("was changed after it was written")


def test_inputs_that_were_made_from_different_models_are_refused(
    tmp_path: Path, new_dataset: Callable[..., DatasetManifest]
) -> None:
    """As base scores of another base model: one ancestor does not overwrite the other."""
    score = TaskScore(metric="acc", higher_is_better=True, value=0.5, num_samples=4)
    sides = []
    for label, digest in (("base", "1" * 64), ("tuned", "9" * 64)):
        directory = tmp_path / label
        directory.mkdir()
        scores = Scores(model=label, tasks={"heldout_choice": score}, harness="lm-eval")
        scores.write(directory, parents=[new_origin(sha256=digest)])
        sides.append(Scores.read(directory))
    decision = Decision(verdict="promote", reason="gain", comparisons=[])
    words = "two different artifacts called base_model: 1{12} and 9{12} .by way of the tuned_scores"
    with pytest.raises(WorldError, match=words):
        decision.write(tmp_path, parents=sides)


def test_other_versions_are_told_and_are_no_difference(run_dir: Path) -> None:
    path = run_dir / "q8_0" / "quantized.json"
    torch = describe_environment()["torch"]
    record = json.loads(path.read_text())
    record["environment"]["torch"] = "1.0"
    path.write_text(sealed_json(record))
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
    assert (whole.returncode, whole.stdout) == (0, "ok: merged (2 files)\nok: q8_0 (1 file)\n")
    shutil.copy(run_dir / "q8_0" / "model.gguf", run_dir / "merged" / "model.safetensors")
    changed = subprocess.run(command, capture_output=True, text=True)
    assert changed.returncode == 1
    assert "differs: merged (2 files)\n  model.safetensors was changed" in changed.stdout


def test_one_changed_byte_of_a_page_is_found(run_dir: Path) -> None:
    """Wherever the byte is, in the hash too."""
    whole = render_page("Demo", ["<p>text</p>"]).encode()
    path = run_dir / "curves"
    path.write_bytes(whole)
    assert "curves" not in differences(run_dir)
    places = {*range(0, len(whole), 499), *range(len(whole) - 120, len(whole))}
    for place in sorted(places):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        (found,) = differences(run_dir)["curves"]
        assert "changed" in found or "does not end with the hash" in found


def test_a_page_that_was_cut_is_found(run_dir: Path) -> None:
    whole = render_page("Demo", ["<p>text</p>"])
    (run_dir / "page").write_text(whole[: whole.index("</main>")])
    (found,) = differences(run_dir)["page"]
    assert found.startswith("does not end with the hash of its text")


def test_changed_markdown_and_figures_are_found(run_dir: Path) -> None:
    text = seal_page("| task | verdict |\n|---|---|\n| a | hold |\n")
    (run_dir / "summary").write_text(text.replace("hold", "promote"))
    (run_dir / "metrics").write_text(sealed_json({"loss": 0.5}).replace("0.5", "0.4"))
    found = differences(run_dir)
    assert found["summary"][0].startswith("was changed after it was written")
    assert found["metrics"][0].startswith("was changed after it was written")
    (run_dir / "summary").write_text(text)
    (run_dir / "metrics").write_text(sealed_json({"loss": 0.5}))
    assert differences(run_dir) == {"merged": [], "q8_0": []}


def test_changed_questions_are_found(
    run_dir: Path, new_dataset: Callable[..., DatasetManifest]
) -> None:
    questions = run_dir / "questions"
    questions.write_text('{"text": "1 + 1"}\n')
    (run_dir / "dataset").mkdir()
    new_dataset(sha256="2" * 64, benchmarks_sha256=sha256_of_file(questions)).write(
        run_dir / "dataset"
    )
    assert "questions" not in differences(run_dir)
    questions.write_text('{"text": "1 + 2"}\n')
    assert differences(run_dir)["questions"] == ["differs from what prepare searched for"]


def test_files_without_a_hash_are_named(run_dir: Path) -> None:
    """Those of a run by what they are; any other file by its path."""
    assert files_without_hash(run_dir) == {}
    for step in ("train", "merge"):
        (run_dir / step).mkdir()
        (run_dir / step / "executor_output.json").write_text("{}")
    for name in ("events.jsonl", "events-1.jsonl", "run.log", "train/notes.txt"):
        (run_dir / name).write_text("")
    (run_dir / "page").write_text(render_page("Demo", ["<p>text</p>"]))
    found = files_without_hash(run_dir)
    assert list(found) == [
        "2 x events.jsonl", "2 x executor_output.json", "run.log", "train/notes.txt",
    ]  # fmt: skip
    assert found["train/notes.txt"] == "belongs to no artifact"
    tool = Path(sys.executable).with_name("tuneline")
    shown = subprocess.run([str(tool), "verify", str(run_dir)], capture_output=True, text=True)
    assert shown.returncode == 0
    assert "  run.log: what the steps wrote\n" in shown.stdout


@pytest.mark.parametrize(
    "text",
    [
        *(
            "[" * 200_000,
            '{"a": ' * 100_000,
            "[]",
            "null",
            '{"files": ["a"]}',
            '{"files": {"a": 5}}',
        ),
        *('{"files": {"a": "b"}, "trained_with": "x"}', '{"files": {}, "base_sha256": 5}'),
    ],
)
def test_a_bundle_of_others_that_is_none(tmp_path: Path, text: str) -> None:
    """A repository that was downloaded can hold anything under this name."""
    (tmp_path / "tuneline.json").write_text(text)
    (found,) = verify(tmp_path)
    assert len(found.differences) == 1 and "cannot be read: tuneline.json" in found.differences[0]
    assert read_bundle(text) == {}
    assert read_bundle('{"files": {"a": "b"}, "kind": "gguf"}')["kind"] == "gguf"
    (tmp_path / "tuneline.json").rename(tmp_path / "dataset.json")
    (found,) = verify(tmp_path)
    assert "cannot be read: dataset.json" in found.differences[0]
