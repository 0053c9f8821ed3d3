"""Measure the GPU memory that quantising to GPTQ takes; run by hand on a machine with a GPU.

    python tests/measure/gptq_memory.py --layers 2 4 --cap 24 --directory /tmp/gptq

Makes random bf16 models with the widths of Llama 3 (4096, 14336, vocabulary 128,256), one for each
number of layers, and 128 calibration rows of 2,048 tokens. Quantises each model in a process that
may not allocate more than the cap, and prints wall time and peaks, also every half minute. Only one
layer at a time is on the device, so the peak of 32 layers equals that of 4. Then loads merged model
and export on the GPU as the step's proof does, and compares them.

If gptqmodel runs out of GPU memory, it continues on the CPU; its log lines about that are printed.
`GPTQMODEL_DISABLE_GPTQ_CUDA=1` rounds one column after another, without the kernel.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TextIO

sys.path.append(str(Path(__file__).parents[1] / "support"))

from random_weights import write_weights  # noqa: E402

HIDDEN, INTERMEDIATE, VOCAB = 4096, 14336, 128256
SECONDS_BETWEEN_LINES = 30
SECONDS_BETWEEN_LOOKS = 0.2
FELL_BACK = re.compile(
    r"out of memory|\bOOM\b|fell back|falling back|failed to build", re.IGNORECASE
)


def make(directory: Path, num_layers: int) -> None:
    """Write a model directory with random weights and a word-level tokenizer."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, PreTrainedTokenizerFast

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
    write_weights(directory)


def quantise(job_file: str, cap_gib: float, out: TextIO) -> None:
    """Quantise in this process and print the peaks."""
    # Before the first use of CUDA: gptqmodel sets the allocator's options, as in run_gptqmodel.
    import gptqmodel  # noqa: F401

    from tuneline.quantize.checkpoint.run_gptqmodel import main as run_gptqmodel

    meter = Meter(cap_gib, out)
    run_gptqmodel(job_file)
    meter.report("quantised")


def prove(merged: Path, export: Path, cap_gib: float, out: TextIO) -> None:
    """Compare export and merged model as the step does, and print the peaks."""
    import torch

    from tuneline.quantize.proof.transformers_model import TransformersModel

    meter = Meter(cap_gib, out)
    ids = [(7 * n * n + 3 * n) % VOCAB for n in range(256)]
    model = TransformersModel(merged, dtype="auto", device="cuda")
    p_TV = model.logits(ids).log_softmax(-1)
    meter.report("proof, merged model")
    del model
    torch.cuda.empty_cache()
    q_TV = TransformersModel(export, dtype=torch.float16, device="cuda").logits(ids).log_softmax(-1)
    kl = (p_TV.exp() * (p_TV - q_TV)).sum(-1).mean().item()
    meter.report(f"proof, mean KL {kl:.3g} nats")


class Meter:
    """Caps the GPU memory of this process, and prints time and peaks, also at intervals."""

    def __init__(self, cap_gib: float, out: TextIO) -> None:
        """Set the cap and start to watch."""
        import torch

        self._out = out
        self._least_free, self._total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap_gib * 2**30 / self._total))
        self._began = time.monotonic()
        threading.Thread(target=self._watch, daemon=True).start()

    def report(self, label: str) -> None:
        """Print seconds and peaks: of the allocator, of the whole GPU and of resident memory."""
        import torch

        status = Path("/proc/self/status").read_text()
        resident = 1024 * int(re.search(r"VmHWM:\s+(\d+)", status).group(1))
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        print(
            f"{label}: {time.monotonic() - self._began:.0f} s, "
            f"GPU {allocated / 2**30:.2f} GiB allocated, {reserved / 2**30:.2f} reserved, "
            f"{(self._total - self._least_free) / 2**30:.2f} with context and libraries, "
            f"host {resident / 2**30:.1f} GiB",
            file=self._out,
            flush=True,
        )

    def _watch(self) -> None:
        import torch

        reported = self._began
        while True:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            self._least_free = min(self._least_free, torch.cuda.mem_get_info()[0])
            if time.monotonic() - reported > SECONDS_BETWEEN_LINES:
                reported = time.monotonic()
                self.report("so far")


def main() -> None:
    """Make each model, then quantise and prove it in separate processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--cap", type=float, default=24.0, help="GiB")
    parser.add_argument(
        "--rows",
        type=int,
        nargs="+",
        default=[128],
        help="one run per number",
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--limit", type=float, default=540, help="seconds for one process")
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--child", nargs="+")
    arguments = parser.parse_args()
    if arguments.child:
        what, *paths = arguments.child
        # What libraries print goes to the log.
        out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        if what == "quantise":
            quantise(paths[0], arguments.cap, out)
        else:
            prove(Path(paths[0]), Path(paths[1]), arguments.cap, out)
        return
    all_done = True
    for num_layers in arguments.layers:
        merged, export = arguments.directory / "merged", arguments.directory / "export"
        shutil.rmtree(merged, ignore_errors=True)
        make(merged, num_layers)
        size = sum(path.stat().st_size for path in merged.glob("*.safetensors"))
        for num_rows in arguments.rows:
            print(f"{num_layers} layers, {size / 1e9:.1f} GB, {num_rows} rows:", flush=True)
            shutil.rmtree(export, ignore_errors=True)
            rows = [
                [(31 * row + 7 * n * n + 3 * n) % VOCAB for n in range(arguments.tokens)]
                for row in range(num_rows)
            ]
            settings = {"method": "gptq", "bits": arguments.bits, "group_size": 128}
            settings |= {"desc_act": False, "dtype": "float16"}
            job = {"model_dir": str(merged), "target": str(export), **settings, "rows": rows}
            job |= {"started_at": time.monotonic(), "times_file": "times.json"}
            job_file = arguments.directory / "job.json"
            job_file.write_text(json.dumps(job))
            done = run(arguments, "quantise", job_file) and run(arguments, "prove", merged, export)
            all_done = all_done and done
    sys.exit(not all_done)


def run(arguments: argparse.Namespace, *child: str | Path) -> bool:
    """Run this script as a child process; print its output and its log lines about low memory.

    Returns:
        Whether the child succeeded within the limit.
    """
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--directory",
        str(arguments.directory),
    ]
    command += ["--cap", str(arguments.cap), "--child", *map(str, child)]
    log = arguments.directory / f"{child[0]}.log"
    # The settings of tuneline.quantize.checkpoint.calibrated.
    settings = {
        "GPTQMODEL_CPU_WORKERS": str(max(2, len(os.sched_getaffinity(0)))),
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=arguments.directory,
            env=settings | os.environ,
            stdin=subprocess.DEVNULL,
            stderr=file,
            start_new_session=True,
        )
        try:
            status: int | str = process.wait(timeout=arguments.limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = f"it took more than {arguments.limit:.0f} s"
    text = log.read_text(errors="replace")
    fallbacks = {line.strip() for line in re.split(r"[\r\n]+", text) if FELL_BACK.search(line)}
    print("\n".join(sorted(fallbacks)[:20]), end="\n" if fallbacks else "", flush=True)
    if status:
        print(f"{text[-3000:]}\n{child[0]} failed: {status}", flush=True)
    return not status


if __name__ == "__main__":
    main()
