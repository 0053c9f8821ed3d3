"""Build the trainer of an attempt, and decide whether its rows are packed."""

import logging
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from tuneline.artifacts import LABEL, DatasetManifest, Method
from tuneline.models.experts.forward import use_kernels
from tuneline.train.batch_size import FEW_STEPS, more_steps_advice, num_total_steps
from tuneline.train.config import TrainConfig
from tuneline.train.memory.available import host_memory
from tuneline.train.model.adapter import keep_adapter_in_fp32, keep_hidden_states_in
from tuneline.train.model.expert_targets import check_adapter_of_experts
from tuneline.train.model.fuse import fuse_model, fuse_trainer
from tuneline.train.model.loftq import start_from_error
from tuneline.train.model.packing import reason_not_to_pack
from tuneline.train.model.targets import adapted_modules, attach_to_the_rest, lora_config
from tuneline.train.ranks import collectives, zero2
from tuneline.train.rows.load import packs_are_trusted
from tuneline.train.setup import Inputs, Setup
from tuneline.train.trainer.arguments import training_arguments
from tuneline.train.trainer.judged import JudgedTrainer, log_balance
from tuneline.train.trainer.nonfinite import GuardedTrainer
from tuneline.train.trainer.trainers import PreferenceTrainer, SupervisedTrainer

logger = logging.getLogger(__name__)

TRAINERS: dict[Method, type[GuardedTrainer]] = {
    "sft": SupervisedTrainer,
    "dpo": PreferenceTrainer,
    "kto": JudgedTrainer,
    "cpt": SupervisedTrainer,
}


def build_trainer(
    config: TrainConfig,
    setup: Setup,
    inputs: Inputs,
    *,
    model: PreTrainedModel,
    rows: Dataset,
    eval_rows: Dataset | None,
    packing: bool,
    work_dir: Path,
) -> Any:
    """Build the method's trainer around the base model, with a new adapter.

    Args:
        config: The `train` section of the recipe.
        setup: Decisions of the run, and its plan.
        inputs: The base model and the dataset.
        model: The loaded base model.
        rows: Training rows, or packs of them.
        eval_rows: Evaluation rows, or packs of them. None: there are none.
        packing: Whether the rows are packs.
        work_dir: Directory for files that the libraries write.
    """
    method = inputs.manifest.method
    num_steps = num_total_steps(config, len(rows), setup.plan.global_batch_size)
    _log_steps(config, setup, len(rows), num_steps, packing)
    if method == "kto":
        log_balance(rows[LABEL], config.kto)
    arguments = training_arguments(
        config,
        setup,
        method=method,
        num_steps=num_steps,
        evaluates=eval_rows is not None,
        packing=packing,
        work_dir=work_dir,
        cache_reference=num_steps * setup.plan.global_batch_size > len(rows),
        deepspeed=_deepspeed_config(config, setup),
    )
    if arguments.n_gpu > 1:
        # If one rank sees several GPUs, transformers would split its batches over them.
        arguments._n_gpu = 1
    modules = adapted_modules(model, config.lora)
    peft_config = lora_config(config.lora, model)
    if setup.fused:
        use_kernels(model)
        fuse_model(model)
    # Any, as TRL's trainers and their mix-ins are typed more narrowly than they are used.
    trainer_class: Any = TRAINERS[method]
    with packs_are_trusted():
        trainer = trainer_class(
            model=model,
            args=arguments,
            train_dataset=rows,
            eval_dataset=eval_rows,
            processing_class=inputs.tokenizer,
            peft_config=peft_config,
        )
    attach_to_the_rest(trainer.model, modules)
    check_adapter_of_experts(config.lora, trainer.model)
    trainer.run_state.plan = setup.plan
    trainer.run_state.divides_optimizer = setup.divides_optimizer
    trainer.max_skipped_in_a_row = config.max_skipped_in_a_row
    return trainer


def packs_rows(config: TrainConfig, manifest: DatasetManifest, model: PreTrainedModel) -> bool:
    """Return whether rows are laid end to end; warn if the recipe asks for it in vain."""
    if not config.packs(manifest.method):
        return False
    # Rounding could make ranks disagree.
    reason = collectives.from_first(lambda: reason_not_to_pack(model))
    if reason:
        logger.warning("train.packing is off, and rows are padded instead: %s", reason)
    return not reason


def _log_steps(
    config: TrainConfig, setup: Setup, num_examples: int, num_steps: int, packing: bool
) -> None:
    """Log how many optimizer steps the run has, with advice if they are few."""
    size = setup.plan.global_batch_size
    logger.info(
        "%d %s in global batches of %d: %d optimizer steps",
        num_examples,
        "packs" if packing else "rows",
        size,
        num_steps,
    )
    if num_steps < FEW_STEPS and config.max_steps is None:
        logger.warning(
            "an adapter learns little in so few optimizer steps (%d): %s",
            num_steps,
            more_steps_advice(config, size, packing=packing),
        )


def _deepspeed_config(config: TrainConfig, setup: Setup) -> dict[str, Any] | None:
    """Return DeepSpeed's configuration, or None without ZeRO-2; warn about ignored settings."""
    if not setup.divides_optimizer:
        if config.offload_optimizer:
            logger.warning(
                "train.offload_optimizer has no effect: only a run on several GPUs can move the "
                "optimizer state to host memory"
            )
        return None
    if config.optim != setup.optimizer:
        logger.warning(
            "train.optim is %s but ZeRO-2 uses %s, whose state it divides over %d ranks",
            config.optim,
            setup.optimizer,
            setup.num_ranks,
        )
    return zero2.zero2_config(
        config,
        micro_batch_size=setup.plan.micro_batch_size,
        accumulation_steps=setup.accumulation_steps,
        num_ranks=setup.num_ranks,
        dtype=setup.dtype,
    )


def prepare_model(trainer: Any, config: TrainConfig, setup: Setup, base_model_dir: Path) -> str:
    """Prepare the model and the optimizer of a trainer; return a description of what was fused."""
    keep_adapter_in_fp32(trainer.model)
    keep_hidden_states_in(trainer.model, setup.dtype)
    if config.lora.init_lora_weights == "loftq":
        start_from_error(trainer.model, base_model_dir)
    # Every rank has read the frozen base from the same files, so DDP need not send it. The scales
    # of experts in 4 bits are buffers.
    trainer.model._ddp_params_and_buffers_to_ignore = [
        *(name for name, weight in trainer.model.named_parameters() if not weight.requires_grad),
        *(name for name, _ in trainer.model.named_buffers()),
    ]
    kernels = "off"
    if setup.fused:
        host_bytes = host_memory(collectives.num_ranks_here())
        if setup.plan.tables_on_host:
            host_bytes -= setup.table_bytes
        kernels = fuse_trainer(
            trainer,
            mode=config.kernels,
            kept_gib=setup.plan.kept_gib,
            # The other half is for the loader, checkpoints and the page cache.
            host_bytes=host_bytes // 2,
            tables_on_host=setup.plan.tables_on_host,
        )
    if config.embedding_learning_rate is not None:
        # The flat optimizer supports only one learning rate. Without it, the trainer creates
        # another optimizer, with two rates.
        trainer.optimizer = trainer.own_grad_norm = None
        trainer.embedding_rate = config.embedding_learning_rate
    return kernels
