"""Answers of the base model and of the tuned model to a few prompts, for the page of the run.

All answers are generated after training; those of the base model are generated with the adapter
disabled. Generation therefore does not affect the training, and a resumed run has answers too.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet
import torch

from tuneline.artifacts import (
    CHOSEN_IDS,
    COMPLETION_IDS,
    EVAL_FILE,
    INPUT_IDS,
    LOSS_MASK,
    PROMPT_IDS,
    TRAIN_FILE,
    DatasetManifest,
)
from tuneline.models.tokenizer.special_tokens import end_token
from tuneline.strict_model import StrictModel

if TYPE_CHECKING:
    import peft
    from transformers import PreTrainedTokenizerBase

SAMPLES_FILE = "samples.json"

NUM_ROWS = 3
"""Number of dataset rows that are used as prompts."""
_MAX_PROMPT_TOKENS = 512
_NUM_TEXT_TOKENS = 32
"""Largest number of tokens at the start of a raw text that are used as the prompt."""


class Sample(StrictModel):
    """A prompt and the answers to it."""

    prompt: str
    """Text of the prompt."""
    reference: str | None
    """Answer in the dataset; null for a prompt from the recipe."""
    before: str
    """Answer of the base model."""
    after: str
    """Answer of the tuned model."""


def prompts_of(
    prompts: Sequence[str] | None,
    tokenizer: "PreTrainedTokenizerBase",
    dataset_dir: Path,
    manifest: DatasetManifest,
) -> Sequence[tuple[list[int], list[int] | None]]:
    """Return the token IDs of each prompt and of its reference answer.

    Args:
        prompts: The recipe's prompts, which have no references. None uses the first evaluation
            rows, or the first training rows if there are none; rows with long prompts are skipped.
        tokenizer: Tokenizer of the base model.
        dataset_dir: Dataset directory that prepare wrote.
        manifest: Record of that dataset.
    """
    if prompts is not None:
        return [(_ids(text, tokenizer, manifest), None) for text in prompts]
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
    """Generate answers greedily without and with the adapter.

    Args:
        model: Model with the trained adapter.
        tokenizer: Tokenizer of the base model.
        prompts: For each prompt, its token IDs, and those of its reference answer or None.
        num_tokens: Largest number of tokens per answer; 0 generates no answers.
        dtype: Compute type.
        end_of_turn: Text that ends a turn in the chat template; it ends an answer too.

    Returns:
        One sample per prompt.
    """
    if not prompts or not num_tokens:
        return []
    base: Any = model.get_base_model()
    settings = base.config.get_text_config()
    if getattr(settings, "output_router_logits", False):
        # TRL sets it for the auxiliary loss of routers. A model of experts cannot generate with it.
        settings.output_router_logits = False
    ends = (tokenizer.eos_token_id, end_token(tokenizer, end_of_turn))
    stops = {token for token in ends if isinstance(token, int)}
    device: torch.device = base.device
    longest = max(len(ids) for ids, _ in prompts)
    padding = tokenizer.pad_token_id or 0
    rows = [[padding] * (longest - len(ids)) + ids for ids, _ in prompts]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids, _ in prompts]
    options: dict[str, Any] = {
        "input_ids": torch.tensor(rows, device=device),
        "attention_mask": torch.tensor(mask, device=device),
        "max_new_tokens": num_tokens,
        "do_sample": False,
        "pad_token_id": padding,
        "eos_token_id": sorted(stops) or None,
    }
    model.eval()
    generate: Any = model.generate
    mixed = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    with torch.inference_mode(), mixed:
        after = generate(**options)
        with model.disable_adapter():
            before = generate(**options)

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
    """Write samples for `read_samples`.

    Args:
        samples: The samples.
        directory: Directory of the checkpoints. It must not be the adapter's directory, because
            samples contain rows of the dataset: these may be private, but an adapter may be
            published.
    """
    text = json.dumps([sample.model_dump() for sample in samples], ensure_ascii=False)
    (directory / SAMPLES_FILE).write_text(text, encoding="utf-8")


def read_samples(directory: Path) -> list[Sample]:
    """Return the samples that `write_samples` wrote; an empty list if there is no file."""
    path = directory / SAMPLES_FILE
    if not path.is_file():
        return []
    return [
        Sample.model_validate(sample) for sample in json.loads(path.read_text(encoding="utf-8"))
    ]


def _ids(text: str, tokenizer: "PreTrainedTokenizerBase", manifest: DatasetManifest) -> list[int]:
    ids: list[int]
    if manifest.method != "cpt" and tokenizer.chat_template:
        turn = [{"role": "user", "content": text}]
        prompt: Any = tokenizer.apply_chat_template(
            turn, tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(text)["input_ids"]
    return ids


def _split(row: dict[str, Any], manifest: DatasetManifest) -> tuple[list[int], list[int]]:
    """Return the token IDs of a row's prompt and of its first answer."""
    if manifest.method == "dpo":
        return row[PROMPT_IDS], row[CHOSEN_IDS]
    if manifest.method == "kto":
        return row[PROMPT_IDS], row[COMPLETION_IDS]
    ids, counts = row[INPUT_IDS], row[LOSS_MASK]
    if manifest.method == "cpt" or all(counts):
        start = min(_NUM_TEXT_TOKENS, len(ids) // 2)
        return ids[:start], ids[start:]
    start = counts.index(1) if 1 in counts else 0
    end = next((n for n in range(start, len(ids)) if not counts[n]), len(ids))
    return ids[:start], ids[start:end]
