"""Estimate GPU memory, size and GPU time of a recipe, before anything is fetched.

The layers and widths of a model are those of `model_facts`. If only the number of parameters is
known, the model is assumed to be a Llama of that size. `train.memory.estimate` computes the GPU
memory, in the train step too. Memory and speed of the GPUs are in gpu_profiles.py.
"""

import re
from dataclasses import dataclass, replace

from tuneline.gpu_profiles import GPU_PROFILES, GpuProfile
from tuneline.kinds import EXPORT_KINDS
from tuneline.pipelines.plan.model_facts import ModelFacts
from tuneline.quantize.formats import FORMATS
from tuneline.recipe import Recipe
from tuneline.train.batch_size import batch_size
from tuneline.train.config import LoraConfig, TrainConfig
from tuneline.train.memory.estimate import (
    ZERO_OPTIMIZER,
    Settings,
    Shape,
    estimate_memory,
    shards_optimizer,
)


@dataclass(frozen=True)
class ExpertSpeed:
    """Two values for models with experts: for fused layers that keep only their inputs, and all."""

    lean: float
    full: float


MEASURED_PARAMETERS = 8.03e9
"""Parameters of Llama 3.1 8B, whose speeds were measured. The speed of another dense model is
inversely proportional to the number of its parameters."""
TOKENS_PER_SECOND = {"auto": 16_927.0, "fp8": 23_230.0}
"""Training speed by `train.kernels`, with fused layers that keep all activations: measured on an
H100 with 4 x 2048 tokens per step, without kept weights, which add 3 %. The speed of another GPU is
this value times `relative_speed`."""
LEAN_SLOWDOWN = 16_927 / 13_958
"""Slowdown of fused layers that keep only their inputs."""
PLAIN_TOKENS_PER_SECOND = 11_700.0
"""Training speed without fused layers, measured with PEFT on an H200, which has the same compute as
an H100 (702 ms per step of 4 x 2048 tokens)."""
RECOMPUTE_SLOWDOWN = 1.41
"""Slowdown by gradient checkpointing without fused layers: a step took 993 ms."""
IDLE_SECONDS = 1.79e-12
"""Seconds that a parameter of an expert adds to each micro-batch for the tokens that do not use it:
all experts of a layer are dequantised in the forward and in the backward pass, in 0.54 ms for 604
million parameters (kernels/benchmarks/results/experts_h100.csv)."""
ROUTING_SECONDS = {
    "experts": ExpertSpeed(lean=32.5e-12, full=26.1e-12),
    "attention": ExpertSpeed(lean=23.9e-12, full=19.6e-12),
}
"""Seconds that each number in the rows which a layer copies to experts adds, by where the adapter
is: on experts too, or only on attention. These are the values at which steps of Qwen3-30B-A3B take
as long as on an H100; those of Mixtral-8x7B are then within 6 % of the measured ones
(kernels/benchmarks/results/scaled_step_h100.csv)."""
UNFUSED_EXPERTS_SLOWDOWN = 16_970 / 7_357
"""Slowdown of transformers' own layers around the kernels for experts, relative to fused layers;
both recompute activations (call 1 of the same file)."""

MEMORY_FRACTION = 0.9
"""Largest fraction of a GPU's memory for which an estimate is "ok"."""

VOCAB_SIZE = 128_256
MAX_EMBEDDING_FRACTION = 0.3
"""Upper limit of the assumed fraction of all parameters that are in the embeddings. Two separate
matrices would exceed the limit in small models, whose input and output share one matrix."""
HEAD_DIM = 128
"""Assumed ratio of hidden width to number of layers: a Llama of 32 layers is 4096 wide."""
SIDES = {
    **dict.fromkeys(("q_proj", "o_proj"), 2.0),
    **dict.fromkeys(("k_proj", "v_proj"), 1.25),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), 4.5),
}
"""Number of inputs plus outputs of each linear layer, as a multiple of the hidden width."""
ASSUMED_LENGTH = 2048
"""Tokens per row assumed if prepare.max_seq_length is auto: its value then depends on the data."""


