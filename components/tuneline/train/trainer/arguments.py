"""A TrainConfig in the words of TRL and transformers."""

import difflib
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneline.artifacts import Method
from tuneline.errors import RecipeError
from tuneline.train.config import DpoConfig, TrainConfig
from tuneline.train.trainer.trackers import trackers

if TYPE_CHECKING:
    import torch
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)

DPO_LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot"),
    *("aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
"""What TRL knows; it would say so only in the first step, with the model loaded."""
NUM_EVALUATIONS = 5
"""How often a run without eval_steps measures the evaluation loss, the start not counted."""


def check_names(config: TrainConfig, method: Method, device: str) -> None:
    """Refuse names that the libraries do not know, and warn of settings without effect.

    Raises:
        RecipeError: an optimizer, a schedule or a loss of that name does not exist, or the
            adapter's start is not one for the method.
    """
    from transformers import SchedulerType
    from transformers.training_args import OptimizerNames

    _check("optim", config.optim, [name.value for name in OptimizerNames])
    _check("lr_scheduler_type", config.lr_scheduler_type, [name.value for name in SchedulerType])
    if method == "dpo":
        _check("dpo.loss_type", config.dpo.loss_type, list(DPO_LOSSES))
    if config.optim.startswith("paged_") and device == "cpu":
        logger.warning("train.optim: %s does not page on a CPU", config.optim)
    if method == "dpo" and config.packing:
        logger.warning("train.packing has no effect on method dpo: pairs are padded, not packed")
    if method == "dpo" and config.lora.init_lora_weights == "loftq":
        raise RecipeError(
            "train.lora.init_lora_weights: loftq cannot start method dpo, whose reference is the "
            "base without the adapter: the two would differ before the first step; take default"
        )
    if method != "dpo" and config.dpo != DpoConfig():
        logger.warning("train.dpo has no effect: the data set was prepared with %s", method)


def num_total_steps(config: TrainConfig, num_rows: int) -> int:
    """Return the number of optimizer steps over rows, or packs of rows."""
    if config.max_steps is not None:
        return config.max_steps
    batches = math.ceil(num_rows / config.per_device_train_batch_size)
    steps_an_epoch = math.ceil(batches / config.gradient_accumulation_steps)
    return math.ceil(config.num_train_epochs * steps_an_epoch)


def training_arguments(
    config: TrainConfig,
    *,
    method: Method,
    learning_rate: float,
    num_steps: int,
    max_seq_length: int,
    evaluates: bool,
    dtype: "torch.dtype",
    device: str,
    work_dir: Path,
    cache_reference: bool = False,
    num_ranks: int = 1,
    deepspeed: dict[str, Any] | None = None,
) -> "TrainingArguments":
    """Return an SFTConfig or a DPOConfig, of one rank.

    Args:
        config: the recipe's part, of a whole step.
        method: of the data set.
        learning_rate: the schedule's highest.
        num_steps: of the run.
        max_seq_length: of a pack.
        evaluates: whether there are rows for it.
        dtype: to compute in.
        device: "cpu" or "cuda".
        work_dir: for what the libraries write.
        cache_reference: the default of what a recipe says for DPO.
        num_ranks: who share the forwards of a step.
        deepspeed: its configuration, where it runs.
    """
    import torch

    warmup_steps = config.warmup_steps
    if config.warmup_ratio is not None:
        warmup_steps = math.ceil(config.warmup_ratio * num_steps)
    if warmup_steps >= num_steps:
        logger.warning(
            "warmup_steps %d is not below the %d steps of this run: the learning rate never "
            "reaches %g",
            warmup_steps,
            num_steps,
            learning_rate,
        )
    common: dict[str, Any] = {
        "output_dir": str(work_dir),
        "learning_rate": learning_rate,
        "lr_scheduler_type": config.lr_scheduler_type,
        "warmup_steps": warmup_steps,
        "max_steps": num_steps,
        "per_device_train_batch_size": config.per_device_train_batch_size,
        "per_device_eval_batch_size": config.per_device_train_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps // num_ranks,
        "optim": config.optim,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "gradient_checkpointing": config.gradient_checkpointing,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "use_cpu": device == "cpu",
        "dataloader_pin_memory": device != "cpu",
        "seed": config.seed,
        # Named, so that the order of the rows hangs on nothing that happened before the trainer.
        "data_seed": config.seed,
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": config.eval_steps or math.ceil(num_steps / NUM_EVALUATIONS),
        "logging_steps": min(config.logging_steps, num_steps),
        # A filter would show the last finite loss in the place of NaN.
        "logging_nan_inf_filter": False,
        # Checkpoints are asked for by ResumableTrainer, by time and not by steps.
        "save_strategy": "no",
        # `SharedStepTrainer` counts over ranks, and divides by it.
        "average_tokens_across_devices": False,
        "ddp_backend": "gloo" if device == "cpu" and num_ranks > 1 else None,
        "ddp_find_unused_parameters": False,
        # A model's buffers are tables that every rank has made for itself.
        "ddp_broadcast_buffers": False,
        "deepspeed": deepspeed,
        "report_to": trackers(config) or "none",
        "disable_tqdm": True,
    }
    if method == "dpo":
        from trl import DPOConfig

        asked = config.dpo.cache_reference
        return DPOConfig(
            **common,
            beta=config.dpo.beta,
            loss_type=[config.dpo.loss_type],
            label_smoothing=config.dpo.label_smoothing,
            max_length=None,
            precompute_ref_log_probs=cache_reference if asked is None else asked,
        )
    from trl import SFTConfig

    return SFTConfig(
        **common,
        packing=config.packing,
        packing_strategy="bfd_split",
        max_length=max_seq_length,
        # Rows are tokens, labelled, cut and packed already.
        dataset_kwargs={"skip_prepare_dataset": True},
    )


def _check(key: str, name: str, known: list[str]) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or sorted(known)
        raise RecipeError(f"train.{key}: no '{name}'; did you mean {', '.join(near)}?")
