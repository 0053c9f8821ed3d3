"""TRL's KTO for answers that are tokens, with a result that does not depend on micro-batches.

KTO compares each answer with z, the mean log-likelihood ratio of mismatched pairs: prompts with the
answers to other prompts. TRL estimates z within a micro-batch, whose size decides how good the
estimate is. Here z is computed once per optimizer step, over the step's examples on all ranks, and
each prompt is paired with the answer of the example before it in the order of the epoch. z is then
the same for any micro-batch and any number of ranks, and equals TRL's if a micro-batch is the whole
global batch. An evaluation has one z, over all evaluation rows.
"""

import logging
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.kto_trainer import KTOTrainer

from tuneline.artifacts import COMPLETION_IDS
from tuneline.train.config import KtoConfig
from tuneline.train.ranks import collectives
from tuneline.train.rows.load import IGNORED
from tuneline.train.trainer.shared_steps import LOSS_FACTOR
from tuneline.train.trainer.trainers import ExampleTrainer

logger = logging.getLogger(__name__)

MISMATCHED_IDS = "KL_completion_ids"
"""Column of TRL's collator with the answer of another example."""
HIGHEST_BALANCE = 1.33
"""Highest advised weight of all desirable answers, as a multiple of that of undesirable ones."""
_STEP_KL = "step_kl"
# Key of a batch: the z of its step.


def log_balance(labels: Sequence[bool], config: KtoConfig) -> None:
    """Log how many answers are desirable, with the weights that balance the two kinds.

    KTO's paper advises (its equation 8) that the desirable answers together weigh 1 to 1.33 times
    as much as the undesirable ones.
    """
    num_good = sum(labels)
    num_bad = len(labels) - num_good
    logger.info("%d desirable and %d undesirable answers", num_good, num_bad)
    if not num_good or not num_bad:
        return
    ratio = config.desirable_weight * num_good / (config.undesirable_weight * num_bad)
    if num_good != num_bad and not 0.995 <= ratio <= HIGHEST_BALANCE + 0.005:
        low = config.undesirable_weight * num_bad / num_good
        high = config.desirable_weight * num_good / num_bad
        logger.warning(
            "desirable answers weigh %.2f times as much as undesirable ones, but 1 to %.2f is "
            "advised: set train.kto.desirable_weight to %.2f to %.2f, or undesirable_weight to "
            "%.2f to %.2f, but not both",
            ratio,
            HIGHEST_BALANCE,
            low,
            HIGHEST_BALANCE * low,
            high / HIGHEST_BALANCE,
            high,
        )


