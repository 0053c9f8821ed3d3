"""Recipes, models and a cluster for the tests of plan.

Of a model, config.json and the headers of the weight files are real, without the weights.
"""

import json
from pathlib import Path
from typing import Any

from tuneline import images
from tuneline.pipelines import kube
from tuneline.pipelines.catalog import find_recipe
from tuneline.pipelines.plan.check import Check
from tuneline.pipelines.plan.model_facts import ModelFacts, model_facts
from tuneline.pipelines.plan.model_files import ModelFiles
from tuneline.pipelines.plan.plan import plan
from tuneline.recipe import Recipe

LLAMA = 8.03e9


def recipe(*assignments: str, profile: str = "h100") -> Recipe:
    placement = [f"placement.profile={profile}", "placement.registry=local"]
    return find_recipe("llama3-8b-instruct", [*placement, *assignments])


def verdicts(checks: list[Check]) -> dict[str, str]:
    order = ("ok", "unknown", "warn", "fail")
    worst: dict[str, str] = {}
    for check in checks:
        known = worst.get(check.name, "ok")
        worst[check.name] = max(known, check.verdict, key=order.index)
    return worst


CLUSTER = recipe("placement.cache_claim=cache", "placement.queue=team")
ALL_IMAGES = [
    {"names": [name, f"{name.partition(':')[0]}@sha256:{'0' * 64}"]}
    for name in (images.LIGHT, images.TRAIN, images.EVALUATE, images.PUBLISH, images.GGUF,
                 images.GPTQ)
]  # fmt: skip
NODE = {
    "spec": {"taints": [{"key": "nvidia.com/gpu", "effect": "NoSchedule"}]},
    "status": {
        "allocatable": {"nvidia.com/gpu": "8", "cpu": "200", "memory": "2000Gi"},
        "images": ALL_IMAGES,
    },
    "metadata": {"labels": {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}},
}


CONTROLLER = Path(__file__).parents[1] / "data/kfp-2.17/workflow-controller-configmap.json"


def look(loaded: Recipe = CLUSTER) -> list[Check]:
    return plan(loaded, kube=kube.Kube("kubeflow"))


Shapes = dict[str, tuple[int, ...]]


def attention(layer: int, hidden: int, query: int, key_value: int) -> Shapes:
    stem = f"model.layers.{layer}.self_attn"
    widths = {"q_proj": query, "k_proj": key_value, "v_proj": key_value}
    shapes: Shapes = {f"{stem}.{name}.weight": (width, hidden) for name, width in widths.items()}
    return {**shapes, f"{stem}.o_proj.weight": (hidden, query)}


def mlp(stem: str, hidden: int, width: int) -> Shapes:
    return {
        f"{stem}.gate_proj.weight": (width, hidden),
        f"{stem}.up_proj.weight": (width, hidden),
        f"{stem}.down_proj.weight": (hidden, width),
    }


def ends(hidden: int, vocab: int) -> Shapes:
    return {"model.embed_tokens.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden)}


def llama_8b() -> tuple[dict[str, Any], Shapes]:
    config = {
        **{"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336},
        "vocab_size": 128256,
    }
    shapes = ends(4096, 128256)
    for layer in range(32):
        shapes |= attention(layer, 4096, 4096, 1024)
        shapes |= mlp(f"model.layers.{layer}.mlp", 4096, 14336)
    # A buffer of old files, which is no weight.
    shapes["model.layers.0.self_attn.rotary_emb.inv_freq"] = (64,)
    return config, shapes


def qwen3_30b_a3b() -> tuple[dict[str, Any], Shapes]:
    config = {
        **{"model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48},
        **{"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128},
        **{"intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128},
        **{"num_experts_per_tok": 8, "vocab_size": 151936},
    }
    shapes = ends(2048, 151936)
    for layer in range(48):
        shapes |= attention(layer, 2048, 4096, 512)
        shapes[f"model.layers.{layer}.mlp.gate.weight"] = (128, 2048)
        for expert in range(128):
            shapes |= mlp(f"model.layers.{layer}.mlp.experts.{expert}", 2048, 768)
    # A layer for multi-token prediction, which transformers does not load.
    shapes |= attention(48, 2048, 4096, 512)
    return config, shapes


def facts_of(config: dict[str, Any], shapes: Shapes) -> ModelFacts:
    return model_facts(
        ModelFiles(config, {name: ("BF16", shape) for name, shape in shapes.items()})
    )


def header(shapes: Shapes, dtype: str = "BF16") -> bytes:
    """Return the beginning of a safetensors file, which has no weights behind it."""
    entries = {
        name: {"dtype": dtype, "shape": list(shape), "data_offsets": [0, 0]}
        for name, shape in shapes.items()
    }
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    return len(text).to_bytes(8, "little") + text


def files_of(config: dict[str, Any], shapes: Shapes, num_files: int = 1) -> dict[str, bytes]:
    files = {"config.json": json.dumps(config).encode()}
    if num_files == 1:
        return {**files, "model.safetensors": header(shapes)}
    weight_map = {}
    for number in range(num_files):
        part = dict(list(shapes.items())[number::num_files])
        file = f"model-{number + 1:05}-of-{num_files:05}.safetensors"
        files[file] = header(part)
        weight_map |= dict.fromkeys(part, file)
    files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    return files


def write(path: Path, files: dict[str, bytes]) -> str:
    path.mkdir()
    for name, content in files.items():
        (path / name).write_bytes(content)
    return str(path)
