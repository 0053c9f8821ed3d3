"""What the tests of prepare share: the tokenizer, and a run on rows written to a file."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from hypothesis import settings

from tuneline.artifacts import DatasetManifest, read_jsonl
from tuneline.prepare import PrepareConfig
from tuneline.prepare.run import run

# Properties are checked on the same examples in every run, however slow the machine is.
settings.register_profile("tuneline", deadline=None, derandomize=True, database=None)
settings.load_profile("tuneline")


@dataclass(frozen=True)
class Prepared:
    manifest: DatasetManifest
    path: Path
    page: str

    def rows(self, name: str = "train.parquet") -> list[dict[str, Any]]:
        return pyarrow.parquet.read_table(self.path / name).to_pylist()

    def jsonl(self, name: str) -> list[dict[str, Any]]:
        return read_jsonl(self.path / name)


# Every row goes to train.parquet unless a test says otherwise.
ALL_TRAIN: dict[str, Any] = {"eval_share": 0.0, "heldout": {"max_rows": 0}}


@pytest.fixture(scope="session")
def tokenizer(tiny_model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture
def prepare(tiny_model_dir: Path, tmp_path: Path) -> Callable[..., Prepared]:
    """Prepare rows (written as JSON Lines) or a source."""
    count = 0

    def call(rows: list[Any] | str | Path, model: Path | None = None, **config: Any) -> Prepared:
        nonlocal count
        count += 1
        path = tmp_path / f"prepared-{count}"
        if isinstance(rows, list):
            source = tmp_path / f"rows-{count}.jsonl"
            source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        else:
            source = Path(rows)
        manifest = run(
            PrepareConfig.parse(ALL_TRAIN | config),
            source=str(rows) if isinstance(rows, str) else str(source),
            base_model_dir=str(model or tiny_model_dir),
            dataset_dir=str(path),
            statistics_path=str(tmp_path / f"page-{count}.html"),
        )
        page = (tmp_path / f"page-{count}.html").read_text(encoding="utf-8")
        return Prepared(manifest, path, page)

    return call
