"""TRL's trainers on rows that are tokens already, with a loss that is exact however rows lie."""

import inspect
from typing import Any

import torch
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_trainer import SFTTrainer

from tuneline.train.ranks import collectives
from tuneline.train.rows.load import IGNORED
from tuneline.train.trainer.nonfinite import GuardedTrainer
from tuneline.train.trainer.shared_steps import LOSS_FACTOR, NUM_LABELS, num_labels_of


class SupervisedTrainer(GuardedTrainer, SFTTrainer):
    """SFTTrainer whose evaluation loss is a mean over tokens, not over batches.

    TRL averages the means of batches, so its figure depends on how rows were packed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.takes_model_loss = False
        """Whether the model computes its training loss itself; see `kernels.fuse_trainer`."""
        base: Any = self.model
        base = base.get_base_model()
        # On a GPU, TRL's fused head scores only the tokens that count. On a CPU it scores all of
        # them; leaving out the prompt makes a step of SmolLM2 a fifth to a third shorter.
        self._selects_logits = (
            self.args.device.type == "cpu"
            and "logits_to_keep" in inspect.signature(base.forward).parameters
        )

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the mean negative log-likelihood of the labelled tokens."""
        factor = inputs.pop(LOSS_FACTOR, 1.0)
        num_labels = inputs.pop(NUM_LABELS, None)
        if self.takes_model_loss and model.training and not return_outputs:
            return factor * _model_loss(model, inputs, num_items_in_batch, num_labels)
        if self._selects_logits and not return_outputs:
            return factor * _selected_loss(model, inputs, num_items_in_batch)
        found: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return (factor * found[0], found[1]) if return_outputs else factor * found

    def eval_weight(self, inputs: dict[str, Any]) -> int:
        """Return the number of labelled tokens."""
        return num_labels_of(inputs)


class PreferenceTrainer(GuardedTrainer, DPOTrainer):
    """DPOTrainer on prompt_ids, chosen_ids and rejected_ids; the reference is the adapter off."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if collectives.num_ranks() > 1:
            # TRL's measures are gathered row by row, and ranks may differ by a row.
            self.accelerator.gather = collectives.concatenated

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        # DPOTrainer 1.16 has no switch for rows that are tokenised: it would look for texts.
        return dataset

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return TRL's loss, a mean over rows, by the rows' share of the step."""
        factor = inputs.pop(LOSS_FACTOR, 1.0)
        found: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return (factor * found[0], found[1]) if return_outputs else factor * found


def _model_loss(
    model: torch.nn.Module,
    inputs: dict[str, Any],
    num_items: torch.Tensor | int | None,
    num_labels: int | None,
) -> torch.Tensor:
    counts = {"num_items_in_batch": num_items, "num_labels": num_labels}
    return model(**inputs, use_cache=False, **counts).loss


def _selected_loss(
    model: torch.nn.Module, inputs: dict[str, Any], num_items: torch.Tensor | int | None
) -> torch.Tensor:
    """Compute logits only where some row of the batch has a label."""
    targets = inputs["labels"][:, 1:]
    kept = (targets != IGNORED).any(dim=0).nonzero().flatten()
    rest = {name: value for name, value in inputs.items() if name != "labels"}
    logits = model(**rest, use_cache=False, logits_to_keep=kept).logits
    total = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(),
        targets[:, kept].flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )
    count = (targets != IGNORED).sum() if num_items is None else torch.as_tensor(num_items)
    return total / count.clamp(min=1)
