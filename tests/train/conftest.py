"""Small datasets of token IDs, in the files that prepare writes."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_families import save_experts
from tiny_llama import write_tiny_llama
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from tuneline.artifacts import EVAL_FILE, TRAIN_FILE, DatasetManifest
from tuneline.record import hash_files
from tuneline.seals import sealed_json


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Run on one thread, which is faster for tiny models, above all beside other processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a part of SmolLM2's tokens, which trains faster than with all."""
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "model", vocab_size=4096)


@pytest.fixture
def dataset_dir(tmp_path: Path, new_dataset: Callable[..., DatasetManifest]) -> Callable[..., Path]:
    """Return a function that writes a dataset; by default its rows serve for evaluation too."""

    def make(
        rows: list[dict],
        *,
        method: str = "sft",
        eval_rows: list[dict] | None = None,
        max_seq_length: int = 64,
        name: str = "dataset",
    ) -> Path:
        path = tmp_path / name
        path.mkdir()
        pq.write_table(pa.Table.from_pylist(rows), path / TRAIN_FILE)
        evaluation = rows if eval_rows is None else eval_rows
        if evaluation:
            pq.write_table(pa.Table.from_pylist(evaluation), path / EVAL_FILE)
        new_dataset(
            method=method,
            num_train_rows=len(rows),
            num_eval_rows=len(evaluation),
            max_seq_length=max_seq_length,
        ).write(path)
        return path

    return make


@pytest.fixture
def answer_rows() -> list[dict]:
    """Return rows of odd lengths whose last third is the answer."""
    rows = []
    for number in range(13):
        length = 5 + 3 * number
        ids = [100 + (7 * number + 3 * place) % 50 for place in range(length)]
        num_answer = max(2, length // 3)
        rows.append({"input_ids": ids, "loss_mask": [0] * (length - num_answer) + [1] * num_answer})
    return rows


@pytest.fixture(scope="session")
def expert_model_dir(
    tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Return a function that makes a random model of a family with experts, as fetch writes it."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family in made:
            return made[family]
        path = made[family] = tmp_path_factory.mktemp(family) / "model"
        shutil.copytree(tiny_model_dir, path, ignore=shutil.ignore_patterns("*.safetensors*"))
        settings = json.loads((tiny_model_dir / "config.json").read_text())
        names = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
        save_experts(family, path, **{name: settings[name] for name in names})
        origin = json.loads((path / "origin.json").read_text())
        origin["files"] = hash_files(path, leave_out={"origin.json"})
        (path / "origin.json").write_text(sealed_json(origin))
        return path

    return make


@pytest.fixture(scope="session")
def hybrid_model_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random Qwen3.5 with a linear and a full attention layer, as fetch writes it."""
    path = tmp_path_factory.mktemp("hybrid") / "model"
    shutil.copytree(tiny_model_dir, path, ignore=shutil.ignore_patterns("*.safetensors*"))
    settings = json.loads((tiny_model_dir / "config.json").read_text())
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        vocab_size=settings["vocab_size"],
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        tie_word_embeddings=True,
        bos_token_id=settings["bos_token_id"],
        eos_token_id=settings["eos_token_id"],
        pad_token_id=settings["pad_token_id"],
    )
    Qwen3_5ForCausalLM(config).save_pretrained(path)
    origin = json.loads((path / "origin.json").read_text())
    origin["files"] = hash_files(path, leave_out={"origin.json"})
    (path / "origin.json").write_text(json.dumps(origin))
    return path
