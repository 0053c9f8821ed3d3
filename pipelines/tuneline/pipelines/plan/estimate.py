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

MEASURED_PARAMETERS = 8.03e9
"""Parameters of Llama 3.1 8B, whose speeds were measured. The speed of another dense model is
inversely proportional to the number of its parameters."""
TOKENS_PER_SECOND = {"auto": 16_927.0, "fp8": 23_230.0}
"""Training speed by `train.kernels`, with fused layers that keep all activations: measured on an
H100 with 4 x 2048 tokens per step (docs/numbers.md). The speed of another GPU is this value times
`relative_speed`."""
LEAN_SLOWDOWN = 16_927 / 13_958
"""Slowdown of fused layers that keep only their inputs."""
PLAIN_TOKENS_PER_SECOND = 11_700.0
"""Training speed without fused layers, measured with PEFT on an H200, which has the same compute as
an H100 (702 ms per step of 4 x 2048 tokens)."""
RECOMPUTE_SLOWDOWN = 1.41
"""Slowdown by gradient checkpointing without fused layers: a step took 993 ms."""
EXPERTS_EFFICIENCY = 0.35
"""Speed per active parameter of a model with routed experts, relative to a dense model: many small
matrix products, and weights that few tokens share. Taken from the fastest published engine
(Qwen3-30B-A3B, 11,700 tokens per second on an H100, beside 15,000 of Llama 3.1 8B)."""

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
    least_gpu_bytes: float
    """GPU memory with a micro-batch of 1 and gradient checkpointing, which the train step uses if
    nothing else fits into memory."""
    artifact_bytes: float
    """Size of all artifacts of the run."""
    tokens_per_second: float | None
    """Training speed of one GPU; None if the placement profile has no GPU."""
    num_tokens: int | None
    """Tokens processed in training; None if the number depends on the dataset (`max_steps` is not
    set)."""
    num_gpus: int = 1
    """GPUs that train together, on all nodes."""
    num_active: float | None = None
    """Parameters that compute each token, if a router chooses experts; None: all of them do."""

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
    smallest = replace(settings, rows=1, recompute=True)
    base = 2 * num_parameters
    formats = [name for kind in EXPORT_KINDS for name in getattr(recipe.quantize, kind)]
    exports = sum(num_parameters * FORMATS[name].bits_per_weight / 8 for name in formats)
    f16 = base if recipe.quantize.gguf else 0.0
    has_experts = shape.experts is not None
    num_active = facts.num_active if facts is not None and has_experts else num_parameters
    speed = _speed(shape, settings, train, gpu) if gpu is not None else None
    if speed is not None:
        speed *= MEASURED_PARAMETERS / num_active * (EXPERTS_EFFICIENCY if has_experts else 1)
    num_tokens = None
    if train.max_steps is not None:
        sequences = batch.global_batch_size * (2 if prepare.method == "dpo" else 1)
        num_tokens = train.max_steps * sequences * length
    return Estimate(
        num_parameters=num_parameters,
        length=length,
        gpu_bytes=gpu_bytes,
        least_gpu_bytes=min(gpu_bytes, estimate_memory(shape, smallest).total),
        artifact_bytes=base * 2 + f16 + exports + 4 * shape.num_adapter,
        tokens_per_second=speed,
        num_tokens=num_tokens,
        num_gpus=gpus,
        num_active=num_active if has_experts else None,
    )


def _speed(shape: Shape, settings: Settings, train: TrainConfig, gpu: GpuProfile) -> float:
    """Return the tokens per second of Llama 3.1 8B on a GPU, with a run's settings.

    Fused layers keep as many activations as fit into the memory that is free; the time per token
    lies between those of all and of none.
    """
    if not settings.fused:
        slowdown = RECOMPUTE_SLOWDOWN if train.gradient_checkpointing else 1.0
        return gpu.relative_speed * PLAIN_TOKENS_PER_SECOND / slowdown
    least = estimate_memory(shape, settings)
    most = estimate_memory(shape, replace(settings, kept_bytes=int(1e15)))
    room = MEMORY_FRACTION * gpu.memory_bytes - least.total
    wanted = most.activations - least.activations
    share = min(1.0, max(0.0, room / wanted)) if wanted > 0 else 0.0
    slowdown = share + (1 - share) * LEAN_SLOWDOWN
    return gpu.relative_speed * TOKENS_PER_SECOND[train.kernels] / slowdown


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
    return Shape(
        num_layers=num_layers,
        hidden=width,
        query=width,
        key_value=width // 4,
        mlp=int(3.5 * width),
        vocab=VOCAB_SIZE,
        num_quantized=int(num_parameters - embedding),
        num_other=int(embedding),
        num_adapter=int(lora.r * num_layers * width * sides),
    )
