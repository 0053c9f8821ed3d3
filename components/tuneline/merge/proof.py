"""Compare the merged model with base plus adapter on held-out prompts.

Legend: T positions of a row, V vocabulary.
"""

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open

from tuneline.errors import ModelError, ProofError
from tuneline.merge.config import MergeConfig
from tuneline.merge.evaluation import EvaluationRows, evaluation_loss
from tuneline.models.adapter_files import WEIGHTS_FILE
from tuneline.models.experts.adapter import adapt_experts_in_nf4
from tuneline.models.heldout_rows import Row
from tuneline.models.likelihood import num_same_choices
from tuneline.models.nf4 import load_base

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answers:
    """One model's answers to the rows."""

    greedy_ids: list[int]
    """Greedy continuation of the first row's prompt."""
    greedy_logits: torch.Tensor
    """Logits from which each token of `greedy_ids` was chosen, [num_tokens, V]."""
    loss: float
    """Mean loss over the answer tokens of all rows, in nats per token."""
    eval_loss: float | None = None
    """Loss on training's evaluation rows, in nats per token; None: not computed."""


@dataclass(frozen=True)
class Distance:
    """Distance between two models' predictions, over all positions of all rows."""

    max_logit_difference: float
    mean_kl: float
    """KL divergence of the second model from the first, in nats per token."""
    top1_agreement: float
    """Fraction of positions with the same most likely token up to a near tie, 0 to 1."""


class Comparison:
    """Compares a second model's logits with those of a first model, one row at a time.

    Only the logits of the first model are held in memory: 4 GB for 32 rows and a vocabulary of
    128,000.
    """

    def __init__(self, first: list[torch.Tensor]) -> None:
        """Take the first model's logits, [T, V] per row."""
        self._rows = iter(first)
        self._worst, self._kl, self._agreed, self._total = 0.0, 0.0, 0, 0

    def add(self, other_TV: torch.Tensor) -> None:
        """Compare the next row, given the second model's logits.

        A NaN among the logits makes the KL divergence NaN, and no bound accepts NaN.
        """
        one_TV = next(self._rows)
        p_TV, q_TV = one_TV.log_softmax(-1), other_TV.log_softmax(-1)
        self._kl += (p_TV.exp() * (p_TV - q_TV)).sum().item()
        self._agreed += num_same_choices(one_TV, other_TV)
        difference = (one_TV - other_TV).abs().max().item()
        self._worst = difference if not difference <= self._worst else self._worst
        self._total += len(one_TV)

    def distance(self) -> Distance:
        """Return the distance over all positions of the rows added so far."""
        # Rounding makes the KL divergence of equal distributions slightly negative.
        mean_kl = self._kl / self._total
        mean_kl = max(mean_kl, 0.0) if mean_kl == mean_kl else mean_kl
        return Distance(self._worst, mean_kl, self._agreed / self._total)


Sink = Callable[[torch.Tensor], None]
"""A function that takes the logits of a row, [T, V] in fp32 on the CPU."""


def ask_trained(
    rows: list[Row],
    sink: Sink,
    *,
    base_sink: Sink,
    num_greedy_tokens: int,
    base_model_dir: Path,
    adapter_dir: Path,
    dtype: torch.dtype,
    quantized: bool,
    device: str,
) -> Answers:
    """Return the answers of the base model with the adapter applied but not merged, as trained.

    Args:
        rows: the rows to compute.
        sink: takes the logits of each row.
        base_sink: takes the logits of each row without the adapter, after those of all rows with
            it.
        num_greedy_tokens: number of tokens of the greedy answer.
        base_model_dir: directory of the base model.
        adapter_dir: directory of the adapter.
        dtype: dtype to compute in.
        quantized: whether to quantise the base model to NF4, as in training.
        device: "cpu" or "cuda".
    """
    base = load_base(base_model_dir, dtype=dtype, device=device, quantized=quantized)
    config = PeftConfig.from_pretrained(str(adapter_dir))
    if quantized:
        adapt_experts_in_nf4(config, base)
    model = PeftModel.from_pretrained(base, str(adapter_dir), config=config)
    _check_adapter_is_whole(model, adapter_dir)
    answers = ask(model, rows, sink, num_greedy_tokens=num_greedy_tokens)
    with torch.inference_mode(), model.disable_adapter():
        for row in rows:
            base_sink(_logits(model, row))
    del model, base
    _free(device)
    return answers


def _check_adapter_is_whole(model: PeftModel, adapter_dir: Path) -> None:
    """Check that peft loaded each tensor of the adapter, and left none at its initial value."""
    with safe_open(adapter_dir / WEIGHTS_FILE, framework="pt") as tensors:
        stored = set(tensors.keys())
    odd = sorted(stored ^ set(get_peft_model_state_dict(model, save_embedding_layers=False)))
    if odd:
        raise ModelError(
            f"peft does not load the adapter in {adapter_dir} as it was saved: {odd[0]} and "
            f"{len(odd) - 1} more tensors are only in the file or only in the model; train again"
        )


def ask_merged(
    rows: list[Row],
    sink: Sink,
    *,
    num_greedy_tokens: int,
    evaluation: EvaluationRows | None,
    merged_dir: Path,
    dtype: torch.dtype,
    device: str,
) -> Answers:
    """Return the answers of a merged model.

    Args:
        rows: the rows to compute.
        sink: takes the logits of each row.
        num_greedy_tokens: number of tokens of the greedy answer.
        evaluation: training's evaluation rows; None: do not compute the loss on them.
        merged_dir: directory of the merged model.
        dtype: dtype to compute in.
        device: "cpu" or "cuda".
    """
    model = load_base(merged_dir, dtype=dtype, device=device, quantized=False)
    answers = ask(model, rows, sink, num_greedy_tokens=num_greedy_tokens)
    if evaluation is not None:
        answers = replace(answers, eval_loss=evaluation_loss(model, evaluation))
    del model
    _free(device)
    return answers