@dataclass(frozen=True)
class Estimate:
    """Estimate for one run; sizes are in bytes."""

    num_parameters: float
    length: int
    """Tokens per row."""
    gpu_bytes: float
    """GPU memory of training with the recipe's settings."""
    single_gpu_bytes: float
    """GPU memory with a micro-batch of 1 and gradient checkpointing."""
    least_gpu_bytes: float
    """The same with the input embedding and the head in host memory, if kernels can keep them
    there. The train step does so if nothing else fits into memory."""
    artifact_bytes: float
    """Size of all artifacts of the run."""
    tokens_per_second: float | None
    """Training speed of one GPU; None if the placement profile has no GPU."""
    num_tokens: int | None
    """Tokens processed in training; None if the number depends on the dataset (`max_steps` is not
    set)."""
    num_gpus: int = 1
    """GPUs that train together, on all nodes."""
    speed_note: str = ""
    """Why the speed is only a rough estimate, in words; empty if it follows from measured steps of
    the same kind of layers."""

    @property
    def gpu_hours(self) -> float | None:
        """GPU hours of training; None if the number of tokens or the speed is not known."""
        if self.num_tokens is None or self.tokens_per_second is None:
            return None
        return self.num_tokens / self.tokens_per_second / 3600

    @property
    def hours(self) -> float | None:
        """Hours of training, assuming that the speed is proportional to the number of GPUs."""
        return None if self.gpu_hours is None else self.gpu_hours / self.num_gpus


