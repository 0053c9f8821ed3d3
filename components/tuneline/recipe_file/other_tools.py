"""The names that other tools have for the keys of a recipe.

The table leads a person who knows Axolotl, LLaMA-Factory, Unsloth, TRL, PEFT or transformers to the
key of a recipe. A name that a recipe has too, such as learning_rate, is not in it: such a key is
led home by its place.
"""

from collections.abc import Iterable
from dataclasses import dataclass

AXOLOTL, LLAMA_FACTORY, UNSLOTH = "Axolotl", "LLaMA-Factory", "Unsloth"
TRANSFORMERS, TRL, PEFT = "transformers", "TRL", "PEFT"

_MIN_NAMES = 4
"""Number of a tool's names at the top of a file from which the file counts as a config of the
tool."""


@dataclass(frozen=True)
class Foreign:
    """What a recipe has instead of a key of another tool."""

    tools: tuple[str, ...]
    """The tools that have the key, the best known first."""
    keys: tuple[str, ...] = ()
    """Dotted keys of a recipe; empty if a recipe needs none. datasets[0] is any dataset."""
    remark: str = ""
    """How the values differ, or why a recipe needs no such key."""

    @property
    def advice(self) -> str:
        """Return what to do with the key, e.g. set train.lora.r."""
        if not self.keys:
            return self.remark
        return f"set {' and '.join(self.keys)}{f' ({self.remark})' if self.remark else ''}"