class JudgedTrainer(ExampleTrainer, KTOTrainer):
    """KTOTrainer for token IDs; the reference is the base model without the adapter."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        arguments = kwargs["args"]
        loss_type = arguments.loss_type
        # With loss_type kto, TRL refuses micro-batches of one example, in which no answer is
        # mismatched, and any order that it did not make. Neither matters here.
        arguments.loss_type = "apo_zero_unpaired"
        super().__init__(*args, **kwargs)
        arguments.loss_type = self.loss_type = loss_type
        self.calculate_KL = loss_type == "kto"
        self._eval_kl = 0.0
        self._kl_terms: list[torch.Tensor] = []

    def _loader(self, rows: Any, batches: Any, *, num_workers: int = 0) -> DataLoader[Any]:
        if self.calculate_KL:
            batches.with_neighbour = True
            rows = _Mismatched(rows)
        return super()._loader(rows, batches, num_workers=num_workers)

    def _remove_unused_columns(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def get_batch_samples(self, *args: Any) -> tuple[list[Any], Any]:
        """Collect the micro-batches of a step, and compute the step's z."""
        batches, count = super().get_batch_samples(*args)
        if self.calculate_KL:
            # Fused layers are used in training mode only.
            self.enter_training_mode(self.model_wrapped)
            kl = self._kl_of(batch for batch in batches if batch[LOSS_FACTOR])
            for batch in batches:
                batch[_STEP_KL] = kl
        return batches, count

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """Evaluate all rows of a data loader, with one z for all of them."""
        if self.calculate_KL:
            batches, own = enumerate(dataloader), self._eval_batches
            assert own is not None
            self._eval_kl = self._kl_of(batch for number, batch in batches if own.num_own(number))
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a batch, with the z of its step or of the evaluation.

        Args:
            model: The model, perhaps wrapped by DDP or DeepSpeed.
            inputs: A batch; the z is removed from it.
            return_outputs: Whether to return the model's outputs too.
            num_items_in_batch: Not used by KTO.
        """
        kl = torch.tensor(inputs.pop(_STEP_KL, self._eval_kl), device=self.accelerator.device)
        batch = {name: value for name, value in inputs.items() if not name.startswith("KL_")}
        # TRL asks for the mean of the model's values first, then for that of the reference.
        self._kl_terms = [torch.zeros_like(kl), kl]
        return super().compute_loss(model, batch, return_outputs, num_items_in_batch)

    def log(self, logs: dict[str, float], *args: Any) -> None:
        """Log the values since the last log, with the margin between good and bad answers."""
        assert self.model is not None
        # TRL measures a margin only in micro-batches that have both kinds of answers.
        metrics = self._metrics["train" if self.model.training else "eval"]
        good, bad = metrics.get("rewards/chosen"), metrics.get("rewards/rejected")
        metrics.pop("rewards/margins", None)
        if good and bad:
            metrics["rewards/margins"] = [sum(good) / len(good) - sum(bad) / len(bad)]
        super().log(logs, *args)

    def _compute_kl_logps(self, model: Any, batch: Any) -> torch.Tensor | None:
        return self._kl_terms.pop() if self.calculate_KL else None

    @torch.no_grad()
    def _kl_of(self, batches: Iterable[dict[str, Any]]) -> float:
        """Return the z of batches: the mean ratio over all ranks, but at least 0."""
        model, arguments = cast(Any, self.model), cast(Any, self.args)
        total, count = torch.zeros((), device=self.accelerator.device), 0
        with disable_gradient_checkpointing(model, arguments.gradient_checkpointing_kwargs):
            for batch in batches:
                ratios = self._mismatched_logps(batch)
                with model.disable_adapter():
                    ratios = ratios - self._mismatched_logps(batch)
                total += ratios.sum()
                count += len(ratios)
        mean_total, num_rows = collectives.summed(float(total), count)
        return max(0.0, mean_total / max(num_rows, 1))

    def _mismatched_logps(self, batch: dict[str, Any]) -> torch.Tensor:
        """Return the log-likelihood of each mismatched answer of a batch."""
        inputs: Any = self._prepare_inputs(
            {name: value for name, value in batch.items() if name.startswith("KL_")}
        )
        model: Any = self.model
        with self.compute_loss_context_manager():
            outputs = model(
                input_ids=inputs["KL_input_ids"],
                attention_mask=inputs["KL_attention_mask"],
                labels=inputs["KL_input_ids"].masked_fill(
                    inputs["KL_completion_mask"] == 0, IGNORED
                ),
                use_cache=False,
                fused_lm_head=True,
            )
        logps: torch.Tensor = outputs.log_probs.sum(-1)
        return logps


class _Mismatched(torch.utils.data.Dataset[Any]):
    """The rows of a dataset, each with the answer of another row."""

    def __init__(self, rows: Dataset) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitems__(self, pairs: list[tuple[int, int]]) -> list[dict[str, Any]]:
        """Return the rows of (index of a row, index of the row with the other answer) pairs."""
        rows = self._rows.select([row for row, _ in pairs]).to_list()
        others = self._rows.select([other for _, other in pairs])[COMPLETION_IDS]
        return [row | {MISMATCHED_IDS: ids} for row, ids in zip(rows, others, strict=True)]
