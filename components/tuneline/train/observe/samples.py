"""What the base and the tuned model say to a few prompts, for people to read beside the curves.

"Before" is the model with its adapter switched off, so both are asked at the end: a run that was
interrupted has them too, and nothing of it touches the training.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tuneline.artifacts import (
    CHOSEN_IDS,
    EVAL_FILE,
    INPUT_IDS,
    LOSS_MASK,
    PROMPT_IDS,
    TRAIN_FILE,
    DatasetManifest,
)
from tuneline.strict_model import StrictModel

if TYPE_CHECKING:
    import peft
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SAMPLES_FILE = "samples.json"

NUM_ROWS = 3
_MAX_PROMPT_TOKENS = 512
_NUM_TEXT_TOKENS = 32
"""Of a raw text, so many are the prompt."""


class Sample(StrictModel):
    """A prompt and what is said to it."""

    prompt: str
    reference: str | None
    """What the row answers; null for a prompt of the recipe."""
    before: str
    after: str


def prompts_of(
    prompts: Sequence[str] | None,
    tokenizer: "PreTrainedTokenizerBase",
    dataset_dir: Path,
    manifest: DatasetManifest,
) -> Sequence[tuple[list[int], list[int] | None]]:
    """Return token ids of prompts, each with its reference: the recipe's, or those of first rows.

    Rows are those for evaluation, and where there are none those for training; long ones are left
    out.
    """
    if prompts is not None:
        return [(_ids(text, tokenizer, manifest), None) for text in prompts]
    import pyarrow.parquet

    name = EVAL_FILE if manifest.num_eval_rows else TRAIN_FILE
    with pyarrow.parquet.ParquetFile(dataset_dir / name) as file:
        rows = next(file.iter_batches(batch_size=100)).to_pylist()
    pairs = (_split(row, manifest) for row in rows)
    return [pair for pair in pairs if 0 < len(pair[0]) <= _MAX_PROMPT_TOKENS][:NUM_ROWS]


def ask_before_and_after(
    model: "peft.PeftModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[tuple[list[int], list[int] | None]],
    *,
    num_tokens: int,
    dtype: torch.dtype,
    end_of_turn: str,
) -> list[Sample]:
    """Let the model answer greedily without its adapter and with it; none if memory runs out."""
    if not prompts or not num_tokens:
        return []
    stops = {tokenizer.eos_token_id, tokenizer.get_vocab().get(end_of_turn)} - {None}
    device = next(model.parameters()).device
    longest = max(len(ids) for ids, _ in prompts)
    padding = tokenizer.pad_token_id or 0
    rows = [[padding] * (longest - len(ids)) + ids for ids, _ in prompts]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids, _ in prompts]
    asked: dict[str, Any] = {
        "input_ids": torch.tensor(rows, device=device),
        "attention_mask": torch.tensor(mask, device=device),
        "max_new_tokens": num_tokens,
        "do_sample": False,
        "pad_token_id": padding,
        "eos_token_id": sorted(stops) or None,
    }
    model.eval()
    mixed = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    try:
        with torch.inference_mode(), mixed:
            after = model.generate(**asked)
            with model.disable_adapter():
                before = model.generate(**asked)
    except torch.OutOfMemoryError:
        logger.warning("no answers before and after: the device's memory was full")
        return []

    def text(ids: Any) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()

    return [
        Sample(
            prompt=text(ids),
            reference=None if reference is None else text(reference),
            before=text(before[number, longest:]),
            after=text(after[number, longest:]),
        )
        for number, (ids, reference) in enumerate(prompts)
    ]


def write_samples(samples: Sequence[Sample], directory: Path) -> None:
    """Leave them where `read_samples` looks; not beside the adapter, which may be published."""
    text = json.dumps([sample.model_dump() for sample in samples], ensure_ascii=False)
    (directory / SAMPLES_FILE).write_text(text, encoding="utf-8")


def read_samples(directory: Path) -> list[Sample]:
    """Read what `write_samples` left there, if it did."""
    path = directory / SAMPLES_FILE
    if not path.is_file():
        return []
    return [Sample.model_validate(one) for one in json.loads(path.read_text(encoding="utf-8"))]


def _ids(text: str, tokenizer: "PreTrainedTokenizerBase", manifest: DatasetManifest) -> list[int]:
    if manifest.method != "cpt" and tokenizer.chat_template:
        turn = [{"role": "user", "content": text}]
        asked: Any = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return tokenizer(asked, add_special_tokens=False)["input_ids"]
    return tokenizer(text)["input_ids"]


def _split(row: dict[str, Any], manifest: DatasetManifest) -> tuple[list[int], list[int]]:
    """Return a row's prompt and its first answer."""
    if manifest.method == "dpo":
        return row[PROMPT_IDS], row[CHOSEN_IDS]
    ids, counts = row[INPUT_IDS], row[LOSS_MASK]
    if manifest.method == "cpt" or all(counts):
        start = min(_NUM_TEXT_TOKENS, len(ids) // 2)
        return ids[:start], ids[start:]
    start = counts.index(1) if 1 in counts else 0
    end = next((n for n in range(start, len(ids)) if not counts[n]), len(ids))
    return ids[:start], ids[start:end]
