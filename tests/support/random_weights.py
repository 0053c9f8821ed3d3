"""Random weights for a model config, for the scripts that measure time and memory.

The scripts import this module in processes whose memory they measure, so torch is imported late.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

GPT_OSS_20B = {
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
}
"""Sizes of the published model, under the names of its config."""

MAX_SHARD = 2 * 2**30
"""Largest size of a shard, in bytes."""


def write_weights(directory: Path) -> int:
    """Write random bf16 weights for the config in `directory`, in shards; return their bytes."""
    import torch
    from safetensors.torch import save_file

    from tuneline.models.nf4 import empty_model

    model = empty_model(directory)
    empty = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del empty["lm_head.weight"]
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in empty.items():
        if size and size + 2 * tensor.numel() > MAX_SHARD:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += 2 * tensor.numel()
    files = [f"model-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)

    def made(name: str) -> torch.Tensor:
        shape = empty[name].shape
        if len(shape) == 1:
            fill = torch.zeros if name.endswith("bias") else torch.ones
            return fill(shape, dtype=torch.bfloat16)
        values = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
        return values.mul_(0.02).cpu()

    with ThreadPoolExecutor(2) as pool:
        jobs = []
        for file, names in zip(files, shards, strict=True):
            tensors = {name: made(name) for name in names}
            path = directory / file
            jobs.append(pool.submit(save_file, tensors, path, {"format": "pt"}))
            if len(jobs) > 2:
                jobs[-3].result()
        for job in jobs:
            job.result()
    total = 2 * sum(tensor.numel() for tensor in empty.values())
    weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total
