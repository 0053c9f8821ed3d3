"""Translate a TrainConfig and a Setup into the arguments of TRL and transformers."""

import difflib
import logging
import math
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.kto_config import KTOConfig
from trl.trainer.sft_config import SFTConfig

from tuneline.artifacts import PREFERENCE_METHODS, Method
from tuneline.errors import RecipeError
from tuneline.train.config import DpoConfig, KtoConfig, TrainConfig
from tuneline.train.setup import Setup
from tuneline.train.trainer.schedule import num_warmup_steps

logger = logging.getLogger(__name__)

DPO_LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot"),
    *("aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
"""Losses that TRL has. TRL itself would check the name only in the first step."""
NUM_EVALUATIONS = 5
"""Evaluations of a run without eval_steps, in addition to the one before the first step."""
NUM_WORKERS = {"cpu": 0, "cuda": 1}
"""Processes that collate training batches, by kind of device. To collate the micro-batches of a
step takes 4 to 8 ms, in which a GPU would wait. On a CPU the process would take time from
training."""


def check_settings(
    config: TrainConfig, method: Method, *, device: str, global_batch_size: int
) -> None:
    """Refuse settings that the method cannot use, and warn about settings without effect.

    Args:
        config: The `train` section of the recipe.
        method: Method of the dataset.
        device: Kind of device: "cpu" or "cuda".
        global_batch_size: Examples per optimizer step, over all ranks.

    Raises:
        RecipeError: TRL has no loss of that name, or the method cannot use the adapter's initial
            weights, or so small a global batch.
    """
    if method == "dpo":
        _check("dpo.loss_type", config.dpo.loss_type, list(DPO_LOSSES))
    if config.optim.startswith("paged_") and device == "cpu":
        logger.warning("train.optim: %s does not page on a CPU", config.optim)
    if method == "kto" and config.kto.loss_type == "kto" and global_batch_size < 2:
        raise RecipeError(
            "train.kto.loss_type kto compares each answer with the answers to other prompts of its "
            "global batch, but the global batch is 1 example: set train.global_batch_size to at "
            "least 2 (8 or more is better), or train.kto.loss_type to apo_zero_unpaired"
        )
    if method in PREFERENCE_METHODS and config.packing:
        logger.warning("train.packing has no effect on method %s: rows are padded", method)
    if method in PREFERENCE_METHODS and config.lora.init_lora_weights == "loftq":
        raise RecipeError(
            f"train.lora.init_lora_weights: loftq cannot start method {method}, whose reference is "
            "the base without the adapter: the two would differ before the first step; set it to "
            "default"
        )
    for name, settings in (("dpo", DpoConfig()), ("kto", KtoConfig())):
        if method != name and getattr(config, name) != settings:
            logger.warning(
                "train.%s has no effect: the dataset was prepared with method %s", name, method
            )


def training_arguments(
    config: TrainConfig,
    setup: Setup,
    *,
    method: Method,
    num_steps: int,
    evaluates: bool,
    packing: bool,
    work_dir: Path,
    cache_reference: bool = False,
    deepspeed: dict[str, Any] | None = None,
) -> TrainingArguments:
    """Return the SFTConfig, DPOConfig or KTOConfig of one rank.

    Args:
        config: The `train` section of the recipe.
        setup: Decisions of the run, and its plan.
        method: Method of the dataset.
        num_steps: Optimizer steps of the run.
        evaluates: Whether there are evaluation rows.
        packing: Whether examples are packs of rows.
        work_dir: Directory for files that the libraries write.
        cache_reference: Value of dpo.cache_reference if the recipe leaves it null.
        deepspeed: DeepSpeed's configuration. None: train without DeepSpeed.
    """
    common: dict[str, Any] = {
        "output_dir": str(work_dir),
        "learning_rate": setup.learning_rate,
        "lr_scheduler_type": config.lr_scheduler_type,
        "lr_scheduler_kwargs": dict(config.lr_scheduler_kwargs),
        "warmup_steps": num_warmup_steps(config, num_steps),
        "max_steps": num_steps,
        "per_device_train_batch_size": setup.plan.micro_batch_size,
        "per_device_eval_batch_size": setup.plan.micro_batch_size,
        "gradient_accumulation_steps": setup.accumulation_steps,
        "optim": setup.optimizer,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "gradient_checkpointing": setup.plan.gradient_checkpointing,
        "bf16": setup.dtype == torch.bfloat16,
        "fp16": setup.dtype == torch.float16,
        "use_cpu": setup.device == "cpu",
        "dataloader_pin_memory": setup.device != "cpu",
        "dataloader_num_workers": NUM_WORKERS[setup.device],
        "seed": config.seed,
        # Set explicitly: otherwise the order of examples depends on random numbers drawn before.
        "data_seed": config.seed,
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": config.eval_steps or math.ceil(num_steps / NUM_EVALUATIONS),
        "logging_steps": min(config.logging_steps, num_steps),
        # The filter would log the last finite loss in place of NaN.
        "logging_nan_inf_filter": False,
        # ResumableTrainer requests checkpoints, by time and not by steps.
        "save_strategy": "no",
        # SharedStepTrainer counts labels over all ranks, and divides by that count.
        "average_tokens_across_devices": False,
        "ddp_backend": "gloo" if setup.device == "cpu" and setup.num_ranks > 1 else None,
        "ddp_find_unused_parameters": False,
        # A model's buffers are tables that every rank has computed for itself.
        "ddp_broadcast_buffers": False,
        "deepspeed": deepspeed,
        "report_to": list(setup.trackers) or "none",
        "disable_tqdm": True,
    }
    if method == "dpo":
        asked = config.dpo.cache_reference
        return DPOConfig(
            **common,
            beta=config.dpo.beta,
            loss_type=[config.dpo.loss_type],
            label_smoothing=config.dpo.label_smoothing,
            max_length=None,
            precompute_ref_log_probs=cache_reference if asked is None else asked,
        )
    if method == "kto":
        return KTOConfig(
            **common,
            beta=config.kto.beta,
            loss_type=config.kto.loss_type,
            desirable_weight=config.kto.desirable_weight,
            undesirable_weight=config.kto.undesirable_weight,
            # Rows fit already; a prompt with the answer to another prompt may not.
            max_length=setup.plan.max_seq_length,
        )
    return SFTConfig(
        **common,
        packing=packing,
        packing_strategy="bfd_split",
        max_length=setup.plan.max_seq_length if packing else None,
        # The examples already have token IDs and labels, and are already cut and packed.
        dataset_kwargs={"skip_prepare_dataset": True},
    )


def _check(key: str, name: str, names: list[str]) -> None:
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or sorted(names)
        raise RecipeError(f"train.{key}: no '{name}'; did you mean {', '.join(near)}?")
