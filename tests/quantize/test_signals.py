"""A signal ends a step at once, whatever its programs compute, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tuneline.artifacts import DatasetManifest

IN_A_STEP = """
from tuneline.quantize import QuantizeConfig
from tuneline.quantize.gguf.importance import measure_importance
from tuneline.quantize.run import convert
from tuneline.runtime.step import step
with step("quantize"):
    """
CONVERT = "convert(merged_dir='{merged}', gguf_dir='{out}')"
MEASURE = (
    "measure_importance(QuantizeConfig(num_importance_rows=4), gguf_dir='{f16}', "
    "dataset_dir='{dataset}', importance_dir='{out}')"
)
QUANTIZE = ("-m", "tuneline.quantize", "--merged", "{merged}", "--dataset", "{dataset}")
QUANTIZE += ("--quantized", "{out}", "--format")

# What each of them is stopped in: the words of a program's command line.
CASES = [
    (("-c", IN_A_STEP + CONVERT), "convert_hf_to_gguf", signal.SIGTERM),
    (("-c", IN_A_STEP + MEASURE), "child_process", signal.SIGTERM),
    ((*QUANTIZE, "q8_0", "--gguf", "{f16}"), "child_process", signal.SIGTERM),
    ((*QUANTIZE, "q8_0", "--gguf", "{f16}"), "child_process", signal.SIGINT),
    ((*QUANTIZE, "q8_0"), "convert_hf_to_gguf", signal.SIGTERM),
    ((*QUANTIZE, "gptq-4bit"), "run_gptqmodel", signal.SIGTERM),
    ((*QUANTIZE, "gptq-4bit"), "run_gptqmodel", signal.SIGINT),
]


def processes_with(text: str) -> dict[int, str]:
    """Return the living processes with a text in their command or working directory."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            where = str((path / "cwd").readlink())
        except OSError:
            continue
        if text in command or text in where:
            found[int(path.name)] = command
    return found


@pytest.fixture(scope="module")
def prepared_dir(dataset_dir: Path, new_dataset, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("signals") / "dataset"
    path.mkdir()
    for file in dataset_dir.iterdir():
        (path / file.name).symlink_to(file)
    dataset: DatasetManifest = new_dataset(num_heldout_rows=1)
    dataset.write(path)
    return path


@pytest.mark.parametrize(("command", "moment", "sent"), CASES)
def test_a_signal_leaves_neither_programs_nor_files(
    command: tuple[str, ...],
    moment: str,
    sent: signal.Signals,
    merged_dir: Path,
    f16_dir: Path,
    prepared_dir: Path,
    tmp_path: Path,
) -> None:
    scratch, out = tmp_path / "scratch", tmp_path / "out"
    scratch.mkdir()
    out.mkdir()
    names = {"merged": merged_dir, "f16": f16_dir, "dataset": prepared_dir, "out": out / "made"}
    step = subprocess.Popen(
        [sys.executable, *(word.format(**names) for word in command)],
        env={**os.environ, "TMPDIR": str(scratch)},
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts programs in the background with SIGINT ignored, and so all that they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 120
        while not (pids := [n for n, c in processes_with(str(tmp_path)).items() if moment in c]):
            assert step.poll() is None and time.monotonic() < deadline, "the program did not start"
            time.sleep(0.02)
        for pid in pids:
            # As if it computed for hours: it sees no signal that can be caught.
            os.kill(pid, signal.SIGSTOP)
        assert any(path.name.startswith(".made.") for path in out.iterdir())
        step.send_signal(sent)
        _, errors = step.communicate(timeout=20)
    finally:
        step.kill()
        left = processes_with(str(tmp_path))
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    if sent == signal.SIGTERM:
        assert step.returncode == 143
        last = errors.splitlines()[-1]
        assert last.startswith("quantize: StoppedError: stopped by SIGTERM, and nothing of the ")
    else:
        assert step.returncode != 0 and errors.splitlines()[-1] == "KeyboardInterrupt"
    assert left == {}
    assert list(out.iterdir()) == [] and list(scratch.iterdir()) == []
