"""Publishing to a directory and, with the real client, to a Hub on localhost."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import hub_server
import pytest
from killed import killed_in
from publish_cases import REPOS, TOKEN, publish, to_hub, write_again

from tuneline.artifacts import (
    DatasetManifest,
    Decision,
    MergeProof,
    ModelOrigin,
    Published,
    QuantizedModel,
    TrainingSummary,
)
from tuneline.errors import StorageError
from tuneline.publish.directory import write_tree
from tuneline.publish.staging import StagedRepo
from tuneline.publish.targets.on_disk import scratch_in
from tuneline.record import files_below


def change_merged(run_dir: Path, content: bytes) -> None:
    """Let the merged model and all that goes back to it be another, as a second run makes it."""
    merged = run_dir / "merged"
    (merged / "model.safetensors").write_bytes(content)
    write_again(run_dir)


def test_one_private_commit_a_repository(run_dir: Path, hub) -> None:
    done = to_hub(run_dir, hub, "first")
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stderr + done.stdout
    record = Published.read(run_dir / "first")
    assert {repo.repo: repo.kind for repo in record.repos} == REPOS
    assert set(hub.repos) == set(REPOS)
    for repo in record.repos:
        kept = hub.repos[repo.repo]
        assert kept["private"] is True
        assert len(kept["commits"]) == 2, "one commit after the initial one"
        assert repo.commit == kept["commits"][-1]
        assert kept["tags"] == {"v1": repo.commit} and repo.tag == "v1"
    assert record.metadata()["gptq-4bit_tag"] == "v1"
    assert record.metadata()["merged_revision"] == hub.repos["me/mine"]["commits"][-1]
    assert record.metadata()["gguf"] == f"{hub.url}/me/mine-gguf"
    for repo, file, source in (
        ("me/mine", "model.safetensors", "merged/model.safetensors"),
        ("me/mine-gguf", "mine-q8_0.gguf", "q8_0/model.gguf"),
        ("me/mine-lora", "adapter_model.safetensors", "adapter/adapter_model.safetensors"),
    ):
        assert hub.content(repo, file) == (run_dir / source).read_bytes()
    again = to_hub(run_dir, hub, "second")
    assert again.returncode == 0, again.stderr
    assert all(len(kept["commits"]) == 2 for kept in hub.repos.values())
    change_merged(run_dir, b"another")
    assert to_hub(run_dir, hub, "third").returncode == 0
    assert {name: len(kept["commits"]) for name, kept in hub.repos.items()} == {
        **dict.fromkeys(REPOS, 2),
        "me/mine": 3,
    }
    assert list(hub.repos["me/mine"]["tags"]) == ["v1", "v2"]
    assert {repo.repo: repo.tag for repo in Published.read(run_dir / "third").repos} == {
        **dict.fromkeys(REPOS, "v1"),
        "me/mine": "v2",
    }


def test_through_xet(run_dir: Path, hub, tmp_path: Path) -> None:
    """What a machine with hf_xet sends: chunks to a storage that keeps each of them once."""
    hub.xet_dir = tmp_path / "storage"
    weights = run_dir / "merged" / "model.safetensors"
    change_merged(run_dir, os.urandom(3_000_000))

    def push(out: str) -> int:
        """Publish, and return how many bytes the storage grew by."""
        before = stored()
        done = to_hub(run_dir, hub, out, HF_HUB_DISABLE_XET="0", HF_HOME=str(tmp_path / "home"))
        assert done.returncode == 0, done.stderr
        return stored() - before

    def stored() -> int:
        return sum(path.stat().st_size for path in hub.xet_dir.rglob("*") if path.is_file())

    # The answer to the first commit is lost, and the client asks again.
    hub.faults = [("POST /api/models/me/mine/commit", "lost", 1)]
    assert push("first") > 3_000_000
    assert hub.requests.count("POST /api/models/me/mine/commit/main") == 2 and hub.blobs == {}
    assert not any("/lfs/" in line or line.startswith("PUT") for line in hub.requests)
    assert {name: len(kept["commits"]) for name, kept in hub.repos.items()} == dict.fromkeys(
        REPOS, 2
    )
    kind, oid = hub.repos["me/mine"]["files"]["model.safetensors"]
    assert (kind, oid) == ("lfs", hashlib.sha256(weights.read_bytes()).hexdigest())
    assert push("second") < 100_000
    assert all(len(kept["commits"]) == 2 for kept in hub.repos.values())
    # Of a file that grew only the new end is stored.
    change_merged(run_dir, weights.read_bytes() + os.urandom(1000))
    assert 1000 < push("third") < 1_000_000
    assert len(hub.repos["me/mine"]["commits"]) == 3


def test_the_directory_is_the_tree_that_would_be_pushed(run_dir: Path, hub, tmp_path: Path) -> None:
    assert publish(run_dir, f"dir:{tmp_path}/out", "local").returncode == 0
    assert to_hub(run_dir, hub, "remote").returncode == 0
    for repo in REPOS:
        folder = tmp_path / "out" / repo.split("/")[1]
        here = {name: path.read_bytes() for name, path in files_below(folder).items()}
        there = {name: hub.content(repo, name) for name in hub.repos[repo]["files"]}
        # Only the names of the repositories, the target and the storage to serve from differ, the
        # base model of exports, which has an ID on the Hub only, and hashes of these.
        assert named_alike(here) == named_alike(there)


def test_a_model_names_the_run_that_published_it(run_dir: Path, tmp_path: Path) -> None:
    target = f"dir:{tmp_path}/out"
    for number in (1, 2):
        run_id = f"4698857b-92d3-407e-8e3b-21123395a9f{number}"
        assert publish(run_dir, target, f"out-{number}", run_id=run_id).returncode == 0
        record = Published.read(run_dir / f"out-{number}")
        assert record.run_id == run_id
        for repo in REPOS:
            folder = tmp_path / "out" / repo.split("/")[1]
            marker = json.loads((folder / "tuneline.json").read_text())
            # The second run changed nothing, so the first one stays named.
            assert marker["run_id"] == "4698857b-92d3-407e-8e3b-21123395a9f1"
            assert marker["recipe_sha256"] == record.recipe_sha256
            said = f"- published by: run `{marker['run_id']}`, recipe `{marker['recipe']}`, SHA-256"
            assert f"{said} `{record.recipe_sha256[:16]}`" in (folder / "README.md").read_text()


def named_alike(files: dict[str, bytes]) -> dict[str, Any]:
    """Return the files of a repository without what depends on the place that it is in."""
    base = b"base_model: me/mine\nbase_model_relation: quantized\n"
    card = re.sub(rb"publish_to: .*", b"publish_to", files["README.md"].replace(base, b""))
    card = re.sub(rb"(recipe `mine`, SHA-256) `[0-9a-f]{16}`", rb"\1", card)
    marker = json.loads(files["tuneline.json"])
    for name in ("recipe_sha256", "record_sha256"):
        assert len(marker.pop(name)) == 64
    assert len(marker["card"].pop("sha256")) == 64
    files = {name: text for name, text in files.items() if not name.startswith("serving/")}
    for name in [name for name in marker["files"] if name.startswith("serving/")]:
        assert len(marker["files"].pop(name)) == 64
    matter = marker["card"]["front_matter"]
    if matter.get("base_model") == "me/mine":
        assert matter.pop("base_model_relation") == "quantized"
        matter.pop("base_model")
    return {**files, "README.md": card.replace(b"me/mine", b"mine"), "tuneline.json": marker}


def test_a_format_that_was_exported_twice_is_refused(run_dir: Path, tmp_path: Path) -> None:
    """The second would be written through a link into the first one's artifact."""
    shutil.copytree(run_dir / "gptq-4bit", run_dir / "again")
    again = QuantizedModel.read(run_dir / "again").model_copy(update={"notes": ["another"]})
    again.write(run_dir / "again", parents=[MergeProof.read(run_dir / "merged")])
    done = publish(run_dir, f"dir:{tmp_path}/out", "out", exports=("q8_0", "gptq-4bit", "again"))
    assert "gptq-4bit was exported 2 times, but each format can be published" in sentence(done, 2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arrived", "missing"),
    [(("q8_0",), "gptq-4bit"), (("gptq-4bit",), "q8_0"), ((), "q8_0, gptq-4bit")],
)
def test_fewer_exports_than_the_recipe_asks_for_are_refused_by_name(
    run_dir: Path, hub, arrived: tuple[str, ...], missing: str
) -> None:
    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}
    done = publish(run_dir, "me/mine", "out", exports=arrived, **environment)
    words = f"asks for 2 exports (q8_0, gptq-4bit), but this step did not get {missing}, so"
    assert words in sentence(done, 1)
    assert hub.repos == {} and not (run_dir / "out").exists()


