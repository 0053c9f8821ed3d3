"""The recipe's part for merging the adapter into the base."""

from typing import Literal

from pydantic import Field

from tuneline.config import StrictModel


class MergeConfig(StrictModel):
    """How the merged model is made and what it has to prove."""

    base: Literal["dequantized", "original"] = "dequantized"
    """dequantized: the NF4 weights that training saw, so that merged equals trained;
    original: the full-precision weights, which the adapter has never met."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    max_shard_bytes: int = Field(4 << 30, ge=1 << 20)
    num_proof_prompts: int = Field(8, ge=1)
    """Prompts on which adapter-on-base and merged are compared."""
    max_mean_kl: float = Field(0.01, gt=0)
    """The step fails over this mean KL divergence a token, in nats."""
