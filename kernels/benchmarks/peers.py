"""Unsloth in the best setting that its own documentation or source offers for each case.

Settings of Unsloth 2026.10.9; each was the fastest (`free`) or the leanest (`lean`) of those tried:

- UNSLOTH_SDPA_CUDNN_BUCKET=0: rows of one fixed length are not padded for attention.
- UNSLOTH_BLOCK_CUDAGRAPHS=1: small batches of a fixed shape replay CUDA graphs.
- UNSLOTH_GC_PREFETCH=1: a long row's checkpoints are copied back to the GPU ahead of time.
- `offload_embedding`: the input embedding stays on the host.
- torch's fused AdamW is faster than 8-bit AdamW, which takes less memory.

xformers, which Unsloth's package requires, has to be installed: without it, attention over packed
rows runs once per row.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

FIXED_LENGTH = {"UNSLOTH_SDPA_CUDNN_BUCKET": "0"}


@dataclass(frozen=True)
class Setting:
    """How Unsloth is started and built for a case."""

    name: str
    """What the CSV names."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables that are set before Unsloth is imported."""
    is_lean: bool = False
    """Whether activations are recomputed and the input embedding is kept on the host."""
    has_8bit_optimizer: bool = False
    """Whether AdamW keeps its state in 8 bits; otherwise torch's fused AdamW is used."""


UNSLOTH = {
    "4x2048/free": Setting("no bucket, fused AdamW", FIXED_LENGTH),
    "2x512/free": Setting(
        "no bucket, CUDA graphs, fused AdamW", {**FIXED_LENGTH, "UNSLOTH_BLOCK_CUDAGRAPHS": "1"}
    ),
    "4x2048/lean": Setting(
        "no bucket, embedding on host, 8-bit AdamW",
        FIXED_LENGTH,
        is_lean=True,
        has_8bit_optimizer=True,
    ),
    "1x8192/lean": Setting(
        "no bucket, embedding on host, prefetch, 8-bit AdamW",
        {**FIXED_LENGTH, "UNSLOTH_GC_PREFETCH": "1"},
        is_lean=True,
        has_8bit_optimizer=True,
    ),
    "packed/free": Setting("xformers, fused AdamW"),
    "packed/lean": Setting(
        "xformers, embedding on host, 8-bit AdamW", is_lean=True, has_8bit_optimizer=True
    ),
}
"""Setting for each case of train_step.py and packed.py."""
LONG = [f"1x{length}/lean" for length in (32768, 65536, 131072)]
"""Cases of train_step.py with long rows."""
UNSLOTH |= {case: replace(UNSLOTH["1x8192/lean"], name="long rows") for case in LONG}


def setting(engine: str, case: str) -> Setting:
    """Return the setting of an engine in a case; engines other than Unsloth have one for all."""
    return UNSLOTH[case] if engine == "unsloth" else Setting("")


def environment(engine: str, case: str, peer_packages: Path | None) -> dict[str, str]:
    """Return the environment of an engine's process.

    Args:
        engine: Name of the engine.
        case: A key of UNSLOTH.
        peer_packages: Folder of the versions of packages that Unsloth asks for; None: the
            installed ones.
    """
    paths = [os.environ.get("PYTHONPATH", "")]
    if engine == "unsloth" and peer_packages is not None:
        paths.insert(0, str(peer_packages))
    return {
        **os.environ,
        **setting(engine, case).environment,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }


def unsloth_model(checkpoint: Path, case: str, targets: list[str]) -> Any:
    """Load a checkpoint through Unsloth and add its adapter.

    Args:
        checkpoint: Directory of a model in bfloat16, with a tokenizer.
        case: A key of UNSLOTH.
        targets: Names of the linears that are adapted, r=16.
    """
    import unsloth  # noqa: F401, I001  (before transformers, as it asks)
    import torch
    from unsloth import FastLanguageModel

    is_lean = UNSLOTH[case].is_lean
    model, _ = FastLanguageModel.from_pretrained(
        str(checkpoint),
        max_seq_length=131072 if case in LONG else 8192,
        dtype=torch.bfloat16,
        load_in_4bit=True,
        offload_embedding=is_lean,
    )
    return FastLanguageModel.get_peft_model(
        model,
        r=16,
        lora_alpha=16,
        target_modules=targets,
        use_gradient_checkpointing="unsloth" if is_lean else False,
    )


def write_checkpoint(model: Any, directory: Path) -> None:
    """Save a random model with a placeholder tokenizer, for loaders that want files."""
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)


def tokenizer() -> Any:
    """Return a placeholder tokenizer: the rows are token IDs already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "</s>": 1, "<pad>": 2, "<unk>": 3}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
