"""A checkpoint is whole or not there, and belongs to one run."""

import contextlib
import json
import logging
import threading

import pytest

from tuneline.errors import StorageError
from tuneline.train import checkpoints
from tuneline.train.checkpoints import CheckpointStore

RUN = {"base": "b", "dataset": "d", "train": {"learning_rate": 1e-4, "lora": {"r": 16}}}


def write(store: CheckpointStore, step: int) -> None:
    written = store.partial / f"checkpoint-{step}"
    written.mkdir(parents=True)
    (written / "weights").write_text(f"weights of step {step}")
    (written / "state").write_text(f"state of step {step}")
    store.seal(written, step)


def test_the_two_newest_are_kept_in_the_order_of_steps(tmp_path):
    with CheckpointStore.opened(tmp_path, RUN) as store:
        for step in (0, 90, 100, 1000):
            write(store, step)
        assert store.steps() == [100, 1000]
        assert store.latest() == store.path(1000)
        assert (store.latest() / "weights").read_text() == "weights of step 1000"
    with CheckpointStore.opened(tmp_path, RUN) as again:
        assert again.latest() == store.path(1000)


def test_a_step_is_written_again(tmp_path):
    with CheckpointStore.opened(tmp_path, RUN) as store:
        write(store, 5)
        write(store, 5)
        assert store.steps() == [5] and store.latest() is not None


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (
            lambda path: (path / "weights").write_text("weights of st"),
            "weights does not match its SHA-256 hash",
        ),
        (lambda path: (path / "state").unlink(), "state cannot be read"),
        (
            lambda path: (path / "checksums.json").write_text("{"),
            "checksums.json is not valid JSON",
        ),
        (lambda path: (path / "checksums.json").unlink(), "checksums.json cannot be read"),
    ],
)
def test_a_damaged_one_is_passed_over(tmp_path, caplog, damage, fault):
    with CheckpointStore.opened(tmp_path, RUN) as store:
        write(store, 1)
        write(store, 2)
        damage(store.path(2))
        assert store.latest() == store.path(1)
        assert fault in caplog.text
        write(store, 2)
        assert store.latest() == store.path(2)


def test_what_a_killed_process_left_half_written_is_no_checkpoint(tmp_path):
    with CheckpointStore.opened(tmp_path, RUN) as store:
        write(store, 1)
        half = store.partial / "checkpoint-2"
        half.mkdir(parents=True)
        (half / "weights").write_text("wei")
        assert store.latest() == store.path(1)
    with CheckpointStore.opened(tmp_path, RUN) as store:
        assert not store.partial.exists() and store.steps() == [1]


def test_a_changed_run_starts_anew_and_says_what_changed(tmp_path, caplog):
    with CheckpointStore.opened(tmp_path, RUN) as store:
        write(store, 7)
    changed = json.loads(json.dumps(RUN))
    changed["train"]["lora"]["r"] = 32
    changed["dataset"] = "other"
    with (
        caplog.at_level(logging.INFO),
        CheckpointStore.opened(tmp_path, changed) as other,
    ):
        assert other.latest() is None
    assert "train.lora.r (was 16, is 32)" in caplog.text
    assert 'dataset (was "d", is "other")' in caplog.text
    assert "learning_rate" not in caplog.text
    # Nothing was written to it, so nothing of it is left; the first one's still is.
    assert not other.directory.exists() and store.steps() == [7]


def test_one_process_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "LOCK_SECONDS", 0.1)
    with (
        CheckpointStore.opened(tmp_path, RUN),
        pytest.raises(StorageError, match="another process is training the same"),
        CheckpointStore.opened(tmp_path, RUN),
    ):
        pass


@pytest.mark.parametrize("succeeds", [False, True])
def test_the_lock_of_a_process_that_ends_is_waited_for(tmp_path, caplog, succeeds):
    first = contextlib.ExitStack()
    store = first.enter_context(CheckpointStore.opened(tmp_path, RUN))
    write(store, 1)
    if succeeds:
        store.remove()
    threading.Timer(0.2, first.close).start()
    with CheckpointStore.opened(tmp_path, RUN) as again:
        assert again.steps() == ([] if succeeds else [1])
        write(again, 2)
    # A directory that was removed had another lock, which nobody needs to wait for.
    waited = "is locked: waiting for another process to end" in caplog.text
    assert waited != succeeds


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(StorageError, match="TUNELINE_CHECKPOINT_DIR"),
        CheckpointStore.opened(tmp_path / "file", RUN),
    ):
        pass


def test_removing_leaves_others_alone(tmp_path):
    root = tmp_path / "root"
    with CheckpointStore.opened(root, RUN) as store:
        write(store, 1)
    with CheckpointStore.opened(root, {"base": "c"}) as other:
        write(other, 1)
        other.remove()
    assert [path.name for path in root.iterdir()] == [store.directory.name]
    store.remove()
    assert not root.exists()
