"""Time whole QLoRA steps of models that are too large to build, scaled to their full depth.

    PYTHONPATH=components:kernels python kernels/benchmarks/scaled_step.py --out-dir results

The true widths of two mixtures of experts, Qwen3-30B-A3B and Mixtral-8x7B, and of Llama-3.1-70B,
cut to a few layers and to fewer still; random weights in NF4, experts included; LoRA r=16 on
attention and on all experts (Llama: on all linears), adapters float32, 8-bit FlatAdamW; 4 x 2048
random tokens (Llama: 2 x 2048). `lean` recomputes the most and keeps the input embedding on the
host; `free` stores all activations. Milliseconds and peak memory at full depth are those of the
larger model plus the missing layers times the difference per layer of the two models.

`stock` runs transformers' layers with the experts' op and the fused loss, checkpointed in `lean`.
`unsloth` loads the same widths by its own loader under bf16 autocast, with torch's fused AdamW and
queries of a fixed length: in `lean` with its own checkpointing and the embedding on the host, in
`free` without checkpointing. Give each of its cases a process of its own (`--cases unsloth/lean`),
because Unsloth changes transformers globally.
"""

from __future__ import annotations

import argparse
import csv
import gc
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import peers
import torch
from train_step import SHAPES as DENSE
from train_step import TARGETS, quantize, run_steps


class Shape(NamedTuple):
    """A model's sizes, and what is built of it."""

    family: str
    """Prefix of the names of transformers' classes."""
    sizes: dict[str, Any]
    """Fields of the config."""
    layers: tuple[int, int, int]
    """Layers of the model, of the cut and of the smaller cut."""
    rows: int = 4
    """Rows of 2048 tokens per step."""

    @property
    def has_experts(self) -> bool:
        """Whether a token passes through some of many expert networks."""
        return "num_experts_per_tok" in self.sizes


SHAPES = {
    "qwen3-30b-a3b": Shape(
        "Qwen3Moe",
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "max_position_embeddings": 40960,
        },
        (48, 8, 2),
    ),
    "mixtral-8x7b": Shape(
        "Mixtral",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 32768,
        },
        (32, 2, 1),
    ),
    "llama-3.1-70b": Shape(
        "Llama",
        {
            **DENSE["llama-3.1-8b"][1],
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_attention_heads": 64,
        },
        (80, 8, 4),
        rows=2,
    ),
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LENGTH = 2048


def main() -> None:
    """Time every shape in every mode and write one CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument(
        "--cases", nargs="+", default=["tuneline/lean", "tuneline/free"],
        help="ENGINE/MODE or ENGINE/MODE/attention, which adapts no expert",
    )  # fmt: skip
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out-dir", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    args.out_dir.mkdir(parents=True, exist_ok=True)
    rows = []
    for shape in args.shapes:
        for case in args.cases:
            rows.append(run_case(shape, case, args))
            print(" ".join(f"{k}={v}" for k, v in rows[-1].items()), flush=True)
    with (args.out_dir / "scaled_step.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def run_case(shape: str, case: str, args: argparse.Namespace) -> dict[str, Any]:
    """Time both cuts of a model and scale them to its depth."""
    engine, mode, *rest = case.split("/")
    depth, most, fewest = SHAPES[shape].layers
    rows = SHAPES[shape].rows
    results = {}
    for layers in (most, fewest):
        profile = args.profile and layers == most
        path = args.out_dir / f"profile_{shape}_{case.replace('/', '_')}.txt"
        results[layers] = run(
            shape, engine, mode, layers, experts=not rest,
            request={
                "rows": rows, "length": LENGTH, "warmup": args.warmup, "steps": args.steps,
                "profile": str(path) if profile else None,
            },
        )  # fmt: skip
        print(shape, case, layers, results[layers], flush=True)
    large, small = results[most], results[fewest]

    def scaled(name: str) -> float:
        return large[name] + (depth - most) * (large[name] - small[name]) / (most - fewest)

    return {
        "engine": engine,
        "model": shape,
        "mode": "/".join([mode, *rest]),
        "shape": f"{rows}x{LENGTH}",
        "metric": "step",
        "unit": "ms",
        "layers": most,
        "median": round(large["ms"], 1),
        "per_layer": round((large["ms"] - small["ms"]) / (most - fewest), 2),
        "full_depth_ms": round(scaled("ms"), 1),
        "tokens_per_second": round(rows * LENGTH / scaled("ms") * 1e3),
        "peak_allocated_gib": round(large["gib"], 2),
        "full_depth_gib": round(scaled("gib"), 2),
        "first_loss": round(large["loss"], 4),
        "device": torch.cuda.get_device_name(),
        "versions": f"torch {torch.__version__}",
    }


def run(
    shape: str, engine: str, mode: str, layers: int, *, experts: bool, request: dict[str, Any]
) -> dict[str, float]:
    """Build a model of a few layers, and return a step's time and peak memory, and its loss."""
    from tuneline.kernels import FlatAdamW, patch

    if engine == "unsloth":
        return run_unsloth(shape, mode, layers, request, experts=experts)
    model = build(shape, layers, experts)
    if engine == "stock":
        from tuneline.kernels import patching

        # Without layers in the table, `patch` exchanges the loss alone.
        with_table, patching.family_spec = patching.family_spec, lambda layer: None
        report = patch(model)
        patching.family_spec = with_table
        if mode == "lean":
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
    else:
        host = mode == "lean"
        report = patch(model, budget="lean" if host else "auto", tables_on_host=host)
        assert not report.unfused, str(report)
    assert report.loss == "fused", str(report)
    model.train()
    optimizer = FlatAdamW([p for p in model.parameters() if p.requires_grad], 1e-4, state_bits=8)
    start = time.perf_counter()
    answer = run_steps(model, optimizer, request)
    seconds = time.perf_counter() - start
    del model, optimizer
    gc.collect()
    torch.cuda.empty_cache()
    times = answer["milliseconds"]
    return {
        "ms": statistics.median(times),
        "fastest": min(times),
        "gib": answer["peak_allocated_gib"],
        "reserved": answer["peak_reserved_gib"],
        "loss": answer["losses"][0],
        "last_loss": answer["losses"][-1],
        "seconds": seconds,
    }


