"""plan: a model's sizes from its config.json and the headers of its weight files."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import TOKEN, Hub, new_repo
from plan_cases import (
    Shapes,
    facts_of,
    files_of,
    header,
    llama_8b,
    qwen3_30b_a3b,
    recipe,
    verdicts,
    write,
)

from tuneline.pipelines.plan.base_model import read_base_model
from tuneline.pipelines.plan.estimate import estimate
from tuneline.pipelines.plan.model_facts import model_facts
from tuneline.pipelines.plan.model_files import Unknown, read_model
from tuneline.pipelines.plan.plan import plan
from tuneline.train.config import LoraConfig
from tuneline.train.memory.estimate import GIB


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield server
    server.close()


def test_sizes_of_a_dense_model(tmp_path: Path) -> None:
    facts = model_facts(read_model(write(tmp_path / "model", files_of(*llama_8b()))))
    # The published model has 8,030,261,248 parameters; the norms are not in this header.
    assert facts.num_parameters == 8_030_261_248 - 65 * 4096 == facts.num_active
    shape = facts.shape(LoraConfig())
    assert (shape.num_layers, shape.hidden, shape.mlp, shape.key_value) == (32, 4096, 14336, 1024)
    assert shape.num_quantized == 32 * 218_103_808
    assert shape.num_adapter == 41_943_040
    assert facts.shape(LoraConfig(target_modules=("q_proj",))).num_adapter == 4_194_304


def test_sizes_of_a_mixture_of_experts_on_the_hub(hub: Hub) -> None:
    hub.repos["org/model"] = new_repo(**files_of(*qwen3_30b_a3b(), num_files=16))
    facts = model_facts(read_model("org/model"))
    assert facts.num_parameters == pytest.approx(30.53e9, rel=1e-3)
    assert facts.num_active == pytest.approx(3.35e9, rel=1e-2)
    assert facts.experts is not None
    found = facts.experts
    assert (found.num_layers, found.num_experts, found.top_k, found.width) == (48, 128, 8, 768)
    assert facts.shape(LoraConfig()).num_adapter == 16 * 48 * (2048 + 4096 + 2 * 2560 + 6144)
    with_experts = facts.shape(LoraConfig(experts=True)).num_adapter
    assert with_experts - facts.shape(LoraConfig()).num_adapter == (
        16 * 48 * 128 * (2048 + 2 * 768 + 768 + 2048)
    )
    # config.json, the index, and the first bytes of each file.
    assert sum("model-0" in line for line in hub.requests) <= 2 * 16
    assert len(hub.requests) <= 2 + 2 * 16


def test_the_words_for_a_mixture_of_experts(hub: Hub) -> None:
    hub.repos["org/model"] = new_repo(**files_of(*qwen3_30b_a3b(), num_files=2))
    loaded = recipe("base_model=org/model", "train.max_steps=100", profile="a100-40g")
    checks = {check.name: check for check in plan(loaded, model=read_base_model(loaded))}
    assert checks["base model"].words == (
        "org/model: 30.5 B parameters, of which 3.35 B compute each token: 8 of 128 experts"
    )
    assert checks["GPU memory"].verdict == "ok"
    # In 16 bits the weights alone take 57 GiB: said before the run.
    plain = recipe("base_model=org/model", "train.load_in_4bit=false", profile="a100-40g")
    found = plan(plain, model=read_base_model(plain))
    assert verdicts(found)["GPU memory"] == "fail"


def test_speed_follows_the_active_parameters(hub: Hub) -> None:
    hub.repos["org/dense"] = new_repo(**files_of(*llama_8b()))
    hub.repos["org/experts"] = new_repo(**files_of(*qwen3_30b_a3b()))
    loaded = recipe(profile="h100")
    speeds = []
    for name in ("org/dense", "org/experts"):
        facts = model_facts(read_model(name))
        speeds.append(estimate(loaded, facts.num_parameters, facts).tokens_per_second or 0)
    assert speeds[0] == pytest.approx(16_927, rel=0.01)
    assert 10_000 < speeds[1] < 20_000


@pytest.mark.parametrize(
    ("dtype", "stored", "num_parameters"),
    [
        # bitsandbytes: two 4-bit numbers in a byte, and scales that are no parameters.
        ("U8", {"q_proj.weight": (32, 1), "q_proj.weight.absmax": (1,)}, 64),
        ("U8", {"q_proj.weight": (32, 1), "q_proj.weight.quant_state.bitsandbytes__nf4": (9,)}, 64),
        ("F8_E4M3", {"q_proj.weight": (8, 8), "q_proj.weight_scale_inv": (1, 1)}, 64),
    ],
)
def test_quantised_weights_are_counted_as_what_they_stand_for(
    tmp_path: Path, dtype: str, stored: Shapes, num_parameters: int
) -> None:
    config = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8}
    shapes = {f"model.layers.0.self_attn.{name}": shape for name, shape in stored.items()}
    files = {"config.json": json.dumps(config).encode(), "model.safetensors": header(shapes, dtype)}
    facts = model_facts(read_model(write(tmp_path / "model", files)))
    assert facts.num_parameters == num_parameters
    assert facts.shape(LoraConfig(r=1)).num_adapter == 16


def test_a_model_that_cannot_be_read_is_known_by_name(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def reason(source: str) -> str:
        with pytest.raises(Unknown) as caught:
            model_facts(read_model(source))
        return str(caught.value)

    assert reason("org/none") == "it has no config.json" or "no such model" in reason("org/none")
    assert "built-in" in reason("builtin:smollm2-135m")
    assert "not a directory" in reason("./nowhere")
    hub.repos["org/broken"] = new_repo(**{"config.json": b"[]", "model.safetensors": b""})
    assert reason("org/broken") == "its config.json is broken"
    hub.repos["org/odd"] = new_repo(**{"config.json": b"{}", "model.safetensors": b"\0" * 20})
    assert reason("org/odd") == "model.safetensors is not a safetensors file"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert reason("org/model-8b") == "HF_HUB_OFFLINE is set"
    loaded = recipe("base_model=org/model-8b")
    checks = plan(loaded, model=read_base_model(loaded))
    (words,) = [check.words for check in checks if check.name == "base model"]
    assert words == (
        "org/model-8b is known by its name only, because HF_HUB_OFFLINE is set: a Llama of 8 B "
        "parameters is assumed"
    )
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached from here" in reason("org/model-8b")


def test_the_memory_of_a_known_model_is_that_of_the_train_step() -> None:
    facts = facts_of(*llama_8b())
    loaded = recipe(profile="a10g")
    known = estimate(loaded, facts.num_parameters, facts).gpu_bytes / GIB
    assert known == pytest.approx(estimate(loaded, 8.03e9).gpu_bytes / GIB, rel=0.01)