def parameters_in_name(name: str) -> float | None:
    """Return the number of parameters in a model's name, e.g. from "8B" or "135m", or None."""
    sizes = re.findall(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", name.lower())
    if not sizes:
        return None
    number, unit = sizes[-1]
    return float(number) * (1e9 if unit == "b" else 1e6)


def estimate(recipe: Recipe, num_parameters: float, facts: ModelFacts | None = None) -> Estimate:
    """Estimate a run of the recipe on the GPUs of its placement profile.

    Args:
        recipe: the recipe.
        num_parameters: parameters of the base model.
        facts: sizes of the base model; None: those of a Llama with as many parameters.
    """
    train, prepare = recipe.train, recipe.prepare
    length = ASSUMED_LENGTH if prepare.max_seq_length == "auto" else prepare.max_seq_length
    shape = facts.shape(train.lora) if facts else llama_shape(num_parameters, train.lora)
    gpu = GPU_PROFILES.get(recipe.placement.profile)
    gpus = max(1, recipe.placement.num_accelerators) * recipe.placement.num_nodes
    divides = shards_optimizer(train, gpus)
    is_fp32 = train.dtype == "auto" and gpu is not None and not gpu.has_bfloat16
    batch = batch_size(train, recipe.num_ranks)
    settings = Settings(
        rows=batch.micro_batch_size,
        length=length,
        recompute=train.gradient_checkpointing,
        quantized=train.load_in_4bit,
        itemsize=4 if train.dtype == "float32" or is_fp32 else 2,
        optim=ZERO_OPTIMIZER if divides else train.optim,
        method=prepare.method,
        loss="tiled",
        fused=train.kernels != "off" and gpu is not None and gpu.runs_kernels,
        fp8=train.kernels == "fp8",
        num_ranks=gpus if divides else 1,
    )
    gpu_bytes = estimate_memory(shape, settings).total
    single = replace(settings, rows=1, recompute=True)
    single_bytes = min(gpu_bytes, estimate_memory(shape, single).total)
    smallest = estimate_memory(shape, replace(single, tables_on_host=True))
    base = 2 * num_parameters
    formats = [name for kind in EXPORT_KINDS for name in getattr(recipe.quantize, kind)]
    exports = sum(num_parameters * FORMATS[name].bits_per_weight / 8 for name in formats)
    f16 = base if recipe.quantize.gguf else 0.0
    num_active = num_parameters if facts is None else facts.num_active
    seconds, note = None, ""
    if gpu is not None:
        seconds = _seconds_per_token(shape, settings, train, gpu, num_active) / gpu.relative_speed
        note = _note(facts, settings)
    num_tokens = None
    if train.max_steps is not None:
        sequences = batch.global_batch_size * (2 if prepare.method == "dpo" else 1)
        num_tokens = train.max_steps * sequences * length
    return Estimate(
        num_parameters=num_parameters,
        length=length,
        gpu_bytes=gpu_bytes,
        single_gpu_bytes=single_bytes,
        least_gpu_bytes=min(single_bytes, smallest.total),
        artifact_bytes=base * 2 + f16 + exports + 4 * shape.num_adapter,
        tokens_per_second=None if seconds is None else 1 / seconds,
        num_tokens=num_tokens,
        num_gpus=gpus,
        speed_note=note,
    )


def _seconds_per_token(
    shape: Shape, settings: Settings, train: TrainConfig, gpu: GpuProfile, num_active: float
) -> float:
    """Return the seconds per token of a run on an H100.

    Args:
        shape: shape of the base model.
        settings: settings that memory depends on.
        train: the `train` section of the recipe.
        gpu: the GPU whose memory decides how many activations fused layers keep.
        num_active: parameters that compute each token.
    """
    dense = num_active / MEASURED_PARAMETERS
    experts = shape.experts
    if experts is None and not (settings.fused and shape.is_fused):
        slowdown = RECOMPUTE_SLOWDOWN if train.gradient_checkpointing else 1.0
        return dense * slowdown / PLAIN_TOKENS_PER_SECOND
    if experts is None:
        kept = _kept_fraction(shape, settings, gpu)
        slowdown = kept + (1 - kept) * LEAN_SLOWDOWN
        return dense * slowdown / TOKENS_PER_SECOND[train.kernels]
    tokens = settings.rows * settings.length
    num_idle = (shape.num_quantized + shape.num_other - num_active) * IDLE_SECONDS / tokens
    num_copied = experts.num_layers * experts.top_k * shape.hidden
    routing = ROUTING_SECONDS["experts" if train.lora.experts else "attention"]
    # The experts are multiplied in bfloat16 in any case.
    full = dense / TOKENS_PER_SECOND["auto"]
    lean = full * LEAN_SLOWDOWN + num_idle + num_copied * routing.lean
    full += num_idle + num_copied * routing.full
    if settings.fused and shape.is_fused:
        kept = _kept_fraction(shape, settings, gpu)
        return kept * full + (1 - kept) * lean
    lean *= UNFUSED_EXPERTS_SLOWDOWN
    return lean if train.gradient_checkpointing else lean / RECOMPUTE_SLOWDOWN


def _kept_fraction(shape: Shape, settings: Settings, gpu: GpuProfile) -> float:
    """Return the fraction, 0 to 1, of activations that fused layers keep in the GPU's free memory.

    The time per token lies between those of all and of none, in proportion.
    """
    least = estimate_memory(shape, settings)
    most = estimate_memory(shape, replace(settings, kept_bytes=int(1e15)))
    room = MEMORY_FRACTION * gpu.memory_bytes - least.total
    wanted = most.activations - least.activations
    return min(1.0, max(0.0, room / wanted)) if wanted > 0 else 0.0


def _note(facts: ModelFacts | None, settings: Settings) -> str:
    """Return why a speed is rough, in words; "" if it is not."""
    if facts is not None and facts.has_linear_attention:
        return "at best: the time of its layers with linear attention was not measured"
    if facts is None or not settings.fused:
        has_experts = facts is not None and facts.experts is not None
        return "at best: experts without kernels were not measured" if has_experts else ""
    if facts.is_fused:
        return ""
    kernels = "experts and loss" if facts.experts is not None else "the loss"
    return f"roughly: kernels compute {kernels} of this family, transformers its layers"


def llama_shape(num_parameters: float, lora: LoraConfig) -> Shape:
    """Return the shape of a Llama of about that size; 8.03e9 gives the shape of Llama 3.1 8B."""
    embedding = 0.0
    for _ in range(8):
        linear = num_parameters - embedding
        # Weights per layer, divided by the squared width: 1 in each of q and o, 0.25 in each of k
        # and v, 3.5 in each of the three matrices of the MLP; 13 in total.
        num_layers = max(2, round((linear / (13 * HEAD_DIM**2)) ** (1 / 3)))
        width = HEAD_DIM * num_layers
        embedding = min(2.0 * VOCAB_SIZE * width, MAX_EMBEDDING_FRACTION * num_parameters)
    targets = SIDES if isinstance(lora.target_modules, str) else lora.target_modules
    sides = sum(SIDES.get(name, max(SIDES.values())) for name in targets)
    # Only embeddings are trained in full beside an adapter: embed_tokens, lm_head.
    num_saved = len(lora.modules_to_save) * embedding / 2
    num_copied = 0.0 if "lm_head" in lora.modules_to_save else embedding / 2
    return Shape(
        num_layers=num_layers,
        hidden=width,
        query=width,
        key_value=width // 4,
        mlp=int(3.5 * width),
        vocab=VOCAB_SIZE,
        num_quantized=int(num_parameters - embedding),
        num_other=int(embedding),
        num_adapter=int(lora.r * num_layers * width * sides + num_saved),
        num_tables=int(max(0.0, embedding - num_saved)),
        num_copied=int(num_copied),
    )
