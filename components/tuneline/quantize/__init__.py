"""Export the merged model: GGUF files for llama.cpp, checkpoints for transformers and vLLM."""

from tuneline.quantize.config import QuantizeConfig

__all__ = ["QuantizeConfig"]