def test_a_run_with_fewer_formats_than_its_recipe_publishes_those(
    run_dir: Path, tmp_path: Path
) -> None:
    section = '{"gguf": ["q8_0"], "gptq": []}'
    done = publish(run_dir, f"dir:{tmp_path}/out", "out", exports=("q8_0",), quantize=section)
    assert done.returncode == 0, done.stderr
    kinds = {repo.kind for repo in Published.read(run_dir / "out").repos}
    assert kinds == {"adapter", "merged", "gguf"}


def test_the_records_of_base_model_and_dataset_suffice(run_dir: Path, tmp_path: Path) -> None:
    assert publish(run_dir, f"dir:{tmp_path}/alone", "whole").returncode == 0
    (tmp_path / "alone").rename(tmp_path / "whole")
    for name, record in (("base", ModelOrigin), ("dataset", DatasetManifest)):
        record.read(run_dir / name).copy_to(tmp_path / name, directory=run_dir / name)
        shutil.rmtree(run_dir / name)
        shutil.copyfile(tmp_path / name, run_dir / name)
    assert publish(run_dir, f"dir:{tmp_path}/alone", "alone").returncode == 0
    for path in (tmp_path / "whole").rglob("*"):
        if path.is_file():
            other = tmp_path / "alone" / path.relative_to(tmp_path / "whole")
            assert other.read_bytes() == path.read_bytes()
    # What a copy says is checked as what the artifact itself says.
    origin = ModelOrigin.read(run_dir / "base").model_copy(update={"sha256": "9" * 64})
    (tmp_path / "another").mkdir()
    origin.write(tmp_path / "another")
    origin.copy_to(run_dir / "base", directory=tmp_path / "another")
    done = publish(run_dir, f"dir:{tmp_path}/other", "other")
    assert "made from the base_model 111111111111, but the one here is 9999" in sentence(done, 1)
    text = (run_dir / "base").read_text()
    (run_dir / "base").write_text(text.replace("org/base", "org/other"))
    done = publish(run_dir, f"dir:{tmp_path}/other", "other")
    assert "base was changed after it was written" in sentence(done, 1)


