"""TRL's trainers for examples that are tokens, with a loss that does not depend on batching."""

import inspect
from typing import Any, cast

import torch
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_trainer import SFTTrainer

from tuneline.kernels.patching import find_sequences
from tuneline.train.ranks import collectives
from tuneline.train.rows.load import IGNORED
from tuneline.train.trainer.nonfinite import GuardedTrainer
from tuneline.train.trainer.shared_steps import LOSS_FACTOR, NUM_LABELS, num_labels_of

SEQUENCE_STARTS = "sequence_starts"
"""Key of a training batch: where the sequences of a packed row start, found on the host. On a GPU,
the model would wait for the device to find it."""


class SupervisedTrainer(GuardedTrainer, SFTTrainer):
    """SFTTrainer whose evaluation loss is a mean over tokens instead of over batches.

    TRL averages the means of batches, so TRL's loss depends on how the rows are packed. And TRL
    adds the auxiliary loss of routers, which is no property of the rows, to its evaluation loss.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.takes_model_loss = False
        """Whether the model computes its training loss itself, see `fuse.fuse_trainer`."""
        self.knows_sequences = False
        """Whether the model takes `sequence_starts`, see `fuse.fuse_trainer`."""
        base: Any = self.model
        base = base.get_base_model()
        self._auxiliary = _auxiliary_coefficient(self)
        # On a GPU, TRL's fused head computes logits only for labelled tokens. On a CPU, TRL
        # computes all logits; without those of prompts, a step of SmolLM2 is a fifth to a third
        # shorter.
        self._selects_logits = (
            self.args.device.type == "cpu"
            and "logits_to_keep" in inspect.signature(base.forward).parameters
        )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Collect the micro-batches of a step, with the `SEQUENCE_STARTS` that the model takes."""
        batches, labels = super().get_batch_samples(*args, **kwargs)
        if self.takes_model_loss and self.knows_sequences:
            for batch in batches:
                masks = (batch.get("attention_mask"), batch.get("position_ids"))
                batch[SEQUENCE_STARTS] = find_sequences(batch["input_ids"], *masks)
        return batches, labels

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the mean negative log-likelihood of the labelled tokens.

        Args:
            model: The model, perhaps wrapped by DDP or DeepSpeed.
            inputs: A batch; the entries that a trainer has added are removed from it.
            return_outputs: Whether to return the model's outputs too.
            num_items_in_batch: Number of labels by which the sum of the losses is divided. None:
                the number of labels in the batch.
        """
        factor = inputs.pop(LOSS_FACTOR, 1.0)
        num_labels = inputs.pop(NUM_LABELS, None)
        starts = inputs.pop(SEQUENCE_STARTS, None)
        auxiliary = self._auxiliary if model.training else 0.0
        if auxiliary and num_items_in_batch is not None:
            # Gradients of a step's micro-batches are summed, so each adds its part of the mean.
            auxiliary /= self.current_gradient_accumulation_steps
        if self.takes_model_loss and model.training and not return_outputs:
            known = {"num_items_in_batch": num_items_in_batch, "num_labels": num_labels}
            if starts is not None:
                known[SEQUENCE_STARTS] = starts
            return factor * _model_loss(model, inputs, known, auxiliary, self._auxiliary)
        if self._selects_logits and not return_outputs:
            return factor * _selected_loss(model, inputs, num_items_in_batch, auxiliary)
        trl: Any = super()
        self.aux_loss_enabled = auxiliary > 0
        loss = trl.compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return (factor * loss[0], loss[1]) if return_outputs else factor * loss

    def eval_weight(self, inputs: dict[str, Any]) -> int:
        """Return the number of labelled tokens."""
        return num_labels_of(inputs)


class ExampleTrainer(GuardedTrainer):
    """A base of TRL's trainers whose loss is a mean over examples, here of token IDs."""

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        # DPOTrainer and KTOTrainer 1.16 have no option for tokenised examples: they would look for
        # texts.
        return dataset

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return TRL's loss, a mean over examples, multiplied by the batch's `LOSS_FACTOR`.

        Args:
            model: The model, perhaps wrapped by DDP or DeepSpeed.
            inputs: A batch; `LOSS_FACTOR` is removed from it.
            return_outputs: Whether to return the model's outputs too.
            num_items_in_batch: Not used by these trainers.
        """
        factor = inputs.pop(LOSS_FACTOR, 1.0)
        trl: Any = super()
        loss = trl.compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return (factor * loss[0], loss[1]) if return_outputs else factor * loss


class PreferenceTrainer(ExampleTrainer, DPOTrainer):
    """DPOTrainer for token IDs; the reference is the base model without the adapter."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if collectives.num_ranks() > 1:
            # TRL gathers one value per example, but ranks may have different numbers of examples.
            cast(Any, self.accelerator).gather = collectives.concatenated

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Compute the reference in the mode of the policy, as fused layers run in training only."""
        model = cast(torch.nn.Module, self.model)
        was_training = model.training
        model.train(name == "train")
        try:
            trl: Any = super()
            return trl._precompute_ref_logps(dataset, name, batch_size)
        finally:
            model.train(was_training)


def _auxiliary_coefficient(trainer: Any) -> float:
    """Return the weight of the routers' auxiliary loss in training, and turn it off elsewhere.

    TRL makes the model return router logits in every forward pass, and transformers 5.23 cannot
    generate with them.
    """
    if not trainer.aux_loss_enabled:
        return 0.0
    trainer.model.config.get_text_config().output_router_logits = False
    return float(trainer.router_aux_loss_coef)


def _model_loss(
    model: torch.nn.Module,
    inputs: dict[str, Any],
    known: dict[str, Any],
    auxiliary: float,
    model_auxiliary: float,
) -> torch.Tensor:
    """Return the loss that the model computes.

    Args:
        model: The model, perhaps wrapped by DDP or DeepSpeed.
        inputs: A batch.
        known: What the trainer has found out on the host: numbers of labels, and sequences.
        auxiliary: Weight of the routers' auxiliary loss; 0: there is none.
        model_auxiliary: The weight with which the model adds this loss.
    """
    if not auxiliary:
        loss: torch.Tensor = model(**inputs, use_cache=False, **known).loss
        return loss
    output = model(**inputs, use_cache=False, output_router_logits=True, **known)
    total: torch.Tensor = output.loss
    if output.get("aux_loss") is not None:
        total = total + (auxiliary - model_auxiliary) * output.aux_loss
    return total


def _selected_loss(
    model: torch.nn.Module,
    inputs: dict[str, Any],
    num_items: torch.Tensor | int | None,
    auxiliary: float,
) -> torch.Tensor:
    """Compute the loss from only those logits at whose positions some row has a label."""
    targets = inputs["labels"][:, 1:]
    kept = (targets != IGNORED).any(dim=0).nonzero().flatten()
    unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
    if auxiliary:
        unlabelled["output_router_logits"] = True
    output = model(**unlabelled, use_cache=False, logits_to_keep=kept)
    logits = output.logits
    total = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(),
        targets[:, kept].flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )
    count = (targets != IGNORED).sum() if num_items is None else torch.as_tensor(num_items)
    loss: torch.Tensor = total / count.clamp(min=1)
    if auxiliary and output.get("aux_loss") is not None:
        loss = loss + auxiliary * output.aux_loss
    return loss
