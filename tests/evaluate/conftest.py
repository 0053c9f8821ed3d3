from collections.abc import Callable
from pathlib import Path

import pytest

from tuneline.artifacts import DatasetManifest, write_jsonl

WriteDataset = Callable[..., Path]

QUESTIONS = [
    ("How many Mi is 2Gi?", "2048Mi", ["2048Mi", "2000Mi", "2048Ki", "20480Mi"]),
    ("Write 0.25 CPU in millicores.", "250m", ["25m", "250m", "2500m", "0.25m"]),
    ("What is Ki in 7Ki?", "1024 bytes", ["1000 bytes", "1024^2 bytes", "10 bytes", "1024 bytes"]),
    ("Replicas?", "1", ["1", "10", "100", "0"]),
    ("Say hello to Seoul.", "annyeong,  Seoul", ["hi", "annyeong,  Seoul", "?", "annyeong"]),
]


@pytest.fixture
def heldout_rows() -> Callable[..., list[dict]]:
    """Make rows as prepare writes them, in ChatML."""
    return _heldout_rows


def _heldout_rows(*, choices: bool = True) -> list[dict]:
    return [
        {
            "question": question,
            "prompt": f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n",
            "answer": answer,
            "end": "<|im_end|>\n",
            **({"choices": options, "label": options.index(answer)} if choices else {}),
        }
        for question, answer, options in QUESTIONS
    ]


@pytest.fixture
def write_dataset(tmp_path: Path, new_dataset: Callable[..., DatasetManifest]) -> WriteDataset:
    """Write a data set directory that holds out the given rows."""

    def write(rows: list[dict]) -> Path:
        path = tmp_path / "dataset"
        path.mkdir()
        write_jsonl(path / "heldout.jsonl", rows)
        new_dataset(template="chatml", num_heldout_rows=len(rows)).write(path)
        return path

    return write
