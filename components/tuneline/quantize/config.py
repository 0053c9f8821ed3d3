"""The recipe's part for the exports."""

from typing import Literal

from pydantic import Field

from tuneline.config import StrictModel

GgufFormat = Literal["f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q4_0"]
GptqFormat = Literal["gptq-4bit", "gptq-8bit"]


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
    num_check_tokens: int = Field(24, ge=1)
    """Tokens that each loaded file generates as a check."""
