"""The part of a recipe that describes training."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from tuneline.artifacts import PREFERENCE_METHODS, Method
from tuneline.strict_model import StrictModel
from tuneline.train.choices import check_optimizer, check_schedule

BATCH_KEYS = ("global_batch_size", "micro_batch_size")
UPSTREAM_BATCH_KEYS = ("per_device_train_batch_size", "gradient_accumulation_steps")
"""transformers' names for the batch size, which count per rank."""


class LoraConfig(StrictModel):
    """The LoRA adapter. Names are those of peft.LoraConfig."""

    r: int = Field(default=16, ge=1, le=1024)
    """Rank of the adapter: the inner dimension of its two matrices per layer. Its size, and the
    memory of its optimizer state, grow in proportion."""
    lora_alpha: int = Field(default=16, ge=1)
    """Scale of the adapter: its update B A is multiplied by lora_alpha / r."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability with which an input of the adapter is zeroed in training. 0 turns dropout off."""
    use_rslora: bool = False
    """Scale the adapter by lora_alpha / sqrt(r) instead of lora_alpha / r, which keeps the scale
    steady at high ranks."""
    target_modules: tuple[str, ...] | Literal["auto", "all-linear"] = "auto"
    """Linear layers that get an adapter. auto: those of attention, dense MLPs and shared experts;
    never routers, embeddings, the output layer, or encoders of images and sounds. all-linear: every
    linear layer but the output layer. Or a list of names: whole module names, or their last parts,
    such as [q_proj, v_proj]."""
    experts: bool = False
    """Whether the routed experts of a mixture-of-experts model get an adapter too: one of rank r
    per expert. Routers never get one. It multiplies the size of the adapter: at r = 16, that of
    Qwen3-30B-A3B has 643 million parameters. Needs lora_dropout 0."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that are trained in full beside the adapter, such as embed_tokens and lm_head. They
    take 16 bytes of memory per parameter with AdamW. Not supported for embed_tokens and lm_head
    of models with tied embeddings. Default: none."""
    init_lora_weights: Literal["default", "loftq"] = "default"
    """Initial weights. default: the adapter changes nothing at first. loftq: the adapter starts as
    an approximation of the error that 4-bit quantisation makes in each weight; not for the methods
    dpo and kto, whose reference is the base model without the adapter."""


class DpoConfig(StrictModel):
    """Direct preference optimisation. Used only if the dataset was prepared with method dpo."""

    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull towards the reference model: a higher beta stays closer to it."""
    loss_type: str = "sigmoid"
    """Loss, as in trl.DPOConfig: sigmoid, hinge, ipo, robust, apo_zero and others."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed fraction of preferences whose chosen and rejected answers are swapped. loss_type
    exo_pair needs a value above 0."""
    cache_reference: bool | None = None
    """Compute the reference model's log-probabilities of every pair once, before the first step,
    instead of in each step. null: do so if the run sees its examples more than once."""

    @model_validator(mode="after")
    def _loss_and_smoothing_agree(self) -> Self:
        if self.loss_type == "exo_pair" and not self.label_smoothing:
            raise ValueError(
                "dpo.loss_type exo_pair needs a label_smoothing above 0: its paper uses 0.001"
            )
        return self


class KtoConfig(StrictModel):
    """Kahneman-Tversky optimisation. Used only if the dataset was prepared with method kto."""

    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull towards the reference model: a higher beta stays closer to it."""
    desirable_weight: float = Field(default=1.0, gt=0)
    """Factor of the loss of desirable answers. If one kind of answer is rarer, weights balance the
    two: desirable_weight x desirable answers should be 1 to 1.33 times undesirable_weight x
    undesirable answers."""
    undesirable_weight: float = Field(default=1.0, gt=0)
    """Factor of the loss of undesirable answers."""
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    """Loss, as in trl.KTOConfig. kto compares with the mean likelihood of mismatched answers, which
    takes two more forward passes; apo_zero_unpaired does not, and raises desirable answers."""


