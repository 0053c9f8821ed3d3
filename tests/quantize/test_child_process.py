"""A function in a process of its own: what comes back, and what is said where nothing does."""

import errno
import json
import math
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tuneline.errors import RecipeError, ToolError
from tuneline.quantize import QuantizeConfig, child_process


def test_what_a_function_returns() -> None:
    config = QuantizeConfig(gguf=("q8_0",), max_mean_kl={"q8_0": 0.5})
    values = config.model_dump()
    assert child_process.call(QuantizeConfig.model_validate, values) == config
    assert child_process.call(json.dumps, {"b": 1, "a": 2}, sort_keys=True) == '{"a": 2, "b": 1}'
    assert child_process.call(os.getpid) != os.getpid()


def test_what_a_function_raises() -> None:
    with pytest.raises(ValueError, match="math domain error") as plain:
        child_process.call(math.sqrt, -1)
    assert "child_process.py" in plain.value.__notes__[0]
    with pytest.raises(RecipeError, match=r"did you mean 'q8_0'\?") as ours:
        child_process.call(QuantizeConfig.parse, {"gguf": ["q8"]})
    assert ours.value.exit_code == 2
    # The frame of a step tells a full disk by its number.
    with pytest.raises(FileNotFoundError) as missing:
        child_process.call(os.stat, "/no/such/file")
    assert (missing.value.errno, missing.value.filename) == (errno.ENOENT, "/no/such/file")


@pytest.mark.parametrize(
    ("function", "argument", "message"),
    [
        (signal.raise_signal, signal.SIGKILL, "was killed, .* memory runs out: give the step more"),
        (signal.raise_signal, signal.SIGABRT, "ended by SIGABRT; its log above says why"),
        (os._exit, 3, "ended with code 3; its log above says why"),
        (threading.Semaphore, 1, "ended with code 1; its log above says why"),
    ],
)
def test_a_process_without_an_answer(
    function: Callable[[Any], Any], argument: Any, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ToolError, match=message):
        child_process.call(function, argument)
    if function is threading.Semaphore:
        assert "cannot pickle" in capfd.readouterr().err


def test_nothing_stays_in_the_temporary_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    made = child_process.call(os.getenv, "TMPDIR")
    assert made is not None and Path(made).parent == tmp_path
    assert list(tmp_path.iterdir()) == []
