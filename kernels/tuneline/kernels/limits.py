"""Limits of the kernels that other code needs for planning; this module does not import torch.

The train step estimates its memory and checks the GPU before it loads a model. The limits that the
kernels share with the train step are therefore defined in this module.
"""

MIN_CAPABILITY = (8, 0)
"""Lowest compute capability that runs the fused layers (Ampere). A GPU with a lower one has neither
bfloat16 nor the attention kernels that the layers call."""

FP8_CAPABILITY = (9, 0)
"""Lowest compute capability with a row-wise fp8 GEMM (Hopper)."""

MIN_ADAPTER_COLUMNS = 64
"""Minimum number of padded adapter columns (P) that are appended to a GEMM operand; see
ops/lora.py."""

STASH_MIN_TOKENS = 4096
"""Minimum number of tokens of a micro-batch whose layer inputs are offloaded to host memory. With
fewer tokens, the cost of the copies exceeds their benefit."""

MLP_CHUNK_TOKENS = 4096
"""Maximum number of tokens per chunk of the MLP. A GEMM of 4096 rows still fills an H100; a GEMM
with fewer rows leaves part of the GPU idle during its last wave of blocks."""

KEPT_MLP_CHUNK_TOKENS = 8192
"""Maximum number of tokens per chunk of the MLP in a layer that stores gate and up.
Compared with chunks of MLP_CHUNK_TOKENS, these chunks add only 0.3 GiB to the memory peak of such a
layer, and a step of 8192 tokens of Llama-3.1-8B takes 480 ms instead of 488 ms."""

INFERENCE_MLP_CHUNK_TOKENS = 16384
"""Maximum number of tokens per chunk of the MLP in a model that is patched for inference. Such a
model stores no activations, so there is memory for the largest chunks: 1.4 GB for Llama-3.1-8B."""

HEAD_ROOM = 0.06
"""Fraction of the GPU's memory that plans leave free: an allocator never fills all memory, and the
loss's chunk and the optimizer's step need memory in addition to the stored activations."""

GRAPH_MAX_TOKENS = 2048
"""Largest micro-batch that CUDA graphs replay, in tokens of layers of Llama-3.1-8B's size (see
`equal_tokens`).

A graph never frees its activations: 3 GB for 1024 tokens of a Llama-3.1-8B that stores all of its
activations."""

GRAPH_MAX_TOKENS_FP8 = 8192
"""Largest micro-batch that CUDA graphs replay with fp8 GEMMs. They take less time than bf16 GEMMs,
so the GPU waits for the host at more tokens: 28 of 368 ms at 8192 tokens without a graph."""

_LAYER_WEIGHTS = 218_103_808
"""Weights in the linears of a Llama-3.1-8B layer."""


def equal_tokens(num_weights: int, num_tokens: int) -> float:
    """Return for how many tokens a Llama-3.1-8B layer takes the same GPU time as another layer.

    The host needs the same time to launch any layer, but the GPU needs as much time for 4096 tokens
    of a 1B model as for 1000 tokens of an 8B model. Limits in tokens are therefore stated for
    Llama-3.1-8B.

    Args:
        num_weights: Weights of the other layer that each of its tokens is multiplied by.
        num_tokens: Tokens of the other layer.
    """
    return num_tokens * num_weights / _LAYER_WEIGHTS


def is_replayed(num_weights: int, num_tokens: int, *, fp8: bool) -> bool:
    """Return whether CUDA graphs replay micro-batches of this size.

    Args:
        num_weights: Weights of a layer that each token is multiplied by.
        num_tokens: Tokens of the micro-batch.
        fp8: Whether the layers compute fp8 GEMMs and all store their activations.
    """
    most = GRAPH_MAX_TOKENS_FP8 if fp8 else GRAPH_MAX_TOKENS
    return equal_tokens(num_weights, num_tokens) <= most


def arena_bytes(num_out: int, num_in: int, num_columns: int, itemsize: int, *, fp8: bool) -> int:
    """Return the bytes of a group's dequantised weights with its adapters, see decoder/operands.py.

    Args:
        num_out: Outputs of all linears of the group.
        num_in: Inputs of each linear.
        num_columns: Columns of the adapters, padded.
        itemsize: Bytes per element of an activation.
        fp8: Whether the group is computed in fp8. Weights and adapters are then held in fp8, for
            the forward and transposed, and the adapters also in the dtype of the activations.
    """
    if not fp8:
        return itemsize * (num_out + num_columns) * (num_in + num_columns)
    return 2 * num_out * num_in + (itemsize + 1) * num_columns * (num_out + num_in)
