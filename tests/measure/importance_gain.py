"""Compare formats with and without an importance matrix on a tuned model; run by hand.

    python tests/measure/importance_gain.py --merged DIR --gguf DIR --dataset DIR

Takes the outputs of merge, convert-gguf and prepare of a finished run, measures the importance
matrix on training rows, and prints KL divergence, top-1 agreement and perplexity on held-out rows,
with and without the matrix.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from tuneline.quantize import QuantizeConfig
from tuneline.quantize.gguf import export
from tuneline.quantize.gguf.importance import FILE, measure_importance
from tuneline.quantize.gguf.llama_model import LlamaFile
from tuneline.quantize.machine import few_threads
from tuneline.quantize.proof import quality, reference

FORMATS = ("q5_k_m", "q4_k_m", "q4_0", "q3_k_m", "q2_k")


def main() -> None:
    """Measure the formats and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("--merged", "--gguf", "--dataset"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--weighed-only", nargs="*", default=("iq3_m", "iq2_m", "iq2_xs", "iq1_m"))
    parser.add_argument("--num-importance-rows", type=int, default=128)
    parser.add_argument("--num-prompts", type=int, default=32)
    arguments = parser.parse_args()
    f16_dir, dataset_dir = arguments.gguf, arguments.dataset
    with tempfile.TemporaryDirectory() as scratch, few_threads():
        record = measure_importance(
            QuantizeConfig(num_importance_rows=arguments.num_importance_rows),
            gguf_dir=str(f16_dir),
            dataset_dir=str(dataset_dir),
            importance_dir=f"{scratch}/importance",
        )
        print(f"{record.num_rows} rows, {record.num_tokens} tokens, {record.seconds:.1f} s")
        merged = reference.measure(
            arguments.merged,
            dataset_dir=dataset_dir,
            num_rows=arguments.num_prompts,
            num_tokens=1,
        )
        for format in [*arguments.formats, *arguments.weighed_only]:
            for importance in (None, Path(scratch, "importance", FILE)):
                if importance is None and format in arguments.weighed_only:
                    continue
                target = Path(tempfile.mkdtemp(dir=scratch))
                file = export.quantise(f16_dir, target, format=format, importance=importance)
                with LlamaFile(file, num_context=merged.num_context) as loaded:
                    logits = (torch.from_numpy(loaded.logits(row.ids)) for row in merged.rows)
                    distance = quality.compare(merged.rows, merged.logits, logits)
                print(
                    f"{format:8} {'weighed' if importance else 'plain':8} "
                    f"{file.stat().st_size / 1e6:6.1f} MB  KL {distance.mean_kl:.4f}  "
                    f"top-1 {distance.top1_agreement:.1%}  perplexity {distance.perplexity:.4f} "
                    f"({distance.reference_perplexity:.4f})",
                    flush=True,
                )
                file.unlink()


if __name__ == "__main__":
    main()
