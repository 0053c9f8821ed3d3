"""Measure how many rows per second the evaluate step scores and answers, beside lm-eval's own way.

    python tests/measure/gpu/evaluate_on_gpu.py                  an 8B shape on one GPU
    python tests/measure/gpu/evaluate_on_gpu.py --ways stock new without lm-eval's way
    python tests/measure/gpu/evaluate_on_gpu.py --parts generation --old-rows 64
    python tests/measure/gpu/evaluate_on_gpu.py --shape small --device cpu --rows 24 --new-tokens 24

    choices      log likelihoods of four short answers per prompt
    answers      log likelihood of one long answer per prompt
    generation   greedy generation; random weights never stop, so all answers have full length

Prompts and answers have lengths like those of GSM8K. "old" is the class HFLM of lm-eval with
batches of 8, which have less padding the more rows there are to sort; "new" is the class that the
evaluate step uses, with batches that fill the memory; and "stock" is that class without fused
layers. The weights are random. Prints rows per second, peak memory, and the largest difference of
the log likelihoods of each pair of ways: "old" computes them in the model's dtype, "stock" and
"new" in float32 from the same head.
"""

import argparse
import gc
import itertools
import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

from gpu_inputs import GIB, SHAPES, gsm8k_lengths, say

PARTS = ("choices", "answers", "generation")
WAYS = ("old", "stock", "new")


def main() -> None:
    """Run each part in each way."""
    from tuneline.kernels.inference import runs_fused

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="Llama-3.1-8B")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, default=512, help="rows of each part")
    parser.add_argument("--old-rows", type=int, help="rows of the old way; default: all")
    parser.add_argument("--new-tokens", type=int, default=256, help="length of generated answers")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    args = parser.parse_args()
    lm = load(args.shape, args.device)
    say(f"{args.shape} in {lm.model.dtype} on {name_of(args.device)}, {lm.batches} per batch")
    say(f"fused layers for log likelihoods: {'yes' if runs_fused(lm.model) else 'no'}")
    for part in args.parts:
        speeds = {}
        results = {}
        for way in args.ways:
            if part == "generation" and way == "stock":
                # Generation always runs the stock layers.
                continue
            num_rows = args.rows
            if way == "old":
                num_rows = min(args.rows, args.old_rows or args.rows)
            requests, compute = prepare(lm, part, way, num_rows, args.new_tokens)
            # The first rows warm up the device. Fused layers are compiled for several lengths.
            compute(requests if way == "new" and part != "generation" else requests[:8])
            speeds[way], results[way] = measure(lm, part, way, num_rows, requests, compute)
        for one, other in itertools.combinations(speeds, 2):
            line = f"{part}: {other} is {speeds[other] / speeds[one]:.2f} x as fast as {one}"
            if part != "generation":
                pairs = zip(results[one], results[other], strict=False)
                gaps = [abs(a[0] - b[0]) for a, b in pairs]
                line += (
                    f"; log likelihoods differ by {max(gaps):.3g} at most, "
                    f"{sum(gaps) / len(gaps):.3g} on average"
                )
            say(line)


def load(shape: str, device: str) -> Any:
    """Return a model of random weights for lm-eval, with a tokenizer of words."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    from tuneline.evaluate.model import TemplatedHFLM
    from tuneline.models.batches import Batches

    family, sizes = SHAPES[shape]
    config = getattr(transformers, f"{family}Config")(**{**sizes, "max_position_embeddings": 8192})
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{n}": n for n in range(3, 512)}
    words: Any = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        auto: Any = transformers.AutoModelForCausalLM
        model = auto.from_config(config, dtype=dtype).eval()
    lm = TemplatedHFLM(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=8)
    lm.batches = Batches.that_fit(model)
    return lm


def prepare(
    lm: Any, part: str, way: str, num_rows: int, num_new: int
) -> tuple[list[Any], Callable[[list[Any]], list[Any]]]:
    """Return the requests of a part, and the function that computes them."""
    from lm_eval.models.huggingface import HFLM

    draw = random.Random(0)
    # More than enough, so that both ways compute the same first rows.
    lengths = gsm8k_lengths(600 * num_rows)[:num_rows]

    def tokens(count: int) -> list[int]:
        return [draw.randrange(3, 512) for _ in range(max(1, count))]

    requests: list[Any] = []
    settings = {"until": ["\n\n"], "max_gen_toks": num_new, "do_sample": False}
    for length in lengths:
        prompt = tokens(length // 2)
        if part == "generation":
            text = " ".join(f"w{id}" for id in prompt)
            requests.append(SimpleNamespace(args=(text, settings)))
            continue
        answers = [length // 2] if part == "answers" else [draw.randint(1, 12) for _ in range(4)]
        requests += [(None, prompt, tokens(count)) for count in answers]
    method = "generate_until" if part == "generation" else "_loglikelihood_tokens"
    if way == "new":
        return requests, getattr(lm, method)
    if way == "stock":
        return requests, with_stock_layers(getattr(lm, method))

    def compute(some: list[Any]) -> list[Any]:
        lm.batch_size_per_gpu = 8
        results: list[Any] = getattr(HFLM, method)(lm, some, disable_tqdm=True)
        return results

    return requests, compute


def with_stock_layers(compute: Callable[[list[Any]], list[Any]]) -> Callable[[list[Any]], Any]:
    """Return a function that scores without fused layers."""
    from tuneline.models import likelihood

    def compute_stock(some: list[Any]) -> list[Any]:
        with mock.patch.object(likelihood, "_fused_layers", lambda model: nullcontext()):
            return compute(some)

    return compute_stock


def measure(
    lm: Any,
    part: str,
    way: str,
    num_rows: int,
    requests: list[Any],
    compute: Callable[[list[Any]], list[Any]],
) -> tuple[float, list[Any]]:
    """Compute the requests; print and return rows per second, and return the results."""
    import torch

    gc.collect()
    on_gpu = lm.model.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    results = compute(requests)
    seconds = time.perf_counter() - began
    memory = f", peak {torch.cuda.max_memory_allocated() / GIB:.2f} GiB" if on_gpu else ""
    say(f"{part}, {way}: {num_rows / seconds:.2f} rows per second, {seconds:.1f} s{memory}")
    return num_rows / seconds, results


def name_of(device: str) -> str:
    """Return the name of a device."""
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else device


if __name__ == "__main__":
    main()
