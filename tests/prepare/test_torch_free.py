"""The step runs in a process without torch, and writes the same dataset."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from small_records import new_origin

from tuneline.artifacts import DatasetManifest

_SCRIPT = """
import runpy, sys
sys.argv = ["tuneline.prepare", *sys.argv[1:]]
runpy.run_module("tuneline.prepare", run_name="__main__")
print("torch", sorted(name for name in sys.modules if name.startswith("torch.")))
"""


def test_the_step_imports_no_torch(
    prepare: Callable[..., object], tiny_model_dir: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": f"Question {number}?", "completion": str(number)} for number in range(9)]
    expected = prepare(rows).manifest  # type: ignore[attr-defined]
    assert _run(tiny_model_dir, tmp_path) == "torch []"
    assert DatasetManifest.read(tmp_path / "dataset").sha256 == expected.sha256


def test_code_of_a_tokenizer_may_import_torch(
    prepare: Callable[..., object], tiny_model_dir: Path, tmp_path: Path
) -> None:
    prepare([{"prompt": "Question?", "completion": "Answer."}])
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": [None, "own.OwnTokenizer"]}
    settings["tokenizer_class"] = "OwnTokenizer"
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "own.py").write_text(
        "import torch\nfrom transformers import PreTrainedTokenizerFast\n\n\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n    one = torch.ones(1)\n"
    )
    new_origin(runs_own_code=True).write(model)
    assert _run(model, tmp_path).startswith("torch ['torch.")


def _run(model: Path, path: Path) -> str:
    """Run the step on the rows of the fixture; return the last line of its output."""
    config = path / "config.json"
    config.write_text(json.dumps({"eval_share": 0.0, "heldout": {"max_rows": 0}}))
    arguments = {
        "--source": path / "rows-1.jsonl",
        "--base-model": model,
        "--dataset": path / "dataset",
        "--statistics": path / "page.html",
        "--config": config,
    }
    flat = [str(part) for pair in arguments.items() for part in pair]
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, *flat], capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr
    return done.stdout.splitlines()[-1]
