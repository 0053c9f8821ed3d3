"""Measure the streamed merge against peft's merge_and_unload + save_pretrained; run by hand.

    OMP_NUM_THREADS=2 python tests/measure/merge_memory.py --layers 8 --directory /tmp/merge

Makes a random bf16 model with the widths of Llama 3 (4096, 14336; 32 layers are 16 GB) and an
adapter of rank 16 on its seven linear layers. Then runs each merge in its own process, and prints
wall time and peak resident memory. `original` does the same as peft; `dequantized` adds the NF4
round trip of every layer. The streamed merge is compared with peft's, tensor by tensor. If the disk
has no room for three copies, `--keep 1` keeps and compares only one of its shards.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

INDEX_FILE = "model.safetensors.index.json"
HIDDEN, INTERMEDIATE, KEY_VALUE, RANK = 4096, 14336, 1024, 16
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEY_VALUE, HIDDEN),
    "self_attn.v_proj": (KEY_VALUE, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}


def make(directory: Path, num_layers: int, vocab_size: int) -> None:
    """Write base/ in shards of 4 GB, one tensor at a time, and adapter/."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from tuneline.models.checkpoint import Spec
    from tuneline.models.sharded_files import write_sharded

    base, adapter = directory / "base", directory / "adapter"
    base.mkdir(parents=True)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=num_layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=vocab_size,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(base)
    shapes = {"model.embed_tokens.weight": (vocab_size, HIDDEN)}
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.{name}.weight": shape for name, shape in LINEAR.items()}
        shapes[f"{prefix}.input_layernorm.weight"] = (HIDDEN,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (HIDDEN,)
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (vocab_size, HIDDEN)}
    generator = torch.Generator().manual_seed(0)

    def value(name: str) -> torch.Tensor:
        shape = shapes[name]
        return (torch.rand(shape, generator=generator) * 0.07 - 0.035).bfloat16()

    specs = {name: Spec(torch.bfloat16, shape) for name, shape in shapes.items()}
    write_sharded(base, specs, lambda name: [value(name)], max_shard_bytes=4 << 30)
    names = sorted({name.split(".")[1] for name in LINEAR})
    LoraConfig(r=RANK, lora_alpha=32, target_modules=names, task_type="CAUSAL_LM").save_pretrained(
        adapter
    )
    tensors = {}
    for layer in range(num_layers):
        for name, (num_out, num_in) in LINEAR.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            a = torch.rand(RANK, num_in, generator=generator) * 0.04 - 0.02
            tensors[f"{key}.lora_A.weight"] = a
            b = torch.rand(num_out, RANK, generator=generator) * 0.04 - 0.02
            tensors[f"{key}.lora_B.weight"] = b
    save_file(tensors, adapter / "adapter_model.safetensors")


def merge_streamed(directory: Path, base: str, out: Path) -> None:
    """Merge as the step does."""
    import torch

    from tuneline.artifacts import TrainingSummary
    from tuneline.merge.adapter import Adapter
    from tuneline.merge.pieces import Pieces
    from tuneline.merge.weights import merge_weights, write_config

    out.mkdir()
    training = TrainingSummary.model_construct(base_quantization="nf4", compute_dtype="bfloat16")
    write_config(base_model_dir=directory / "base", dtype="bfloat16", directory=out)
    adapter = Adapter(directory / "adapter")
    merge_weights(
        Pieces(directory / "base", adapter, training, base=base, device="cpu"),
        dtype=torch.bfloat16,
        max_shard_bytes=4 << 30,
        directory=out,
    )


def merge_with_peft(directory: Path, out: Path) -> None:
    """Merge as peft's documentation does."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory / "base", dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(model, str(directory / "adapter")).merge_and_unload()
    merged.save_pretrained(out, max_shard_size="4GB")


def keep_shards(directory: Path, num_kept: int) -> None:
    """Delete all but `num_kept` shards of a merged model, which are readable without an index."""
    (directory / INDEX_FILE).unlink(missing_ok=True)
    for path in sorted(directory.glob("*.safetensors"))[num_kept:]:
        path.unlink()


def difference(one: Path, other: Path) -> tuple[float, float, int]:
    """Return the largest difference, the fraction of weights that differ, and the tensor count."""
    from tuneline.models.checkpoint import Checkpoint

    ours, theirs = Checkpoint(one), Checkpoint(other)
    assert ours.specs.items() <= theirs.specs.items()
    worst, differing, total = 0.0, 0, 0
    for name in ours.specs:
        a, b = ours.read(name), theirs.read(name)
        worst = max(worst, (a.float() - b.float()).abs().max().item())
        differing += int((a != b).sum())
        total += a.numel()
    return worst, differing / total, len(ours.specs)


def measure(directory: Path, what: str) -> None:
    """Run one merge in this process; print its seconds and its peak resident memory as JSON."""
    began = time.monotonic()
    if what == "peft":
        merge_with_peft(directory, directory / what)
    else:
        merge_streamed(directory, what, directory / what)
    # Not getrusage: its maximum is inherited from the parent process, which made the model.
    status = Path("/proc/self/status").read_text()
    peak = 1024 * int(re.search(r"VmHWM:\s+(\d+)", status).group(1))
    print(json.dumps({"seconds": time.monotonic() - began, "peak_bytes": peak}))


def main() -> None:
    """Make the model, run the merges one after another, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--runs", nargs="+", default=["original", "peft", "dequantized"])
    parser.add_argument("--keep", type=int, default=1000, help="shards to compare")
    parser.add_argument("--only", choices=["make", "measure"], help="run only one part")
    parser.add_argument("--child")
    arguments = parser.parse_args()
    if arguments.child:
        measure(arguments.directory, arguments.child)
        return
    if arguments.only != "measure":
        make(arguments.directory, arguments.layers, arguments.vocab)
    size = sum(path.stat().st_size for path in (arguments.directory / "base").iterdir())
    print(f"base: {size / 1e9:.2f} GB, {arguments.layers} layers", flush=True)
    if arguments.only == "make":
        return
    for what in arguments.runs:
        command = [sys.executable, __file__, "--directory", str(arguments.directory)]
        done = subprocess.run([*command, "--child", what], stdout=subprocess.PIPE, check=True)
        result = json.loads(done.stdout.splitlines()[-1])
        seconds, peak = result["seconds"], result["peak_bytes"]
        print(f"{what}: {seconds:.1f} s, {peak / 2**30:.2f} GiB resident", flush=True)
        if what == "original":
            keep_shards(arguments.directory / what, arguments.keep)
        elif what != "peft":
            shutil.rmtree(arguments.directory / what)
    if {"peft", "original"} <= set(arguments.runs):
        both = [arguments.directory / name for name in ("original", "peft")]
        print(
            "original against peft: largest difference {:.2g}, {:.2%} differ, in {} tensors".format(
                *difference(*both)
            )
        )


if __name__ == "__main__":
    main()
