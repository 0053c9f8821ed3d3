"""The frame of a step: sentences, exit codes, events, whole outputs."""

import errno
import json
from pathlib import Path

import pytest

from tuneline.artifacts import Decision, new_directory
from tuneline.errors import DataError, OutputExistsError, WorldError
from tuneline.runtime.step import EVENTS_VARIABLE, log_metrics, step
from tuneline.seals import broken_seal


def events(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def events_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "events.jsonl"
    monkeypatch.setenv(EVENTS_VARIABLE, str(path))
    return path


def test_a_known_error_is_one_sentence_and_a_code(
    events_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught, step("prepare"):
        raise DataError("row 3 has no answer")
    assert caught.value.code == 2
    assert capsys.readouterr().err == "prepare: DataError: row 3 has no answer\n"
    started, failed = events(events_path)
    assert (started["event"], failed["event"]) == ("started", "failed")
    assert (failed["kind"], failed["message"]) == ("DataError", "row 3 has no answer")


def test_an_unknown_error_keeps_its_traceback(events_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), step("train"):
        1 / 0  # noqa: B018
    assert events(events_path)[-1]["kind"] == "ZeroDivisionError"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "/x/model.safetensors"),
        RuntimeError('SafetensorError: I/O error: Os { code: 28, "No space left on device" }'),
    ],
)
def test_a_full_disk_is_said_plainly(
    error: Exception, events_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught, step("merge"):
        raise error
    assert caught.value.code == 1
    assert "the disk is full" in capsys.readouterr().err


def test_weights_of_an_output_can_be_read_by_other_users(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.safetensors"
    elsewhere.write_bytes(b"")
    elsewhere.chmod(0o600)
    with new_directory(tmp_path / "out") as partial:
        (partial / "nested").mkdir()
        files = [partial / "model.safetensors", partial / "nested" / "model.safetensors"]
        for file in files:
            file.write_bytes(b"")
            file.chmod(0o600)  # As safetensors 0.8 makes them.
        (partial / "linked.safetensors").symlink_to(elsewhere)
    for file in files:
        assert (tmp_path / "out" / file.relative_to(partial)).stat().st_mode & 0o777 == 0o644
    assert elsewhere.stat().st_mode & 0o777 == 0o600


def test_a_new_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(RuntimeError), new_directory(target) as partial:
        (partial / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with new_directory(target) as partial:
        (partial / "whole").write_text("x")
        assert not target.exists()
    assert (target / "whole").read_text() == "x"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(OutputExistsError, match="not empty"), new_directory(target):
        raise AssertionError("not reached")
    assert (target / "whole").read_text() == "x"


def test_an_artifact_without_its_record_is_none(tmp_path: Path) -> None:
    with pytest.raises(WorldError, match="has no decision.json"):
        Decision.read(tmp_path)
    decision = Decision(verdict="hold", reason="no", comparisons=[])
    decision.write(tmp_path)
    read = Decision.read(tmp_path)
    assert (read.verdict, read.reason) == ("hold", "no")
    assert read.created_at.endswith("+00:00")


def test_metrics_are_metadata_and_a_file(tmp_path: Path) -> None:
    dsl = pytest.importorskip("kfp.dsl")
    artifact = dsl.Metrics(name="metrics", uri=str(tmp_path / "metrics"))
    log_metrics(artifact, {"loss": 0.5})
    assert artifact.metadata == {"loss": 0.5}
    # A file is what KFP's local cache looks for.
    text = (tmp_path / "metrics").read_text()
    assert json.loads(text)["loss"] == 0.5
    assert broken_seal(text) == ""
