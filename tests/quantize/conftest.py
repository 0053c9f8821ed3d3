import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tuneline.artifacts import HELDOUT_FILE, INPUT_IDS, TRAIN_FILE, MergeProof, write_jsonl
from tuneline.quantize.proof import probes

PROMPT = "<|im_start|>user\nHow many Mi are 3Gi?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="session")
def other_dir(merged_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another merged model, as near as another epoch's: bounds of a proof would let it pass."""
    from safetensors.torch import load_file, save_file

    path = tmp_path_factory.mktemp("quantize") / "other"
    shutil.copytree(merged_dir, path)
    weights = load_file(path / "model.safetensors")
    weights = {name: tensor * (1 + 1e-6) for name, tensor in weights.items()}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    MergeProof.read(path).write(path)
    return path


@pytest.fixture(scope="session")
def dataset_dir(merged_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training rows to calibrate on, and one held-out prompt."""
    import pyarrow
    import pyarrow.parquet
    from transformers import AutoTokenizer

    path = tmp_path_factory.mktemp("dataset")
    tokenizer = AutoTokenizer.from_pretrained(merged_dir)
    rows = tokenizer([f"{number}Gi is {1024 * number}Mi of memory." for number in range(1, 17)])
    column = pyarrow.array(rows["input_ids"], pyarrow.list_(pyarrow.int32()))
    pyarrow.parquet.write_table(pyarrow.table({INPUT_IDS: column}), path / TRAIN_FILE)
    row = {"prompt": PROMPT, "answer": "3072Mi", "end": "<|im_end|>", "question": "3Gi in Mi?"}
    write_jsonl(path / HELDOUT_FILE, [row])
    return path


@pytest.fixture(scope="session")
def train_pieces() -> Callable[..., Any]:
    """Write tokenizer.model, a sentencepiece vocabulary of 1,000; return its processor."""
    import sentencepiece

    def train(path: Path, **special: Any) -> Any:
        text = path.parent / "text.txt"
        text.write_text("\n".join(text for text in probes.texts() if text.strip()) * 3)
        sentencepiece.SentencePieceTrainer.train(
            input=str(text),
            model_prefix=str(path / "tokenizer"),
            vocab_size=1000,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            hard_vocab_limit=False,
            minloglevel=2,
            **special,
        )
        (path / "tokenizer.vocab").unlink()
        return sentencepiece.SentencePieceProcessor(str(path / "tokenizer.model"))

    return train