def test_our_own_directory_is_replaced_and_a_foreign_one_is_not(
    run_dir: Path, tmp_path: Path
) -> None:
    target = f"dir:{tmp_path}/out"
    assert publish(run_dir, target, "one").returncode == 0
    change_merged(run_dir, b"another")
    assert publish(run_dir, target, "two").returncode == 0
    assert (tmp_path / "out" / "mine" / "model.safetensors").read_bytes() == b"another"
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert publish(run_dir, target, "three").returncode == 0
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"
    (tmp_path / "out" / "mine" / "tuneline.json").unlink()
    done = publish(run_dir, target, "four")
    assert "out/mine exists, but was not made by tuneline" in sentence(done, 2)
    assert (tmp_path / "out" / "mine" / "model.safetensors").read_bytes() == b"another"
    assert not (run_dir / "four").exists()


def test_a_target_that_cannot_be_written_is_one_sentence(run_dir: Path, small_disk: Path) -> None:
    done = publish(run_dir, "dir:/proc/none/out", "one")
    assert "/proc/none/out, where the repositories are staged, is not writable" in sentence(done, 1)
    # The root of a volume, which itself cannot be renamed.
    assert publish(run_dir, f"dir:{small_disk}/", "two").returncode == 0
    assert (small_disk / "mine" / "model.safetensors").is_file()
    assert not list(small_disk.glob(".publish.*"))
    assert publish(run_dir, f"dir:{small_disk}/out", "three").returncode == 0