def _table() -> Iterable[tuple[str, Foreign]]:
    def add(
        names: str, tools: tuple[str, ...] | str, keys: str = "", remark: str = ""
    ) -> Iterable[tuple[str, Foreign]]:
        owners = (tools,) if isinstance(tools, str) else tools
        foreign = Foreign(owners, tuple(keys.split()), remark)
        return [(name, foreign) for name in names.split()]

    everywhere = (TRANSFORMERS, AXOLOTL, LLAMA_FACTORY)
    factory_or_hf = (LLAMA_FACTORY, TRANSFORMERS)
    automatic = "leave it out: the line decides this itself"

    # Model and data.
    yield from add("model_name_or_path", (LLAMA_FACTORY, TRL), "base_model")
    yield from add("model_name model_id model", (UNSLOTH, TRL), "base_model")
    yield from add(
        "revision_of_model model_revision", (TRL, LLAMA_FACTORY, AXOLOTL), "fetch.revision"
    )
    yield from add("path", AXOLOTL, "datasets[0].source")
    yield from add("type", AXOLOTL, "datasets[0].format datasets[0].columns")
    yield from add("ds_type field_messages", AXOLOTL, "datasets[0].columns")
    yield from add("dataset_name train_file", (TRL, TRANSFORMERS), "dataset")
    yield from add("dataset_dir", LLAMA_FACTORY, "dataset", "name the file or directory itself")
    yield from add("dataset_config_name dataset_config", (TRL, TRANSFORMERS), "prepare.subset")
    yield from add("dataset_text_field", (UNSLOTH, TRL), "prepare.columns", "{text: COLUMN}")
    yield from add("test_datasets eval_dataset", (AXOLOTL, LLAMA_FACTORY), "prepare.heldout.source")
    yield from add(
        "val_set_size val_size",
        (AXOLOTL, LLAMA_FACTORY),
        "prepare.eval_share",
        "a fraction of the rows",
    )
    yield from add("max_samples max_train_samples", factory_or_hf, "prepare.max_rows")
    yield from add("sequence_len", AXOLOTL, "prepare.max_seq_length")
    yield from add("cutoff_len", LLAMA_FACTORY, "prepare.max_seq_length")
    yield from add("max_length max_prompt_length", TRL, "prepare.max_seq_length")
    yield from add("chat_template", AXOLOTL, "prepare.template")
    yield from add(
        "default_system_message default_system", (AXOLOTL, LLAMA_FACTORY), "prepare.system_prompt"
    )
    yield from add(
        "train_on_inputs train_on_prompt mask_history", (AXOLOTL, LLAMA_FACTORY), "prepare.loss_on"
    )
    yield from add(
        "assistant_only_loss completion_only_loss train_on_responses_only",
        (TRL, UNSLOTH),
        "prepare.loss_on",
    )
    yield from add("enable_thinking", LLAMA_FACTORY, "prepare.thinking")
    yield from add("stage", LLAMA_FACTORY, "prepare.method", "sft, dpo, kto or cpt; pt is cpt")
    yield from add("rl", AXOLOTL, "prepare.method")

    # The adapter.
    yield from add(
        "adapter finetuning_type",
        (AXOLOTL, LLAMA_FACTORY),
        "train.load_in_4bit",
        "training is always LoRA: true is QLoRA, false is LoRA on 16-bit weights",
    )
    yield from add("lora_r", AXOLOTL, "train.lora.r")
    yield from add("lora_rank rank", (LLAMA_FACTORY, UNSLOTH), "train.lora.r")
    yield from add("alpha", PEFT, "train.lora.lora_alpha")
    yield from add("dropout", PEFT, "train.lora.lora_dropout")
    yield from add("lora_target_modules", AXOLOTL, "train.lora.target_modules")
    yield from add("lora_target", LLAMA_FACTORY, "train.lora.target_modules")
    yield from add("lora_target_linear", AXOLOTL, "train.lora.target_modules", "all-linear")
    yield from add("lora_modules_to_save", AXOLOTL, "train.lora.modules_to_save")
    yield from add("additional_target", LLAMA_FACTORY, "train.lora.modules_to_save")
    yield from add("peft_use_rslora", AXOLOTL, "train.lora.use_rslora")
    yield from add(
        "loftq_config loftq_init", (UNSLOTH, LLAMA_FACTORY), "train.lora.init_lora_weights"
    )
    yield from add(
        "load_in_8bit", (AXOLOTL, TRANSFORMERS), "train.load_in_4bit", "there are no 8-bit bases"
    )
    yield from add("quantization_bit", LLAMA_FACTORY, "train.load_in_4bit", "true is 4")
    yield from add("bnb_config quantization_config", TRANSFORMERS, "train.load_in_4bit")

    # Training.
    yield from add("lr", TRANSFORMERS, "train.learning_rate")
    yield from add("num_epochs epochs", (AXOLOTL, TRANSFORMERS), "train.num_train_epochs")
    yield from add("optimizer", AXOLOTL, "train.optim")
    yield from add("lr_scheduler scheduler", AXOLOTL, "train.lr_scheduler_type")
    yield from add("embedding_lr", AXOLOTL, "train.embedding_learning_rate")
    yield from add(
        "gradient_accumulation_steps",
        (TRANSFORMERS, AXOLOTL, LLAMA_FACTORY, UNSLOTH),
        "train.global_batch_size",
        "examples per optimizer step, over all GPUs together",
    )
    yield from add("per_device_train_batch_size", everywhere, "train.micro_batch_size")
    yield from add("batch_size", TRANSFORMERS, "train.global_batch_size")
    yield from add("bf16 fp16 torch_dtype pure_bf16", everywhere, "train.dtype")
    yield from add("sample_packing neat_packing", (AXOLOTL, LLAMA_FACTORY), "train.packing")
    yield from add("use_gradient_checkpointing", UNSLOTH, "train.gradient_checkpointing")
    yield from add("random_state", UNSLOTH, "train.seed")
    yield from add("pref_beta", LLAMA_FACTORY, "train.dpo.beta")
    yield from add("pref_loss", LLAMA_FACTORY, "train.dpo.loss_type")
    yield from add(
        "save_steps save_strategy saves_per_epoch",
        everywhere,
        "train.checkpoint_minutes",
        "in minutes",
    )
    yield from add(
        "evals_per_epoch eval_strategy evaluation_strategy",
        everywhere,
        "train.eval_steps",
        "in steps",
    )
    yield from add("deepspeed", everywhere, "train.sharding train.offload_optimizer")
    yield from add(
        "enable_liger_kernel use_liger_kernel use_unsloth liger_rope",
        (LLAMA_FACTORY, AXOLOTL, TRL),
        "train.kernels",
    )
    yield from add(
        "report_to use_wandb wandb_project use_mlflow", (TRANSFORMERS, AXOLOTL), "train.track"
    )
    yield from add("hub_model_id", (TRANSFORMERS, AXOLOTL), "publish_to")
    yield from add("hub_private_repo", TRANSFORMERS, "publish.private")
    yield from add(
        "quantization_method export_quantization_bit",
        (UNSLOTH, LLAMA_FACTORY),
        "quantize.gguf quantize.gptq quantize.awq quantize.fp8",
    )
    yield from add("lm_eval_tasks task", (AXOLOTL, LLAMA_FACTORY), "evaluate.tasks")

    yield from add(
        "wandb_name wandb_entity wandb_watch wandb_log_model wandb_run_id wandb_mode",
        AXOLOTL,
        "train.track",
        "wandb; the rest is read from the variables WANDB_...",
    )
    yield from add("use_tensorboard mlflow_tracking_uri", AXOLOTL, "train.track")
    yield from add(
        "lora_mlp_kernel lora_qkv_kernel lora_o_kernel liger_rms_norm liger_glu_activation "
        "liger_layer_norm liger_fused_linear_cross_entropy cut_cross_entropy use_kernels",
        AXOLOTL,
        "train.kernels",
    )
    yield from add("max_packed_sequence_len", AXOLOTL, "prepare.max_seq_length")
    yield from add("pretraining_dataset", AXOLOTL, "dataset prepare.method", "cpt")
    yield from add("train_dataset", LLAMA_FACTORY, "dataset")
    yield from add("peft_config", LLAMA_FACTORY, "train.lora")
    yield from add("quant_config", LLAMA_FACTORY, "train.load_in_4bit")
    yield from add(
        "activation_checkpointing disable_gradient_checkpointing activation_offloading",
        (TRANSFORMERS, AXOLOTL, LLAMA_FACTORY),
        "train.gradient_checkpointing",
    )
    yield from add("data_seed", TRANSFORMERS, "prepare.seed")
    yield from add(
        "cosine_min_lr_ratio cosine_constant_lr_ratio eta_min",
        AXOLOTL,
        "train.lr_scheduler_type train.lr_scheduler_kwargs",
        "cosine_with_min_lr, {min_lr_rate: RATIO}",
    )

    # What a recipe needs no key for.
    yield from add(
        "output_dir run_name overwrite_output_dir export_dir",
        everywhere,
        remark="leave it out: `tuneline run` writes to runs/NAME-TIME, or below --runs-dir",
    )
    yield from add(
        "do_train do_eval do_predict save_method model_type tokenizer_type processor_type "
        "is_llama_derived_model",
        (LLAMA_FACTORY, AXOLOTL, TRANSFORMERS),
        remark=automatic,
    )
    yield from add(
        "flash_attention flash_attn sdp_attention xformers_attention attn_implementation "
        "tf32 pad_to_sequence_len group_by_length torch_compile fsdp fsdp_config "
        "dataloader_num_workers dataloader_pin_memory preprocessing_num_workers dataset_num_proc "
        "overwrite_cache remove_unused_columns dataset_prepared_path ddp_timeout plot_loss "
        "eval_sample_packing special_tokens tokens strict debug save_total_limit save_only_model "
        "save_safetensors "
        "gradient_checkpointing_kwargs resume_from_checkpoint auto_resume_from_checkpoints "
        "load_best_model_at_end metric_for_best_model greater_is_better eval_batch_size "
        "plugins skip_prepare_dataset fsdp_version ddp_find_unused_parameters local_rank "
        "lora_model_dir adapter_name_or_path eot_tokens "
        "per_device_eval_batch_size logging_dir logging_strategy warmup_style",
        (TRANSFORMERS, AXOLOTL, LLAMA_FACTORY),
        remark=automatic,
    )
    yield from add(
        "task_type inference_mode bias fan_in_fan_out full_finetuning quantization_type",
        (PEFT, UNSLOTH),
        remark="leave it out: training is always LoRA of a causal language model",
    )
    yield from add(
        "push_to_hub hf_use_auth_token hub_token hub_strategy use_auth_token hf_token",
        (TRANSFORMERS, AXOLOTL),
        remark="leave it out: publish_to names the repository, and HF_TOKEN holds the token",
    )
    yield from add(
        "neftune_noise_alpha noisy_embedding_alpha adam_beta1 adam_beta2 adam_epsilon "
        "label_smoothing_factor lora_plus_lr_ratio loraplus_lr_ratio use_dora lora_use_dora "
        "use_galore use_badam",
        (TRANSFORMERS, AXOLOTL, LLAMA_FACTORY),
        remark="leave it out: tuneline has no such setting",
    )


FOREIGN_KEYS: dict[str, Foreign] = dict(_table())
"""Name of a key of another tool -> what a recipe has instead."""


def foreign_key(name: str) -> Foreign | None:
    """Return what a recipe has instead of a key of another tool; None if no tool has such a key."""
    return FOREIGN_KEYS.get(name.replace("-", "_").lower())


def tool_of(names: Iterable[str]) -> str | None:
    """Return the tool that a file with these top-level keys is for; None if no tool stands out."""
    counts: dict[str, int] = {}
    for name in names:
        foreign = foreign_key(name)
        for tool in foreign.tools if foreign is not None else ():
            counts[tool] = counts.get(tool, 0) + 1
    best = max(counts, key=lambda tool: counts[tool], default=None)
    return best if best is not None and counts[best] >= _MIN_NAMES else None
