"""DeepSpeed's ZeRO-2: gradients and the optimizer's state are divided over the ranks.

The recipe decides DeepSpeed's configuration, which transformers takes as a dictionary. The
configuration sets the compute type, the batch sizes and the gradient clipping explicitly, because
DeepSpeed's defaults differ from the trainer's.

A checkpoint has the whole state, gathered from all ranks, so a run can resume on any number of
ranks. The frozen base model is on every rank, in 4 bits or not.
"""

import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch

from tuneline.errors import RecipeError
from tuneline.train.config import TrainConfig
from tuneline.train.memory.estimate import shards_optimizer

logger = logging.getLogger(__name__)

STATE_FILE = "zero2.pt"
_SCHEDULER_FILE = "scheduler.pt"

_MOMENTS = ("exp_avg", "exp_avg_sq")
_BUCKET = 2**24
"""Elements per bucket of the reduction. An adapter has some ten million elements; modules that are
trained in full have more."""


def is_wanted(config: TrainConfig, device: str, num_ranks: int) -> bool:
    """Return whether a new run shards its optimizer state over the ranks; never on CPUs.

    Raises:
        RecipeError: the run should shard its optimizer state, but DeepSpeed is not installed.
    """
    is_wanted = device == "cuda" and shards_optimizer(config, num_ranks)
    if is_wanted and not importlib.util.find_spec("deepspeed"):
        raise RecipeError(
            f"{num_ranks} GPUs would train with DeepSpeed's ZeRO-2, but the package deepspeed is "
            "not installed here: add it to the step's image, or set train.sharding to ddp"
        )
    return is_wanted


def zero2_config(
    config: TrainConfig,
    *,
    micro_batch_size: int,
    accumulation_steps: int,
    num_ranks: int,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Return DeepSpeed's configuration of a run.

    Args:
        config: The `train` section of the recipe.
        micro_batch_size: Examples per forward and backward pass on one rank.
        accumulation_steps: Micro-batches per optimizer step on one rank.
        num_ranks: Number of ranks.
        dtype: Compute type. With bfloat16, ZeRO keeps an fp32 copy of the trained weights.
    """
    zero: dict[str, Any] = {
        "stage": 2,
        "contiguous_gradients": True,
        # An adapter fills only a few buckets, too few to overlap on a second stream.
        "overlap_comm": False,
        "reduce_scatter": True,
        "reduce_bucket_size": _BUCKET,
        "allgather_partitions": True,
        "allgather_bucket_size": _BUCKET,
    }
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    return {
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "gradient_clipping": config.max_grad_norm,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "train_batch_size": micro_batch_size * accumulation_steps * num_ranks,
        "steps_per_print": 10**9,
    }


def check_once(trainer: Any) -> None:
    """Let the gradient norm alone decide whether a step's gradients are finite.

    DeepSpeed looks at every parameter's gradient before it computes their norm, and checks the norm
    too. For an adapter's 448 parameters the looks take 33 ms of a step (two H200), and find what
    the norm finds: it is not finite if any gradient is not. With `offload_optimizer` DeepSpeed
    collects a flag during the backward pass instead.
    """
    zero = trainer.model_wrapped.optimizer
    if not zero.cpu_offload:
        zero.check_overflow = lambda partition_gradients=True: None


def save_state(trainer: Any, directory: Path) -> None:
    """Write the fp32 weights and moments of the trained parameters, gathered from all ranks.

    All ranks call this function, and rank 0 writes.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    inner = trainer.model_wrapped.optimizer.optimizer
    steps = [state["step"] for state in inner.state.values()]
    names = _MOMENTS if steps else ()
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in _trained(trainer):
        # Each getter is a collective operation, so every rank calls it for every parameter.
        weight = safe_get_full_fp32_param(parameter)
        assert weight is not None
        tensors[f"{name}:weight"] = weight.cpu()
        for moment in names:
            values = safe_get_full_optimizer_state(parameter, moment)
            assert values is not None
            tensors[f"{name}:{moment}"] = values.cpu()
    if trainer.args.should_save:
        torch.save({"step": int(steps[0]) if steps else 0, **tensors}, directory / STATE_FILE)
        torch.save(trainer.lr_scheduler.state_dict(), directory / _SCHEDULER_FILE)


def load_state(trainer: Any, directory: Path) -> None:
    """Restore what `save_state` wrote, on any number of ranks."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    saved = torch.load(directory / STATE_FILE, map_location="cpu", weights_only=True)
    zero = trainer.model_wrapped.optimizer
    for group in zero.optimizer.param_groups:
        for flat in group["params"]:
            zero.optimizer.state[flat] = {
                "step": torch.tensor(float(saved["step"])),
                **{moment: torch.zeros_like(flat) for moment in _MOMENTS},
            }
    # Create each parameter's views of the flat state now instead of at the first step.
    zero._lazy_init_hp_params_optimizer_state()
    for name, parameter in _trained(trainer):
        weight = saved[f"{name}:weight"]
        parameter.data.copy_(weight)
        safe_set_full_fp32_param(parameter, weight)
        for moment in _MOMENTS:
            if saved["step"]:
                safe_set_full_optimizer_state(parameter, saved[f"{name}:{moment}"], moment)
    scheduler = trainer.lr_scheduler
    scheduler.load_state_dict(torch.load(directory / _SCHEDULER_FILE, weights_only=True))
    rates = zip(scheduler.get_last_lr(), scheduler.base_lrs, strict=True)
    for group, (rate, base) in zip(trainer.optimizer.param_groups, rates, strict=True):
        group["lr"], group["initial_lr"] = rate, base


def _trained(trainer: Any) -> list[tuple[str, torch.nn.Parameter]]:
    return [(n, p) for n, p in trainer.model.named_parameters() if p.requires_grad]