class TrainConfig(StrictModel):
    """How the adapter is trained. `prepare.method` selects the training method."""

    lora: LoraConfig = LoraConfig()
    """The adapter: its size, and the layers that it is attached to. Names are those of
    peft.LoraConfig."""
    dpo: DpoConfig = DpoConfig()
    """Settings of method dpo; other methods ignore them."""
    kto: KtoConfig = KtoConfig()
    """Settings of method kto; other methods ignore them."""
    load_in_4bit: bool = True
    """Hold the frozen base model in NF4 with double quantisation (QLoRA). false: hold it in the
    compute type, which takes about four times the memory."""
    learning_rate: Annotated[float, Field(gt=0)] | Literal["auto"] = 2e-4
    """Highest learning rate of the schedule. auto: by method and number of rows: 5e-7 for dpo, 1e-6
    for kto, 2e-5 for cpt, and for sft 7e-5 below 1,000 rows, 2e-4 below 100,000, else 1e-4."""
    embedding_learning_rate: float | None = Field(default=None, gt=0)
    """Highest learning rate of lora.modules_to_save. null: learning_rate. Continued pre-training on
    new vocabulary usually takes a half to a tenth of the adapter's rate."""
    lr_scheduler_type: str = "cosine"
    """Learning-rate schedule after warm-up, as in transformers.TrainingArguments: cosine, linear,
    polynomial, constant, constant_with_warmup, inverse_sqrt, cosine_with_restarts,
    cosine_with_min_lr, cosine_warmup_with_min_lr or warmup_stable_decay."""
    lr_scheduler_kwargs: dict[str, int | float | str] = Field(default_factory=dict)
    """Settings of the schedule, as in transformers.TrainingArguments, e.g. {min_lr_rate: 0.1} for
    cosine_with_min_lr, or {num_decay_steps: 100} for warmup_stable_decay."""
    warmup_steps: int = Field(default=5, ge=0)
    """Optimizer steps in which the learning rate rises linearly, none of them at a rate of 0. A run
    that has no more steps than this uses half of its steps."""
    warmup_ratio: float | None = Field(default=None, ge=0, le=1)
    """Fraction of all optimizer steps used for warm-up. If set, it replaces warmup_steps."""
    num_train_epochs: float = Field(default=1.0, gt=0)
    """Passes over the training data; may be a fraction."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps of the run. If set, it replaces num_train_epochs."""
    global_batch_size: int = Field(default=8, ge=1)
    """Examples per optimizer step, over all ranks together. With packing an example is a pack. Each
    step uses the same examples on any number of ranks; the number of ranks must divide this
    value."""
    micro_batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = 2
    """Highest number of examples per forward and backward pass on one rank. It affects memory and
    speed, but not the result. A rank's part of the global batch is cut into equal micro-batches:
    6 examples with a micro_batch_size of 4 are two passes of 3. auto: the whole part, or the
    largest divisor of it whose estimated memory fits; 1 if no estimate can be made. With fused
    kernels a smaller micro-batch may be faster, because more memory is left for activations."""
    per_device_train_batch_size: int | None = Field(
        default=None, ge=1, json_schema_extra={"deprecated": True}
    )
    """Deprecated: set micro_batch_size. As in transformers: examples per micro-batch on each rank.
    global_batch_size is then per_device_train_batch_size x gradient_accumulation_steps x ranks, and
    depends on the number of ranks. null: 2 if gradient_accumulation_steps is set. Cannot be
    combined with global_batch_size or micro_batch_size."""
    gradient_accumulation_steps: int | None = Field(
        default=None, ge=1, json_schema_extra={"deprecated": True}
    )
    """Deprecated: set global_batch_size. As in transformers: micro-batches per optimizer step on
    each rank. null: 4 if per_device_train_batch_size is set. Cannot be combined with
    global_batch_size or micro_batch_size."""
    num_ranks: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Training processes, each with a device of its own, that divide every global batch. auto: one
    per GPU that the step is given, and one on a CPU."""
    sharding: Literal["auto", "ddp", "zero2"] = "auto"
    """What several GPUs hold. ddp: every GPU has the whole optimizer state. zero2: DeepSpeed's
    ZeRO-2 shards gradients and optimizer state over the GPUs, and any AdamW becomes adamw_torch.
    auto: zero2 if lora.modules_to_save or offload_optimizer is set, else ddp, because the state of
    an adapter is small: for an 8B model, zero2 saves 0.25 of 34 GiB and takes 6 % more time."""
    offload_optimizer: bool = False
    """Hold the optimizer state in host memory, which needs zero2. Has an effect only with two or
    more GPUs."""
    packing: bool = True
    """Lay short examples end to end in packs of max_seq_length tokens. Examples of a pack do not
    attend to each other; if the model cannot keep them apart, e.g. because it has recurrent layers,
    examples are not packed. No effect on the methods dpo and kto."""
    optim: str = "adamw_8bit"
    """Optimizer, as in transformers.TrainingArguments: adamw_8bit, adamw_torch, adafactor,
    lion_8bit, sgd, paged_adamw_8bit and others of PyTorch, transformers and bitsandbytes."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay of the optimizer."""
    max_grad_norm: float = Field(default=0.3, gt=0)
    """Gradient clipping: the largest L2 norm of the gradients."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass instead of keeping them: less memory, about a
    quarter more time. Fused layers ignore this key and keep as many activations as fit."""
    kernels: Literal["auto", "off", "fp8"] = "auto"
    """Fused layers. auto: use them if the GPU can (Ampere or newer). off: never use them. fp8: also
    compute their matrix products in 8 bits: steps are 1.4 times as fast, and each product has an
    error of about 4 % (Hopper or newer)."""
    fit: Literal["auto", "refuse", "off"] = "auto"
    """What to do if the estimated memory exceeds what is available. auto: use smaller
    micro-batches, then gradient_checkpointing, then keep the input embedding and the head in host
    memory if fused layers run, then the shorter packs that fit_min_length allows. refuse: end with
    an error that names these changes. off: start anyway. If memory runs out during training, auto
    and refuse continue from the last checkpoint with the same changes in this order, but packs keep
    their length; off ends the run."""
    fit_min_length: int | None = Field(default=None, ge=8)
    """Shortest packs, in tokens, that `fit` may use. Packs never become shorter than the longest
    row. null: packs keep max_seq_length."""
    memory_gib: float | None = Field(default=None, gt=0)
    """Memory per device that the run may take, in GiB. null: all memory that is free."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Compute type. auto: bfloat16 if the device has instructions for it, else float32."""
    logging_steps: int = Field(default=1, ge=1)
    """Optimizer steps between two logged values of the loss."""
    eval_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps between two evaluations. null: five evaluations over the run."""
    early_stopping_patience: int | None = Field(default=3, ge=1)
    """Number of consecutive evaluations without a lower evaluation loss after which the run ends.
    null: the run never ends early. The adapter with the lowest evaluation loss is kept in any
    case."""
    max_skipped_in_a_row: int = Field(default=3, ge=1)
    """Number of consecutive skipped steps (loss or gradient not finite) after which the run returns
    to the last checkpoint with a lower learning rate. It does so at most twice."""
    sample_prompts: tuple[str, ...] | None = None
    """Prompts that the base and the tuned model answer at the end, for the report. null: those of
    the first evaluation rows."""
    sample_tokens: int = Field(default=64, ge=0)
    """Highest number of tokens per sample answer. 0: no sample answers."""
    track: tuple[Literal["mlflow", "wandb", "tensorboard"], ...] = ()
    """Experiment trackers to report to. Each reads its usual environment variables (e.g.
    WANDB_API_KEY); see placement.secrets."""
    price_per_hour: float | None = Field(default=None, ge=0)
    """Price of one GPU (or of the machine, without GPUs) per hour, in any currency. If set, the
    training summary contains the cost of the run."""
    max_cost: float | None = Field(default=None, gt=0)
    """Largest cost of training, at price_per_hour, over all attempts of the run. Training stops at
    the first optimizer step that reaches it, with a checkpoint from which a run with a higher
    max_cost continues. Time before the first step is not counted. `tuneline plan` compares it with
    its estimate. null: no limit."""
    max_restarts: int = Field(default=3, ge=0)
    """How often the step continues from its last checkpoint in new processes after a rank died, or
    failed with an error of the GPU, its driver or the connection between ranks. An error that comes
    again at the same optimizer step ends the run. 0: any such error ends the run."""
    checkpoint_minutes: float = Field(default=10.0, ge=0)
    """Minutes between two checkpoints, and so the most work that is lost if a pod disappears or a
    run is cancelled. 0: write one after every step. Where a process has time to end, as on one
    machine, one is also written on SIGTERM."""
    seed: int = 3407
    """Seed of the adapter's initial weights, the order of examples, and dropout."""

    @property
    def uses_upstream_batch_keys(self) -> bool:
        """Whether the batch size is given by transformers' names, per rank."""
        return any(getattr(self, key) is not None for key in UPSTREAM_BATCH_KEYS)

    def packs(self, method: Method) -> bool:
        """Return whether rows of a method are laid end to end, if the model keeps them apart."""
        return self.packing and method not in PREFERENCE_METHODS

    @field_validator("optim")
    @classmethod
    def _optimizer_is_there(cls, name: str) -> str:
        check_optimizer(name)
        return name

    @model_validator(mode="after")
    def _schedule_is_complete(self) -> Self:
        check_schedule(self.lr_scheduler_type, self.lr_scheduler_kwargs)
        return self

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        if not self.lora.target_modules:
            raise ValueError("lora.target_modules is empty: name at least one, or 'auto'")
        if self.max_cost is not None and not self.price_per_hour:
            raise ValueError(
                f"max_cost is {self.max_cost:g}, but without price_per_hour no cost is known: set "
                "price_per_hour to the price of one GPU per hour, or remove max_cost"
            )
        if self.lora.experts and self.lora.lora_dropout:
            raise ValueError(
                f"lora.experts is true but lora.lora_dropout is {self.lora.lora_dropout}: peft has "
                "no dropout for adapters of experts; set lora_dropout to 0, or experts to false"
            )
        if self.lora.experts and self.lora.init_lora_weights == "loftq":
            raise ValueError(
                "lora.init_lora_weights loftq has no method for experts: set it to default, or "
                "lora.experts to false"
            )
        if self.lora.init_lora_weights == "loftq" and not self.load_in_4bit:
            raise ValueError(
                "lora.init_lora_weights loftq corrects the error of 4-bit weights, but "
                "load_in_4bit is false: set init_lora_weights to default, or load_in_4bit to true"
            )
        if self.embedding_learning_rate is not None and not self.lora.modules_to_save:
            raise ValueError(
                "embedding_learning_rate is the rate of lora.modules_to_save, which is empty: add "
                "embed_tokens and lm_head there, or remove embedding_learning_rate"
            )
        if self.sharding == "ddp" and self.offload_optimizer:
            raise ValueError(
                "offload_optimizer needs ZeRO-2, but sharding is ddp: set sharding to auto or zero2"
            )
        if self.sharding == "zero2" and "adamw" not in self.optim:
            raise ValueError(
                f"sharding zero2 needs a variant of AdamW, but optim is {self.optim}: set optim to "
                "adamw_torch, or sharding to auto or ddp"
            )
        return self

    @model_validator(mode="after")
    def _batch_size_is_given_once(self) -> Self:
        new = [key for key in BATCH_KEYS if key in self.model_fields_set]
        upstream = [key for key in UPSTREAM_BATCH_KEYS if getattr(self, key) is not None]
        if new and upstream:
            raise ValueError(
                f"{' and '.join(new)} and transformers' {' and '.join(upstream)} both set the "
                f"batch size: remove {' and '.join(upstream)}"
            )
        if self.micro_batch_size == "auto" and self.fit == "off":
            raise ValueError(
                "micro_batch_size auto uses the estimate that fit: off ignores: set "
                "micro_batch_size to a number, or fit to auto or refuse"
            )
        return self

    @model_serializer(mode="wrap")
    def _only_the_batch_keys_in_use(
        self, serialize: SerializerFunctionWrapHandler
    ) -> dict[str, Any]:
        """Leave out the batch keys that mean nothing, so that a saved config can be read again."""
        unused = BATCH_KEYS if self.uses_upstream_batch_keys else UPSTREAM_BATCH_KEYS
        return {key: value for key, value in serialize(self).items() if key not in unused}