@pytest.mark.parametrize("fails_at", ["mine", "mine-gguf"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_what_was_published_survives_an_end_between_two_renames(
    error: type[BaseException], fails_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, root = tmp_path / "out", tmp_path / "out" / ".publish.x" / "staged"
    staged = []
    for name, kind in (("mine-lora", "adapter"), ("mine", "merged"), ("mine-gguf", "gguf")):
        for folder, text in ((target / name, "the first"), (root / name, "the second")):
            folder.mkdir(parents=True)
            (folder / "tuneline.json").write_text(json.dumps({"files": {}, "text": text}))
        staged.append(StagedRepo(name, kind, root / name))
    shutil.rmtree(target / "mine-gguf")
    rename = Path.replace

    def ended(self: Path, to: Path) -> Path:
        if self == root / fails_at:
            raise error
        return rename(self, to)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", ended)
        with pytest.raises(StorageError if error is OSError else error):
            write_tree(root, staged, target)
    for name in ("mine", "mine-lora"):
        assert "the first" in (target / name / "tuneline.json").read_text()
    assert not (target / "mine-gguf").exists()


def test_what_a_killed_step_had_set_aside_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/model.safetensors").write_text("the first")

    def publish_half(scratch: Path) -> None:
        (scratch / "staged/mine").mkdir(parents=True)
        (scratch / "staged/mine/tuneline.json").write_text('{"files": {}}')
        rename = Path.replace

        def ended(self: Path, to: Path) -> Path:
            if self == scratch / "staged/mine":
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(self, to)

        monkeypatch.setattr(Path, "replace", ended)
        (tmp_path / "mine/tuneline.json").write_text('{"files": {}}')
        write_tree(
            scratch / "staged", [StagedRepo("mine", "merged", scratch / "staged/mine")], tmp_path
        )

    killed_in(scratch_in(tmp_path), publish_half)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".publish.") and (left / "previous/mine").is_dir()
    with scratch_in(tmp_path) as scratch:
        assert {path.name for path in tmp_path.iterdir()} == {"mine", scratch.name}
        assert (tmp_path / "mine/model.safetensors").read_text() == "the first"


def sentence(done: subprocess.CompletedProcess, code: int) -> str:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert TOKEN not in done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_no_token_is_said_before_anything_is_sent(run_dir: Path, hub) -> None:
    done = publish(run_dir, "me/mine", "out", HF_ENDPOINT=hub.url)
    assert "environment variable HF_TOKEN" in sentence(done, 2)
    assert hub.requests == []


def test_a_refusal_is_one_sentence(run_dir: Path, hub) -> None:
    hub.faults = [("POST /api/repos/create", 403, 9)]
    assert "needs write access to this namespace" in sentence(to_hub(run_dir, hub, "out"), 2)
    assert not (run_dir / "out").exists()


def test_a_token_that_the_hub_does_not_know(run_dir: Path, hub) -> None:
    done = to_hub(run_dir, hub, "out", HF_TOKEN="hf_wrong")
    assert "does not accept the token" in sentence(done, 2)
    assert hub.repos == {}


def test_a_token_with_a_line_break_is_the_token(run_dir: Path, hub) -> None:
    """As in a secret made with --from-file; HTTP's own refusal would print it."""
    done = to_hub(run_dir, hub, "out", HF_TOKEN=f"{TOKEN}\n")
    assert done.returncode == 0, done.stderr
    done = to_hub(run_dir, hub, "more", HF_TOKEN=f"{TOKEN}\n{TOKEN}")
    assert "HF_TOKEN is not a valid token" in sentence(done, 2)


def test_somebody_elses_repository_is_left_alone(run_dir: Path, hub) -> None:
    theirs = hub_server.new_repo(private=False, a=b"theirs")
    hub.repos["me/mine"] = theirs
    done = to_hub(run_dir, hub, "out")
    assert "was not made by tuneline" in sentence(done, 2)
    assert set(hub.repos) == {"me/mine"}, "nothing else was created"
    assert len(theirs["commits"]) == 1


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (
            lambda run: cut(run / "merged/model.safetensors"),
            r"safetensors was changed after it was",
        ),
        (lambda run: cut(run / "q8_0/model.gguf"), r"model\.gguf was changed after it was proven"),
        (lambda run: (run / "gptq-4bit/config.json").unlink(), r"config\.json is missing"),
        (lambda run: (run / "q8_0/model.gguf").unlink(), r"model\.gguf is missing"),
        (lambda run: (run / "adapter/more.bin").touch(), r"more\.bin was added after its step"),
        (
            lambda run: (run / "q8_0/Modelfile").write_text("FROM ./model.gguf\nSYSTEM hello\n"),
            r"Modelfile was changed after it was proven",
        ),
        (lambda run: (run / "q8_0/Modelfile").unlink(), r"Modelfile is missing"),
        (
            # The base was fetched again after training.
            lambda run: (
                ModelOrigin.read(run / "base")
                .model_copy(update={"sha256": "9" * 64})
                .write(run / "base")
            ),
            r"the adapter was made from the base_model 1{12}, but the one here is 9{12}",
        ),
        (
            lambda run: change_merged_alone(run),
            r"the q8_0 was made from the merged \w+, but the one here is",
        ),
    ],
)
def test_what_was_not_proven_is_not_published(run_dir: Path, hub, break_it, says) -> None:
    change_merged(run_dir, os.urandom(4096))
    break_it(run_dir)
    assert re.search(says, sentence(to_hub(run_dir, hub, "out"), 1))
    assert hub.repos == {} and not (run_dir / "out").exists()


