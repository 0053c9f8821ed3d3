"""What a step leaves in its termination message, and how it is read back."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tuneline.errors import DataError
from tuneline.pods import POD_NAME_VARIABLE
from tuneline.runtime.printable import printable
from tuneline.runtime.step import step
from tuneline.runtime.termination import MAX_BYTES, PATH_VARIABLE, Ending, decode, encode, leave


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The termination log of a pod, which the kubelet creates empty."""
    path = tmp_path / "termination-log"
    path.touch()
    monkeypatch.setenv(PATH_VARIABLE, str(path))
    monkeypatch.setenv(POD_NAME_VARIABLE, "pod-1")
    return path


def test_a_known_error_leaves_its_sentence(log: Path) -> None:
    with pytest.raises(SystemExit), step("prepare"):
        raise DataError("31 of 90 rows were rejected")
    assert json.loads(log.read_text()) == {
        "step": "prepare", "error": "DataError", "text": "31 of 90 rows were rejected",
    }  # fmt: skip


def test_an_error_of_a_library_leaves_its_cause_and_advice(log: Path) -> None:
    with pytest.raises(RuntimeError), step("train"):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
    left = decode(log.read_text())
    assert left is not None and (left.step, left.error) == ("train", "RuntimeError")
    assert left.text.startswith("The GPU ran out of memory. (RuntimeError: CUDA out of memory.")
    assert "train.micro_batch_size" in left.advice


def test_an_unknown_error_leaves_class_and_message_but_no_traceback(log: Path) -> None:
    with pytest.raises(KeyError), step("train"):
        raise KeyError("answer")
    assert "KeyError: 'answer'" in log.read_text() and "Traceback" not in log.read_text()


def test_a_step_leaves_that_it_began_and_that_it_finished(log: Path) -> None:
    with step("merge"):
        assert decode(log.read_text()) == Ending(step="merge", result="started")
    assert decode(log.read_text()) == Ending(step="merge", result="finished")


def test_a_result_outlives_the_end_of_the_step(log: Path) -> None:
    with step("gate"):
        leave(Ending(step="gate", result="hold", text="the interval includes 0"))
    assert decode(log.read_text()) == Ending(
        step="gate", result="hold", text="the interval includes 0"
    )


def test_a_killed_step_leaves_that_it_began(log: Path) -> None:
    program = (
        "import os, signal\nfrom tuneline.runtime.step import step\n"
        "with step('train'):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == -signal.SIGKILL
    assert decode(log.read_text()) == Ending(step="train", result="started")


def test_outside_a_pod_nothing_is_written(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(POD_NAME_VARIABLE)
    with step("merge"):
        pass
    assert log.read_text() == ""


def test_a_file_that_is_not_there_or_not_writable_disturbs_nobody(log: Path) -> None:
    log.unlink()
    with step("merge"):
        pass
    assert not log.exists()
    # A directory, because root may write to any file.
    log.mkdir()
    with step("merge"):
        pass


@pytest.mark.parametrize("letter", ["a", "\u00e9", "\ud55c", "\U0001f600", '"', "\\", "\n", "\x01"])
@pytest.mark.parametrize("shift", range(4))
def test_a_long_message_is_cut_between_characters(letter: str, shift: int) -> None:
    text = "x" * shift + letter * 5000
    message = encode(Ending(step="train", error="E", text=text, advice="Do this. " * 400))
    assert MAX_BYTES - 40 < len(message.encode()) <= MAX_BYTES
    left = decode(message)
    assert (
        left is not None
        and left.text.endswith("...")
        and printable(text).startswith(left.text[:-3])
    )
    assert left.step == "train" and left.error == "E"


def test_text_that_is_not_unicode_is_written_all_the_same(log: Path) -> None:
    # A file name that Python decoded with surrogateescape.
    with pytest.raises(SystemExit), step("prepare"):
        raise DataError("no rows in \udce9.jsonl")
    left = decode(log.read_text())
    assert left is not None and left.text == r"no rows in \udce9.jsonl"


def test_the_text_is_kept_before_the_advice() -> None:
    left = decode(encode(Ending(step="train", error="E", text="t" * 1500, advice="a" * 1500)))
    assert left is not None and left.text == "t" * 1500
    assert left.advice.endswith("...") and left.advice.startswith("aaa")


def test_it_fits_into_what_the_kubelet_keeps_of_a_pod_with_a_mesh() -> None:
    # pkg/kubelet/status/status_manager.go: 12 KiB divided by the number of containers. KFP's pod
    # has init, kfp-launcher, wait and main; Istio adds two.
    assert 12 * 1024 // 6 >= MAX_BYTES


@pytest.mark.parametrize(
    "message",
    [
        None, "", "main: Error (exit code 1)", "{", "{}", "[1]", '{"step": 3}', '{"step": ""}',
        '{"step": "train", "text": ["a"]}', "main: Error (exit code 1): {not json}", '{"a": "b"}',
    ],
)  # fmt: skip
def test_a_message_of_another_form_is_not_an_ending(message: str | None) -> None:
    assert decode(message) is None


def test_argos_words_in_front_are_skipped() -> None:
    ending = Ending(step="prepare", error="DataError", text="row {7} has no answer")
    assert decode(f"main: Error (exit code 2): {encode(ending)}") == ending