def ask(model: Any, rows: list[Row], sink: Sink, *, num_greedy_tokens: int) -> Answers:
    """Compute the logits of all rows, and a greedy answer to the first row's prompt.

    Args:
        model: the model, with or without an adapter.
        rows: the rows to compute.
        sink: takes the logits of each row.
        num_greedy_tokens: number of tokens of the greedy answer.
    """
    device = next(model.parameters()).device
    model.eval()
    prompt = torch.tensor([rows[0].ids[: max(rows[0].start, 1)]], device=device)
    loss, counted = 0.0, 0
    with torch.inference_mode():
        for row in rows:
            row_TV = _logits(model, row)
            row_loss, row_count = answer_loss(row, row_TV)
            loss, counted = loss + row_loss, counted + row_count
            sink(row_TV)
        output = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=num_greedy_tokens,
            # Nothing is padded, but transformers logs a warning if no padding token is set.
            pad_token_id=model.generation_config.pad_token_id or 0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return Answers(
        greedy_ids=output.sequences[0, prompt.shape[1] :].tolist(),
        greedy_logits=torch.cat(output.logits).float().cpu(),
        loss=loss / counted,
    )


def _logits(model: Any, row: Row) -> torch.Tensor:
    ids = torch.tensor([row.ids], device=next(model.parameters()).device)
    row_TV: torch.Tensor = model(input_ids=ids).logits[0].float().cpu()
    return row_TV


def answer_loss(row: Row, row_TV: torch.Tensor) -> tuple[float, int]:
    """Return the summed loss (nats) and the number of the row's tokens from `row.start` on."""
    first = max(row.start, 1)
    targets = torch.tensor(row.ids[first:])
    logits = row_TV[first - 1 : len(row.ids) - 1]
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item(), len(targets)


def greedy_gap(trained: Answers, merged: Answers) -> float | None:
    """Return how clearly the trained model prefers its own token where the answers first differ.

    This is the trained model's logit of its own token minus its logit of the merged model's token.
    Later tokens are not compared, because they continue different texts. None means that the
    answers are equal.
    """
    for index, (ours, theirs) in enumerate(
        zip(merged.greedy_ids, trained.greedy_ids, strict=False)
    ):
        if ours != theirs:
            logits_V = trained.greedy_logits[index]
            return (logits_V[theirs] - logits_V[ours]).item()
    return None


_NEAR = 5.0
"""Multiple of a bound up to which rounding of the weights can be the cause of its violation."""


def check_bounds(
    distance: Distance, gap: float | None, config: MergeConfig, *, num_rows: int
) -> None:
    """Check the distance against the recipe's bounds.

    Args:
        distance: distance of the merged model from the base model with the adapter.
        gap: result of `greedy_gap`.
        config: the `merge` section of the recipe, with the bounds.
        num_rows: number of rows that were compared, for the message.

    Raises:
        ProofError: a bound is violated; the message states the measured value and the bound.
    """
    usual = MergeConfig()  # a recipe may have tightened a bound
    if not distance.mean_kl <= config.max_mean_kl:
        most = _NEAR * max(config.max_mean_kl, usual.max_mean_kl)
        raise ProofError(
            f"the merged model is {distance.mean_kl:.4g} nats per token (mean KL over {num_rows} "
            f"prompts) from base plus adapter, but merge.max_mean_kl allows "
            f"{config.max_mean_kl:g}: "
            f"{_advice(config, near=distance.mean_kl <= most, more='raise')}"
        )
    if distance.top1_agreement < config.min_top1_agreement:
        least = 1 - _NEAR * (1 - min(config.min_top1_agreement, usual.min_top1_agreement))
        raise ProofError(
            "the merged model has the same most likely token as base plus adapter at "
            f"{distance.top1_agreement:.1%} of positions (over {num_rows} prompts), but "
            f"merge.min_top1_agreement requires {config.min_top1_agreement:.1%}: "
            f"{_advice(config, near=distance.top1_agreement >= least, more='lower')}"
        )
    if gap is not None and not gap <= config.max_greedy_gap:
        most = _NEAR * max(config.max_greedy_gap, usual.max_greedy_gap)
        raise ProofError(
            "the greedy answers of the merged model and of base plus adapter differ at a token "
            f"that base plus adapter prefers by {gap:.4g} logits, but merge.max_greedy_gap allows "
            f"{config.max_greedy_gap:g}: {_advice(config, near=gap <= most, more='raise')}"
        )


def _advice(config: MergeConfig, *, near: bool, more: str) -> str:
    """Return what to try after a violated bound; only what can help.

    Args:
        config: the `merge` section of the recipe.
        near: whether the measured value is near the bound, so that rounding can be the cause.
        more: what one does to the bound to allow more, "raise" or "lower".
    """
    if not near:
        return (
            "that is more than rounding can make, so do not change the bound. The adapter, the "
            "base weights or the chat template are not those of the training, or a layer was not "
            "merged: run merge again from the training's artifacts, and report it if it recurs"
        )
    settings = []
    if config.dtype != "float32":
        settings.append("merge.dtype to float32")
    if config.base != "dequantized":
        settings.append("merge.base to dequantized")
    bound = f"{more} the bound if you accept it"
    return f"set {' or '.join(settings)}, or {bound}" if settings else bound


def _free(device: str) -> None:
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
