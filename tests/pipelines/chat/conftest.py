"""A run that has a merged model and a GGUF file of it, and sessions with both."""

import copy
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_records import new_export

from tuneline.pipelines.chat.session import Session
from tuneline.pipelines.chat.subject import find_subject
from tuneline.pipelines.local.run_dir import Start


@pytest.fixture(scope="session")
def run_dir(
    merged_dir: Path,
    f16_dir: Path,
    tiny_model_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A run whose merged model came from the cache, and that failed after its export."""
    path = tmp_path_factory.mktemp("runs") / "tiny-run"
    pipeline = path / "artifacts" / "tuneline-1"
    cached = path.parent / "earlier" / "merge"
    shutil.copytree(merged_dir, cached / "merged")
    shutil.copyfile(cached / "merged" / "merge.json", cached / "record")
    shutil.copytree(tiny_model_dir, pipeline / "fetch" / "base_model")
    export = pipeline / "quantize-gguf" / "quantized"
    export.mkdir(parents=True)
    (file,) = f16_dir.glob("*.gguf")
    shutil.copyfile(file, export / file.name)
    new_export(format="f16", file=file.name).write(export)
    (path / "recipe.yaml").write_text(
        "name: tiny\nprepare:\n  system_prompt: 당신은 친절한 상담원입니다.\n", encoding="utf-8"
    )
    (path / "run.log").write_text(
        "1 - INFO - Running pipeline: 'x'\n1 - INFO - Executing task 'evaluate-2'\n"
        f'        "uri": "{cached / "record"}",\n'
    )
    Start("x.yaml", [], "subprocess", exit_code=1).write(path)
    return path


@pytest.fixture(scope="session")
def new_session(run_dir: Path) -> Callable[..., Session]:
    """Make a session with a format of the run; models are loaded once."""
    loaded: dict[tuple[str, bool], Session] = {}

    def make(format: str = "merged", *, compare: bool = False, **settings: Any) -> Session:
        key = (format, compare)
        if key not in loaded:
            subject = find_subject(str(run_dir), format=format, base=None, needs_base=compare)
            loaded[key] = Session(subject, compare=compare)
        session = copy.copy(loaded[key])
        session.settings = replace(session.settings, **({"max_tokens": 8} | settings))
        return session

    return make
