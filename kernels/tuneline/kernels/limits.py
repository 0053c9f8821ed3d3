"""Limits of the kernels that other code plans with; importable without torch.

The train step estimates its memory and checks the GPU before it loads a model, so each limit that
both sides need is defined here, once.
"""

MIN_CAPABILITY = (8, 0)
"""Oldest compute capability that runs the fused layers (Ampere): older GPUs have neither bfloat16
nor the attention kernels that the layers call."""

FP8_CAPABILITY = (9, 0)
"""Oldest compute capability with a row-wise fp8 GEMM (Hopper)."""

MIN_ADAPTER_COLUMNS = 64
"""Least width of the padded adapter columns beside a GEMM's operand; see ops/lora.py."""

STASH_MIN_TOKENS = 4096
"""Fewest tokens of a micro-batch whose layer inputs are parked in host memory; for fewer tokens the
copies cost more than they save."""

MLP_CHUNK_TOKENS = 4096
"""Most tokens per chunk of the MLP. A GEMM of 4096 rows still fills an H100; with fewer rows the
GPU waits for the last wave of blocks."""

KEPT_MLP_CHUNK_TOKENS = 8192
"""Most tokens per chunk of the MLP in a layer that keeps gate and up. There the chunk adds only
0.3 GiB to the peak, and a step of 8192 tokens of Llama-3.1-8B takes 480 ms instead of 488 ms."""

HEAD_ROOM = 0.06
"""Fraction of the GPU's memory that plans leave free: an allocator never fills all of it, and the
loss's chunk and the optimizer's step need memory beside the kept activations."""