def test_what_the_base_brought_of_its_own_repository_is_left(run_dir: Path, tmp_path: Path) -> None:
    """A base that was published by tuneline has our marker; files go out as links to the run's."""
    from tuneline.verify import verify

    brought = {"tuneline.json": "{}", ".gitattributes": "*.bin lfs", "README.md": "the base's"}
    for name, text in brought.items():
        (run_dir / "merged" / name).write_text(text)
    change_merged(run_dir, b"weights")
    assert publish(run_dir, f"dir:{tmp_path}/out", "local").returncode == 0
    assert {name: (run_dir / "merged" / name).read_text() for name in brought} == brought
    assert not (tmp_path / "out" / "mine" / ".gitattributes").exists()
    marker = json.loads((tmp_path / "out" / "mine" / "tuneline.json").read_text())
    assert set(marker["files"]) == {"config.json", "model.safetensors", "serving/README.md"}
    assert all(found.differences == [] for found in verify(tmp_path / "out"))


def change_merged_alone(run_dir: Path) -> None:
    (run_dir / "merged" / "model.safetensors").write_bytes(b"another")
    parents = (ModelOrigin, DatasetManifest, TrainingSummary)
    MergeProof.read(run_dir / "merged").write(
        run_dir / "merged",
        parents=[
            kind.read(run_dir / name)
            for kind, name in zip(parents, ("base", "dataset", "adapter"), strict=True)
        ],
    )


def test_a_model_on_hold_is_not_published(run_dir: Path, tmp_path: Path) -> None:
    Decision(verdict="hold", reason="no gain", comparisons=[]).write(run_dir / "decision")
    done = publish(run_dir, f"dir:{tmp_path}/out", "out")
    assert "the verdict is hold (no gain)" in sentence(done, 2)
    assert not (tmp_path / "out").exists()


def test_a_decision_that_was_changed_to_promote_is_found(run_dir: Path, tmp_path: Path) -> None:
    path = run_dir / "decision" / Decision.filename
    decision = json.loads(path.read_text())
    decision["comparisons"][0]["interval"] = [-0.1, 0.3]
    path.write_text(json.dumps(decision))
    done = publish(run_dir, f"dir:{tmp_path}/out", "out")
    assert "by its own comparisons the verdict is hold (heldout_choice" in sentence(done, 1)
    assert not (tmp_path / "out").exists()


def test_a_target_that_is_neither(run_dir: Path) -> None:
    done = publish(run_dir, "no-namespace", "out", HF_TOKEN=TOKEN)
    assert "write namespace/name for the Hub, dir:PATH, claim:NAME/PATH, s3:" in sentence(done, 2)


def test_a_published_repository_verifies_and_tells_of_a_change(
    run_dir: Path, tmp_path: Path
) -> None:
    from tuneline.verify import verify

    assert publish(run_dir, f"dir:{tmp_path}/out", "local").returncode == 0
    checked = verify(tmp_path / "out")
    assert {found.path.name for found in checked} == {name.split("/")[1] for name in REPOS}
    assert all(found.differences == [] for found in checked)
    folder = tmp_path / "out" / "mine-gguf"
    marker = json.loads((folder / "tuneline.json").read_text())
    assert (marker["base_revision"], marker["seed"]) == ("a" * 40, 3407)
    assert marker["trained_with"]["torch"] and len(marker["recipe_sha256"]) == 64
    (folder / "Modelfile-q8_0").write_text("FROM elsewhere")
    (folder / "README.md").write_text("my own card")
    (found,) = verify(folder)
    assert len(found.differences) == 1
    assert found.differences[0].startswith("Modelfile-q8_0 was changed")
