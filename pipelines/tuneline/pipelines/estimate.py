"""Estimate GPU memory, disk and GPU time of a recipe, before anything is fetched.

All that is known of a model here is its number of parameters: layers and width follow from it as
they do in the Llama family, N = 12 * layers * width^2 with a width of 128 a layer. Against PEFT on
an H200, Llama-3.1-8B shape, r=16 on seven modules, NF4 (README, in GiB):

    rows x tokens         measured   estimated
    4 x 2048                  62.4        63
    4 x 2048, recomputed      19.4        19
    2 x 512                   12.7        13
    1 x 8192, recomputed      19.4        19
"""

import re
from dataclasses import dataclass

from tuneline.profiles import Profile
from tuneline.recipe import Recipe

GIB = 2**30

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
    artifact_bytes: float
    """All that the run keeps."""
    scratch_bytes: float
    """The most that one step has on its disk."""
    tokens_per_second: float | None
    """Of one GPU; None without one."""
    num_tokens: int | None
    """That training sees; None where only the data says."""

    @property
    def gpu_hours(self) -> float | None:
        """Of the training; None where tokens or speed are not known."""
        if self.num_tokens is None or self.tokens_per_second is None:
            return None
        return self.num_tokens / self.tokens_per_second / 3600


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
    rows = train.per_device_train_batch_size * (2 if prepare.method == "dpo" else 1)
    tokens = rows * length
    num_layers = max(2.0, (num_parameters / (12 * 128**2)) ** (1 / 3))
    width = 128 * num_layers
    embedding = min(VOCAB_SIZE * width, 0.3 * num_parameters)
    itemsize = 4 if train.dtype == "float32" or recipe.placement.profile == "t4" else 2
    linear = num_parameters - 2 * embedding
    weights = linear * (0.52 if train.load_in_4bit else itemsize) + 2 * embedding * itemsize
    # fp32 weights and gradients and an 8-bit or fp32 optimizer's two moments.
    moments = 2 if "8bit" in train.optim else 8
    adapter = num_parameters * 0.0052 * train.lora.r / 16 * (8 + moments)
    per_layer = 20 * itemsize * width * tokens
    head = 12 * tokens * VOCAB_SIZE
    if train.gradient_checkpointing:
        activations = tokens * width * itemsize * num_layers
        peak = max(per_layer, head)
    else:
        activations, peak = per_layer * num_layers, head
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
        num_tokens = train.max_steps * train.gradient_accumulation_steps * tokens
    return Estimate(
        num_parameters=num_parameters,
        length=length,
        gpu_bytes=weights + adapter + activations + peak,
        artifact_bytes=base * 2 + f16 + exports + adapter,
        scratch_bytes=base * 2 + f16,
        tokens_per_second=speed,
        num_tokens=num_tokens,
    )
