"""TRL's trainers on rows that are tokens already, with a loss that is exact however rows lie."""

import inspect
from typing import Any

import torch
from trl import DPOTrainer, SFTTrainer

from tuneline.train.divergence import GuardedTrainer
from tuneline.train.rows import IGNORED


class SupervisedTrainer(GuardedTrainer, SFTTrainer):
    """SFTTrainer whose evaluation loss is a mean over tokens, not over batches.

    TRL averages the means of batches, so its figure depends on how rows were packed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._eval_loss_sum = 0.0
        self._eval_tokens = 0
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
        if model.training:
            mask = inputs.get("attention_mask")
            count = inputs["input_ids"].numel() if mask is None else mask.sum()
            self.run_state.num_tokens += int(count)
        if self.takes_model_loss and model.training and not return_outputs:
            return self._model_loss(model, inputs, num_items_in_batch)
        if self._selects_logits and not return_outputs:
            return _selected_loss(model, inputs, num_items_in_batch)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _model_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items: torch.Tensor | int | None
    ) -> torch.Tensor:
        loss = model(**inputs, use_cache=False, num_items_in_batch=num_items).loss
        if self.args.average_tokens_across_devices and num_items is not None:
            # The count is over all ranks, whose gradients are then averaged.
            loss = loss * self.accelerator.num_processes
        return loss

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: Any = None,
    ) -> Any:
        """Sum up what `evaluation_loop` needs for a mean over tokens."""
        num_tokens = int((inputs["labels"][:, 1:] != IGNORED).sum())
        result = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if num_tokens:
            self._eval_loss_sum += float(result[0]) * num_tokens
            self._eval_tokens += num_tokens
        return result

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate, and put the mean over tokens in the place of the mean over batches."""
        self._eval_loss_sum, self._eval_tokens = 0.0, 0
        output: Any = super().evaluation_loop(*args, **kwargs)
        output.metrics["eval_loss"] = self._eval_loss_sum / max(self._eval_tokens, 1)
        return output


class PreferenceTrainer(GuardedTrainer, DPOTrainer):
    """DPOTrainer on prompt_ids, chosen_ids and rejected_ids; the reference is the adapter off."""

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
        """Return TRL's loss."""
        if model.training:
            # Prompts count twice: once with each answer.
            self.run_state.num_tokens += int(inputs["attention_mask"].sum())
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


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
