"""The recipe's part for training an adapter."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tuneline.strict_model import StrictModel

ATTENTION_AND_MLP = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoraConfig(StrictModel):
    """The adapter. Terms and defaults as in peft.LoraConfig."""

    r: int = Field(16, ge=1, le=1024)
    """Rank."""
    lora_alpha: int = Field(16, ge=1)
    """The update is scaled by lora_alpha / r."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = ATTENTION_AND_MLP
    """Names of the linear layers to adapt."""
    modules_to_save: tuple[str, ...] = ()
    """Names of modules that are trained in full beside the adapter, such as embed_tokens and
    lm_head: 16 bytes of memory a parameter with AdamW. Not where those two are one matrix."""
    init_lora_weights: Literal["default", "loftq"] = "default"
    """default: the adapter adds nothing at first; loftq: it starts from what 4 bits lose of each
    weight. Not for method dpo, whose reference is the base without the adapter."""


class DpoConfig(StrictModel):
    """Used when the data set was prepared with method dpo."""

    beta: float = Field(0.1, gt=0)
    """Strength of the pull towards the reference model."""
    loss_type: str = "sigmoid"
    """As in trl.DPOConfig: sigmoid, hinge, ipo, robust, apo_zero and others."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of the preferences that are thought to be the wrong way round; exo_pair needs some."""
    cache_reference: bool | None = None
    """Score every pair by the base model once, before the first step, and not in each step; null:
    where the run comes by its rows more than once."""

    @model_validator(mode="after")
    def _loss_and_smoothing_agree(self) -> Self:
        if self.loss_type == "exo_pair" and not self.label_smoothing:
            raise ValueError(
                "dpo.loss_type exo_pair needs a label_smoothing above 0: its paper takes 0.001"
            )
        return self


class TrainConfig(StrictModel):
    """How the adapter is trained. The method is the data set's."""

    lora: LoraConfig = LoraConfig()
    dpo: DpoConfig = DpoConfig()
    load_in_4bit: bool = True
    """Keep the frozen base in NF4 with double quantisation."""
    learning_rate: Annotated[float, Field(gt=0)] | Literal["auto"] = 2e-4
    """auto: by method and number of rows, see `train.rates`."""
    embedding_learning_rate: float | None = Field(None, gt=0)
    """The highest rate of lora.modules_to_save; null: learning_rate. Continued pre-training on new
    words takes less for them than for the adapter, a half to a tenth."""
    lr_scheduler_type: str = "cosine"
    """As in transformers.TrainingArguments."""
    warmup_steps: int = Field(5, ge=0)
    warmup_ratio: float | None = Field(None, ge=0, le=1)
    """Share of all steps; given, it takes the place of warmup_steps."""
    num_train_epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, ge=1)
    """Given, it takes the place of num_train_epochs."""
    per_device_train_batch_size: int = Field(2, ge=1)
    """Rows, or packs of rows, a forward."""
    gradient_accumulation_steps: int = Field(4, ge=1)
    """Forwards a step, of all ranks together: a step has the same rows on any number of them."""
    num_ranks: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Processes that share the rows of every step, each with a GPU of its own; auto: as many as the
    step is given GPUs, and one on a CPU."""
    offload_optimizer: bool = False
    """Keep the optimizer's state in the host's memory; only several GPUs can."""
    packing: bool = True
    """Lay short rows end to end up to max_seq_length; they do not attend across each other."""
    optim: str = "adamw_8bit"
    """As in transformers.TrainingArguments."""
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(0.3, gt=0)
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, a quarter more time."""
    kernels: Literal["auto", "off", "fp8"] = "auto"
    """auto: our fused layers where the GPU can run them, which then choose what to recompute; fp8:
    their products in 8 bits too, a third faster and some 4 % off each (Hopper)."""
    fit: Literal["auto", "refuse", "off"] = "auto"
    """When memory is estimated to be short: auto takes fewer rows a forward and more forwards a
    step, then gradient_checkpointing, then what fit_min_length allows; refuse names the change and
    ends; off starts all the same. When it runs out, auto and refuse do so from the last checkpoint.
    """
    fit_min_length: int | None = Field(None, ge=8)
    """Packs may get as short as this, if no row is cut by it; null: they keep max_seq_length."""
    memory_gib: float | None = Field(None, gt=0)
    """Memory of a device that the run may take; null: what is free."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Compute type; auto: bfloat16 where the device is fast at it, else float32."""
    logging_steps: int = Field(1, ge=1)
    eval_steps: int | None = Field(None, ge=1)
    """Measure the evaluation loss so often; default: five times over the run."""
    early_stopping_patience: int | None = Field(3, ge=1)
    """End the run after so many evaluations in a row without a lower loss; null: never. The adapter
    with the lowest evaluation loss is kept in any case."""
    max_skipped_in_a_row: int = Field(3, ge=1)
    """A step whose loss or gradient is not finite is skipped; after so many in a row the run goes
    back to a checkpoint, with a lower rate."""
    sample_prompts: tuple[str, ...] | None = None
    """What the base and the tuned model are asked at the end; null: the first evaluation rows."""
    sample_tokens: int = Field(64, ge=0)
    """Length of those answers; 0: none are asked for."""
    track: tuple[Literal["mlflow", "wandb", "tensorboard"], ...] = ()
    """Report to these; where they are, their own environment variables say."""
    price_per_hour: float | None = Field(None, ge=0)
    """Of one device, GPU or machine, in your currency: the summary then has the run's cost."""
    checkpoint_minutes: float = Field(10.0, ge=0)
    """Time between checkpoints; 0: after every step. SIGTERM writes one in any case."""
    seed: int = 3407

    @model_validator(mode="after")
    def _lora_can_be_made(self) -> Self:
        if not self.lora.target_modules:
            raise ValueError("lora.target_modules is empty: name at least one, or 'all-linear'")
        if self.lora.init_lora_weights == "loftq" and not self.load_in_4bit:
            raise ValueError(
                "lora.init_lora_weights loftq makes up for what 4 bits lose, and load_in_4bit is "
                "false: take default, or load in 4 bits"
            )
        if self.embedding_learning_rate is not None and not self.lora.modules_to_save:
            raise ValueError(
                "embedding_learning_rate is of lora.modules_to_save, which names no module: add "
                "embed_tokens and lm_head there, or leave the rate out"
            )
        return self
