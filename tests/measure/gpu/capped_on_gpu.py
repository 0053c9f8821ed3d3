"""Run `python -m tuneline.train` on models with experts, in the memory of a smaller GPU.

    python tests/measure/gpu/capped_on_gpu.py --shapes DeepSeek-V2-Lite gpt-oss-20b --gb 24
    python tests/measure/gpu/capped_on_gpu.py --tiny                      a trial without a GPU

Random weights, 4 rows of 2048 random tokens per step, the recipe's defaults. The train step plans
within the memory of the smaller GPU (`train.memory_gib`), and torch's allocator refuses more.
Prints tokens per second by wall-clock time and the peak memory beside the estimate.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import gpu_inputs
from gpu_inputs import GIB, say

WARM_UP = 4
"""First step whose speed counts; earlier steps may compile kernels."""
TINY = {
    **{"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 4, "intermediate_size": 128, "moe_intermediate_size": 64},
    **{"n_routed_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    **{"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16},
}


def main() -> None:
    """Train each shape for a few steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["DeepSeek-V2-Lite", "gpt-oss-20b"])
    parser.add_argument("--gb", type=float, default=24.0, help="memory of the smaller GPU, 1e9 B")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out-dir", type=Path, default=Path("."), help="for capped.json and logs")
    parser.add_argument("--tiny", action="store_true", help="two small layers and short rows")
    args = parser.parse_args()
    gpu_inputs.check_packages()
    args.out_dir.mkdir(parents=True, exist_ok=True)
    results = {}
    for shape in args.shapes:
        results[shape] = run(shape, args)
        (args.out_dir / "capped.json").write_text(json.dumps(results, indent=1))


def run(shape: str, args: argparse.Namespace) -> dict[str, object]:
    """Train one shape, and return what its training.json says."""
    began = time.monotonic()
    family, sizes = gpu_inputs.SHAPES[shape]
    if args.tiny:
        small = {name: value for name, value in TINY.items() if name in sizes}
        gpu_inputs.SHAPES[shape] = family, {**sizes, **small}
    work = gpu_inputs.roomy_directory(0 if args.tiny else 45 * 10**9)
    length = 64 if args.tiny else 2048
    try:
        gpu_inputs.write_base(work / "base", shape)
        size = gpu_inputs.write_weights_by_library(work / "base")
        say(f"{shape}: {size / 1e9:.1f} GB of weights after {time.monotonic() - began:.0f} s")
        gpu_inputs.write_dataset(
            work / "dataset",
            [length] * 4 * args.steps,
            max_seq_length=length,
            max_token=500 if args.tiny else 30000,
        )
        gib = args.gb * 1e9 / GIB
        with gpu_inputs.capped(args.gb * 1e9):
            done = gpu_inputs.train(
                shape,
                {
                    **{"max_steps": args.steps, "warmup_steps": 2, "early_stopping_patience": None},
                    **{"global_batch_size": 4, "num_ranks": 1, "memory_gib": gib},
                },
                base=work / "base",
                dataset=work / "dataset",
                work=work,
                timeout=280,
            )
    finally:
        shutil.rmtree(work, ignore_errors=True)
    say(done.show(WARM_UP))
    (args.out_dir / f"capped_{shape}.log").write_text("\n".join(done.log))
    rate = done.tokens_per_second(WARM_UP)
    return {"tokens_per_second": rate, "losses": done.losses, **done.summary}


if __name__ == "__main__":
    main()
