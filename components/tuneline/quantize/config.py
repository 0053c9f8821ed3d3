"""The `quantize` section of a recipe."""

import functools
from typing import Annotated, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from tuneline.quantize import formats
from tuneline.strict_model import StrictModel

GgufFormat = Annotated[
    str,
    AfterValidator(functools.partial(formats.check_name, kind="gguf")),
    Field(json_schema_extra={"enum": [*formats.names("gguf")]}),
]
GptqFormat = Annotated[
    str,
    AfterValidator(functools.partial(formats.check_name, kind="gptq")),
    Field(json_schema_extra={"enum": [*formats.names("gptq")]}),
]
AwqFormat = Annotated[
    str,
    AfterValidator(functools.partial(formats.check_name, kind="awq")),
    Field(json_schema_extra={"enum": [*formats.names("awq")]}),
]
Fp8Format = Annotated[
    str,
    AfterValidator(functools.partial(formats.check_name, kind="fp8")),
    Field(json_schema_extra={"enum": [*formats.names("fp8")]}),
]
AnyFormat = Annotated[str, AfterValidator(formats.check_name)]


class QuantizeConfig(StrictModel):
    """Which exports are made of the merged model, and how each one is checked."""

    gguf: tuple[GgufFormat, ...] = ("f16", "q8_0", "q5_k_m", "q4_k_m")
    """GGUF files to make, for llama.cpp and Ollama. An empty list makes none."""
    gptq: tuple[GptqFormat, ...] = ("gptq-4bit",)
    """GPTQ checkpoints to make, for transformers and vLLM. An empty list makes none."""
    awq: tuple[AwqFormat, ...] = ()
    """[awq] makes an AWQ checkpoint in 4 bits, in the GEMM layout that transformers and vLLM read.
    An empty list makes none."""
    fp8: tuple[Fp8Format, ...] = ()
    """[fp8] makes a checkpoint in FP8 for vLLM on GPUs of Ada, Hopper or later: compressed-tensors'
    scheme FP8_DYNAMIC, with a scale per output channel and, at run time, per token. It needs no
    calibration. An empty list makes none."""
    group_size: int = 128
    """GPTQ, AWQ: number of weights per scale: 16, 32, 64, 128 or, for GPTQ, 256, 512 or 1024. If a
    layer's width is not a multiple of it, the next smaller size that divides every layer is
    used."""
    desc_act: bool = False
    """GPTQ: quantise columns in order of decreasing activation, which is a little more accurate
    and slower to run."""
    num_calibration_rows: int = Field(default=128, ge=1)
    """GPTQ, AWQ: training rows of this run on which the rounding is calibrated."""
    num_importance_rows: int = Field(default=0, ge=0)
    """GGUF: training rows on which an importance matrix is measured, for formats below 8 bits. 0:
    no importance matrix. 128 rows are enough. The iq1, iq2 and iq3 types and q2_k_s require one."""
    num_check_tokens: int = Field(default=24, ge=1)
    """Tokens that each export generates as a check after it is loaded."""
    num_proof_prompts: int = Field(default=8, ge=1)
    """Held-out rows on which each export is compared with the merged model."""
    num_benchmark_rows: int = Field(default=0, ge=0)
    """Held-out rows that each export and the merged model answer. If every row has choices, the
    most likely one counts; otherwise the greedy answer must equal the reference. The gate holds an
    export that answers worse than the merged model, see `gate.max_regression`; `tuneline plan` says
    how many rows it needs. 0: no score, and no export is held for its answers."""
    max_mean_kl: dict[AnyFormat, Annotated[float, Field(gt=0)]] = {}
    """By format: the largest mean KL divergence from the merged model, in nats per token. An export
    above it fails the step. Formats that are not listed keep their built-in bound, e.g. f16
    0.001."""
    min_top1_agreement: dict[AnyFormat, Annotated[float, Field(ge=0, le=1)]] = {}
    """By format: the smallest fraction of positions, 0 to 1, at which export and merged model have
    the same most likely token. Tokens whose logits differ by at most 0.1 in the merged model count
    as equally likely. An export below the fraction fails the step. Formats that are not listed
    keep their built-in bound, e.g. f16 0.98."""

    @field_validator("gguf", "gptq", "awq", "fp8")
    @classmethod
    def _check_named_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(
                f"{', '.join(repeated)} is named more than once: name each format once"
            )
        return names

    @field_validator("group_size")
    @classmethod
    def _check_group_size(cls, size: int) -> int:
        if size not in formats.GROUP_SIZES:
            sizes = ", ".join(str(size) for size in sorted(formats.GROUP_SIZES))
            raise ValueError(f"GPTQ has no kernel for groups of {size}: choose one of {sizes}")
        return size

    @model_validator(mode="after")
    def _check_importance(self) -> Self:
        formats.check_importance(self.gguf, self.num_importance_rows)
        return self
