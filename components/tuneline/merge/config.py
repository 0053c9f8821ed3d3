"""The recipe's part for merging the adapter into the base."""

from typing import Literal

from pydantic import Field

from tuneline.strict_model import StrictModel


class MergeConfig(StrictModel):
    """How the merged model is made and what it has to prove."""

    base: Literal["dequantized", "original", "auto"] = "dequantized"
    """dequantized: the NF4 weights that training saw, so that merged equals trained;
    original: the full-precision weights, which the adapter has never met;
    auto: both are measured with the adapter, and the one with the lower held-out loss is taken."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    max_shard_bytes: int = Field(4 << 30, ge=1 << 20)
    """Of a weight file; memory does not depend on it."""
    num_proof_prompts: int = Field(32, ge=1)
    """Prompts on which adapter-on-base and merged are compared."""
    max_mean_kl: float = Field(0.01, gt=0)
    """The step fails over this mean KL divergence a token, in nats."""
    min_top1_agreement: float = Field(0.9, ge=0, le=1)
    """And under this share of positions with the same most likely token."""
    num_greedy_tokens: int = Field(16, ge=1)
    """Tokens of the greedy answer that both give to the first prompt."""
    max_greedy_gap: float = Field(0.5, ge=0)
    """Logits: where the two answers part, the trained model may prefer its own token by this much;
    more is no near tie, and the step fails."""
