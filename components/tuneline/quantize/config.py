"""The recipe's part for the exports."""

from typing import Annotated, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from tuneline.quantize import formats
from tuneline.strict_model import StrictModel

GgufFormat = Annotated[
    str,
    AfterValidator(formats.known_gguf),
    Field(json_schema_extra={"enum": list(formats.GGUF)}),
]
GptqFormat = Annotated[
    str,
    AfterValidator(formats.known_gptq),
    Field(json_schema_extra={"enum": list(formats.GPTQ)}),
]
AnyFormat = Annotated[str, AfterValidator(formats.known)]


class QuantizeConfig(StrictModel):
    """Which exports are made and how they are checked."""

    gguf: tuple[GgufFormat, ...] = ("f16", "q8_0", "q5_k_m", "q4_k_m")
    """Files for llama.cpp and Ollama; an empty list for none."""
    gptq: tuple[GptqFormat, ...] = ("gptq-4bit",)
    """Checkpoints for transformers and vLLM; an empty list for none."""
    group_size: int = Field(128, ge=16)
    """GPTQ; the largest that divides every layer is taken where this one does not."""
    desc_act: bool = False
    """GPTQ: quantise columns by decreasing activation; slower to run, a little better."""
    num_calibration_rows: int = Field(128, ge=1)
    """GPTQ: rows of the run's own training data."""
    num_importance_rows: int = Field(0, ge=0)
    """GGUF: training rows on which an importance matrix is measured, for formats below 8 bits; 128
    is much. 0 makes none, and the iq1, iq2 and iq3 types need one."""
    num_check_tokens: int = Field(24, ge=1)
    """Tokens that each loaded file generates as a check."""
    num_proof_prompts: int = Field(8, ge=1)
    """Held-out rows on which each export is compared with the merged model."""
    num_benchmark_rows: int = Field(0, ge=0)
    """Held-out rows that each export answers for the report's table, by choices where the rows have
    them, else exactly; 0 for none."""
    max_mean_kl: dict[AnyFormat, Annotated[float, Field(gt=0)]] = {}
    """By format: an export fails over this mean KL divergence a token, in nats, from the merged
    model; formats that are not named have the bounds of quantize/formats.py, e.g. f16 0.001."""
    min_top1_agreement: dict[AnyFormat, Annotated[float, Field(ge=0, le=1)]] = {}
    """By format: an export fails under this share of positions where its most likely token is the
    merged model's."""

    @field_validator("gguf", "gptq")
    @classmethod
    def _check_named_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} is named more than once: name each format once")
        return names

    @model_validator(mode="after")
    def _check_importance(self) -> Self:
        formats.check_importance(self.gguf, self.num_importance_rows)
        return self
