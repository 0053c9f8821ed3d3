"""Estimate GPU memory, disk and GPU time of a recipe, before anything is fetched.

All that is known of a model here is its number of parameters, so its layers and widths are taken
to be those of a Llama of that size. The memory is then what `train.memory` computes, the same that
the train step goes by when it has the model's own config.
"""

import re
from dataclasses import dataclass, replace

from tuneline.placement import FUSED, Profile
from tuneline.recipe import Recipe
from tuneline.train.batch_size import batch_size
from tuneline.train.config import LoraConfig
from tuneline.train.memory.estimate import GIB, Settings, Shape, estimate_memory

GPU_BYTES: dict[Profile, float] = {
    "t4": 14.6 * GIB,
    "a10g": 22.1 * GIB,
    "a100-40g": 39.4 * GIB,
    "a100-80g": 79.2 * GIB,
    "h100": 79.1 * GIB,
}
"""What a process can have of such a GPU."""

RELATIVE_SPEED: dict[Profile, float] = {
    # Dense TFLOP/s of the type that `dtype: auto` takes, by data sheet, against an H100's 989. A T4
    # knows no bfloat16 and computes in fp32.
    "t4": 8.1 / 989,
    "a10g": 70 / 989,
    "a100-40g": 312 / 989,
    "a100-80g": 312 / 989,
    "h100": 1.0,
}
TOKENS_PER_SECOND_8B = 11_700.0
"""PEFT, 4 x 2048 tokens, H200 (702 ms a step); other sizes by 1 / parameters."""
RECOMPUTE_SLOWDOWN = 1.41
"""993 ms against 702, the same place."""

VOCAB_SIZE = 128_256
MAX_EMBEDDING_SHARE = 0.3
"""Of all parameters, where a small model ties input and output."""
HEAD_DIM = 128
"""Width a layer: a Llama of 32 layers is 4096 wide."""
SIDES = {
    **dict.fromkeys(("q_proj", "o_proj"), 2.0),
    **dict.fromkeys(("k_proj", "v_proj"), 1.25),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), 4.5),
}
"""Inputs and outputs of a linear layer, in widths of the model."""
ZERO_OPTIMIZER = "adamw_torch"
"""What several GPUs divide (train.zero2)."""
ASSUMED_LENGTH = 2048
"""Where max_seq_length is auto, which only the data decides."""
BITS = {"f16": 16.0, "bf16": 16.0, "q8_0": 8.5, "q6_k": 6.6, "q5_k_m": 5.7, "q4_k_m": 4.9}
"""Of a weight, where hidden sizes are multiples of 256."""
DEFAULT_BITS = 5.5


@dataclass(frozen=True)
class Estimate:
    """Of one run; sizes in bytes."""

    num_parameters: float
    length: int
    gpu_bytes: float
    least_gpu_bytes: float
    """The same with micro-batches of 1 and recomputed activations, the least that train can use."""
    artifact_bytes: float
    """All that the run keeps."""
    scratch_bytes: float
    """The most that one step has on its disk."""
    tokens_per_second: float | None
    """Of one GPU; None without one."""
    num_tokens: int | None
    """That training sees; None where only the data says."""
    num_gpus: int = 1
    """That share its steps."""

    @property
    def gpu_hours(self) -> float | None:
        """Of the training, on all GPUs together; None where tokens or speed are not known."""
        if self.num_tokens is None or self.tokens_per_second is None:
            return None
        return self.num_tokens / self.tokens_per_second / 3600

    @property
    def hours(self) -> float | None:
        """Of the training, if all GPUs are as fast together as one after another."""
        return None if self.gpu_hours is None else self.gpu_hours / self.num_gpus


def parameters_in_name(name: str) -> float | None:
    """Read "8B" or "135m" off a model's name."""
    found = re.findall(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", name.lower())
    if not found:
        return None
    number, unit = found[-1]
    return float(number) * (1e9 if unit == "b" else 1e6)


def estimate(recipe: Recipe, num_parameters: float) -> Estimate:
    """Estimate a run of the recipe on the GPUs of its placement's profile."""
    train, prepare = recipe.train, recipe.prepare
    length = ASSUMED_LENGTH if prepare.max_seq_length == "auto" else prepare.max_seq_length
    shape = llama_shape(num_parameters, train.lora)
    profile, gpus = recipe.placement.profile, max(1, recipe.placement.num_accelerators)
    gpus *= recipe.placement.num_nodes
    divides = gpus > 1 and "adamw" in train.optim
    takes_fp32 = train.dtype == "auto" and profile == "t4"  # see RELATIVE_SPEED
    batch = batch_size(train, recipe.num_ranks)
    settings = Settings(
        rows=batch.micro_batch_size,
        length=length,
        recompute=train.gradient_checkpointing,
        quantized=train.load_in_4bit,
        itemsize=4 if train.dtype == "float32" or takes_fp32 else 2,
        optim=ZERO_OPTIMIZER if divides else train.optim,
        method=prepare.method,
        loss="tiled",
        fused=train.kernels != "off" and profile in FUSED,
        num_ranks=gpus if divides else 1,
    )
    smallest = replace(settings, rows=1, recompute=True)
    base = 2 * num_parameters
    formats = [BITS.get(name, DEFAULT_BITS) for name in recipe.quantize.gguf]
    exports = sum(num_parameters * bits / 8 for bits in formats)
    exports += len(recipe.quantize.gptq) * num_parameters * DEFAULT_BITS / 8
    f16 = base if recipe.quantize.gguf else 0.0
    speed = RELATIVE_SPEED.get(recipe.placement.profile)
    if speed is not None:
        speed *= TOKENS_PER_SECOND_8B * 8.03e9 / num_parameters
        speed /= RECOMPUTE_SLOWDOWN if train.gradient_checkpointing else 1.0
    num_tokens = None
    if train.max_steps is not None:
        sequences = batch.global_batch_size * (2 if prepare.method == "dpo" else 1)
        num_tokens = train.max_steps * sequences * length
    return Estimate(
        num_parameters=num_parameters,
        length=length,
        gpu_bytes=estimate_memory(shape, settings).total,
        least_gpu_bytes=estimate_memory(shape, smallest).total,
        artifact_bytes=base * 2 + f16 + exports + 4 * shape.num_adapter,
        scratch_bytes=base * 2 + f16,
        tokens_per_second=speed,
        num_tokens=num_tokens,
        num_gpus=gpus,
    )


def llama_shape(num_parameters: float, lora: LoraConfig) -> Shape:
    """Return the shape of a Llama of about that size: 8.03e9 gives that of Llama 3.1 8B."""
    embedding = 0.0
    for _ in range(8):
        linear = num_parameters - embedding
        # A layer: q and o are square, k and v a quarter, the MLP three times 3.5.
        num_layers = max(2, round((linear / (13 * HEAD_DIM**2)) ** (1 / 3)))
        width = HEAD_DIM * num_layers
        embedding = min(2.0 * VOCAB_SIZE * width, MAX_EMBEDDING_SHARE * num_parameters)
    targets = SIDES if lora.target_modules == "all-linear" else lora.target_modules
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