class Autocast:
    """A model that is called under bf16 autocast, as trainers do."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, **inputs: Any) -> Any:
        """Run the model."""
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return self.model(**inputs)

    def get_input_embeddings(self) -> Any:
        """Return the module of embeddings, whose size says how many tokens there are."""
        return self.model.get_input_embeddings()


def run_unsloth(
    shape: str, mode: str, layers: int, request: dict[str, Any], *, experts: bool
) -> dict[str, float]:
    """Do what `run` does with Unsloth, from a checkpoint written for it."""
    os.environ.update(peers.UNSLOTH[f"4x2048/{mode}"].environment)
    import unsloth  # noqa: F401, I001  (before transformers, as it asks)

    with tempfile.TemporaryDirectory() as directory:
        peers.write_checkpoint(stock_model(shape, layers), Path(directory))
        torch.cuda.empty_cache()
        targets = TARGETS if experts else ATTENTION
        model = peers.unsloth_model(Path(directory), f"4x2048/{mode}", targets)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    print("unsloth adapts", sum(p.numel() for p in trained), trained[0].dtype, flush=True)
    optimizer = torch.optim.AdamW(trained, 1e-4, fused=True)
    answer = run_steps(Autocast(model), optimizer, request)
    times = answer["milliseconds"]
    return {
        "ms": statistics.median(times),
        "fastest": min(times),
        "gib": answer["peak_allocated_gib"],
        "loss": answer["losses"][0],
        "last_loss": answer["losses"][-1],
    }


def stock_model(shape: str, layers: int) -> Any:
    """Return the random model in bf16."""
    import transformers

    family, sizes, *_ = SHAPES[shape]
    cut = {**sizes, "num_hidden_layers": layers}
    config = getattr(transformers, f"{family}Config")(
        **cut, dtype="bfloat16", tie_word_embeddings=False
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    torch.set_default_dtype(torch.float32)
    return model


def build(shape: str, layers: int, experts: bool) -> Any:
    """Return the random model in NF4 with its adapters."""
    from peft import LoraConfig, get_peft_model

    from tuneline.models.experts.adapter import ParamWrapper

    model = stock_model(shape, layers)
    has_experts = SHAPES[shape].has_experts
    if has_experts:
        quantize_experts(model)
    quantize(model)
    model.requires_grad_(False)
    lora = LoraConfig(
        r=16,
        lora_alpha=16,
        target_modules=TARGETS if experts and not has_experts else ATTENTION,
        target_parameters=EXPERTS if experts and has_experts else None,
        task_type="CAUSAL_LM",
    )
    lora._register_custom_module({type(m): ParamWrapper for m in expert_modules(model)})
    model = get_peft_model(model, lora, autocast_adapter_dtype=True)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return model


def expert_modules(model: Any) -> list[Any]:
    """Return the modules of experts, in older transformers too."""
    return [m for name, m in model.named_modules() if name.endswith("mlp.experts")]


def quantize_experts(model: Any) -> None:
    """Quantise the stacks of experts in place, as `ExpertsQuantizer` does when it loads them."""
    from tuneline.models.experts import Stack, quantize_stack
    from tuneline.models.experts.forward import IMPLEMENTATION

    for module in expert_modules(model):
        module.nf4_stacks, module.nf4_lora = {}, {}
        module.__dict__.setdefault("has_post_expert_norm", False)  # transformers 5.17 has none.
        for projection in ("gate_up_proj", "down_proj"):
            weight = getattr(module, projection)
            packed, buffers = quantize_stack(weight.data)
            module.nf4_stacks[projection] = Stack(*weight.shape, bool(module.is_transposed))
            setattr(module, projection, torch.nn.Parameter(packed, requires_grad=False))
            for what, tensor in buffers.items():
                module.register_buffer(f"{projection}_{what}", tensor)
            del weight
    model.set_experts_implementation(IMPLEMENTATION)


if __name__ == "__main__":
    main()
