"""Export the merged model: GGUF files for llama.cpp, GPTQ checkpoints for transformers and vLLM.

Importing this loads neither kfp nor torch nor llama.cpp: a recipe is checked on machines that have
none of them, so heavy imports stand inside the functions that need them.
"""

from tuneline.quantize.config import QuantizeConfig
from tuneline.quantize.gguf.importance import measure_importance
from tuneline.quantize.run import convert, run

__all__ = ["QuantizeConfig", "convert", "measure_importance", "run"]
