"""The `merge` section of a recipe."""

from typing import Literal

from pydantic import Field

from tuneline.models.sampling import Preset, Sampling
from tuneline.strict_model import StrictModel


class MergeConfig(StrictModel):
    """How the adapter is merged into the base model, and what the result has to prove."""

    base: Literal["dequantized", "original", "auto"] = "dequantized"
    """Weights that the adapter is added to. dequantized: the NF4 weights that training saw, so that
    the merged model equals the trained one. original: the full-precision weights, which the adapter
    was not trained on. auto: measure both, and use the one with the lower loss on held-out rows."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Dtype of the merged weights."""
    sampling: Preset | Sampling = "greedy"
    """How the published models sample unless their user says otherwise; written to
    generation_config.json, GGUF files and Ollama's files. greedy: the most likely token, which is
    what the gate measured. factual, balanced, creative: temperatures 0.1, 0.5 and 0.8. Or numbers:
    temperature, top_p, top_k and repetition_penalty."""
    max_shard_bytes: int = Field(default=4 << 30, ge=1 << 20)
    """Largest size of a weight file, in bytes; the default is 4 GiB. Memory use does not depend on
    it."""
    num_proof_prompts: int = Field(default=32, ge=1)
    """Held-out prompts on which the merged model is compared with base plus adapter."""
    max_mean_kl: float = Field(default=0.01, gt=0)
    """Largest mean KL divergence of the merged model from base plus adapter, in nats per token. The
    step fails above it."""
    min_top1_agreement: float = Field(default=0.9, ge=0, le=1)
    """Smallest fraction of positions, 0 to 1, at which both models have the same most likely token.
    Tokens whose logits differ by at most 0.1 in base plus adapter count as equally likely. The step
    fails below it."""
    num_greedy_tokens: int = Field(default=16, ge=1)
    """Tokens of the greedy answer that both models generate to the first prompt."""
    max_greedy_gap: float = Field(default=0.5, ge=0)
    """At the first token where the two greedy answers differ: the largest difference, in logits of
    base plus adapter, between its token and the merged model's. The step fails above it; small
    differences are rounding."""
