"""Measure what quantising to GPTQ takes of a GPU's memory; run by hand, on a machine with one.

    python tests/quantize/gptq_memory.py --layers 2 4 --cap 24 --directory /tmp/gptq

Makes random bf16 models of Llama 3's widths (4096, 14336, vocabulary 128,256), so many layers each,
and 128 calibration rows of 2,048 tokens; quantises each in a process that may not allocate more
than the cap, and prints wall time and peaks. A layer at a time is on the device, so that the peak
of 32 layers is that of 4. Then merged model and export are loaded on the GPU as the step's proof
does, and compared.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

HIDDEN, INTERMEDIATE, VOCAB = 4096, 14336, 128256


def make(directory: Path, num_layers: int) -> None:
    """Write a model directory: shards of 4 GB, a word-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    from tuneline.merge.checkpoint import Spec, write_sharded
    from tuneline.nf4 import empty_model

    directory.mkdir(parents=True)
    LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=num_layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=VOCAB,
        max_position_embeddings=8192,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(directory)
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCAB)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w1").save_pretrained(
        directory
    )
    shapes = {
        name: tuple(weight.shape) for name, weight in empty_model(directory).state_dict().items()
    }
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)

    def value(name: str) -> torch.Tensor:
        if len(shapes[name]) == 1:
            return torch.ones(shapes[name], dtype=torch.bfloat16)
        random = torch.randn(shapes[name], generator=generator, device=device)
        return (random * 0.02).bfloat16().cpu()

    specs = {name: Spec(torch.bfloat16, shape) for name, shape in shapes.items()}
    write_sharded(directory, specs, value, max_shard_bytes=4 << 30)


def quantise(job_file: str, cap_gib: float) -> None:
    """Quantise in this process; print the peaks."""
    import torch

    from tuneline.quantize.gptq_worker import main as work

    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap_gib * 2**30 / total))
    began = time.monotonic()
    work(job_file)
    say("quantised", began)


def prove(merged: Path, export: Path, cap_gib: float) -> None:
    """Compare export and merged model as the step does; print the peaks."""
    import torch

    from tuneline.quantize.transformers_model import TransformersModel

    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap_gib * 2**30 / total))
    began = time.monotonic()
    ids = [(7 * n * n + 3 * n) % VOCAB for n in range(256)]
    model = TransformersModel(merged, dtype="auto", device="cuda")
    p_TV = model.logits(ids).log_softmax(-1)
    del model
    torch.cuda.empty_cache()
    q_TV = TransformersModel(export, dtype=torch.float16, device="cuda").logits(ids).log_softmax(-1)
    kl = (p_TV.exp() * (p_TV - q_TV)).sum(-1).mean().item()
    say(f"proof, mean KL {kl:.3g} nats", began)


def say(what: str, began: float) -> None:
    """Print seconds, the allocator's peaks and that of resident memory."""
    import torch

    status = Path("/proc/self/status").read_text()
    resident = 1024 * int(re.search(r"VmHWM:\s+(\d+)", status).group(1))
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    print(
        f"{what}: {time.monotonic() - began:.0f} s, GPU {allocated / 2**30:.2f} GiB allocated, "
        f"{reserved / 2**30:.2f} reserved, host {resident / 2**30:.1f} GiB",
        flush=True,
    )


def main() -> None:
    """Make each model, quantise and prove it in processes of their own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--cap", type=float, default=24.0, help="GiB")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--child", nargs="+")
    arguments = parser.parse_args()
    if arguments.child:
        what, *paths = arguments.child
        if what == "quantise":
            quantise(paths[0], arguments.cap)
        else:
            prove(Path(paths[0]), Path(paths[1]), arguments.cap)
        return
    rows = [
        [(31 * row + 7 * n * n + 3 * n) % VOCAB for n in range(arguments.tokens)]
        for row in range(arguments.rows)
    ]
    for num_layers in arguments.layers:
        merged, export = arguments.directory / "merged", arguments.directory / "export"
        make(merged, num_layers)
        size = sum(path.stat().st_size for path in merged.glob("*.safetensors"))
        print(f"{num_layers} layers, {size / 1e9:.1f} GB:", flush=True)
        settings = {"bits": arguments.bits, "group_size": 128, "desc_act": False}
        job = {"model_dir": str(merged), "target": str(export), **settings, "rows": rows}
        job_file = arguments.directory / "job.json"
        job_file.write_text(json.dumps(job))
        own = [sys.executable, str(Path(__file__).resolve())]
        own += ["--directory", str(arguments.directory), "--cap", str(arguments.cap), "--child"]
        for child in (["quantise", str(job_file)], ["prove", str(merged), str(export)]):
            done = subprocess.run(
                [*own, *child],
                cwd=arguments.directory,
                env={
                    "GPTQMODEL_CPU_WORKERS": str(max(2, len(os.sched_getaffinity(0)))),
                    **os.environ,
                },
                capture_output=True,
                text=True,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            lines = done.stdout.splitlines()
            print("\n".join(line for line in lines if "GiB" in line and "allocated" in line))
            if done.returncode:
                sys.exit(done.stderr[-3000:])
        shutil.rmtree(merged)
        shutil.rmtree(export)


if __name__ == "__main__":
    main()
