"""plan: the estimate against measured steps, and the checks that need no cluster."""

import subprocess
import sys
from typing import Any

import pytest
from plan_cases import (
    LLAMA,
    attention,
    ends,
    facts_of,
    llama_8b,
    look,
    mlp,
    recipe,
    verdicts,
)

from tuneline.artifacts import DatasetManifest
from tuneline.errors import RecipeError
from tuneline.gpu_profiles import GPU_PROFILES
from tuneline.pipelines.plan.estimate import estimate, llama_shape, parameters_in_name
from tuneline.pipelines.plan.host_memory import host_memory
from tuneline.pipelines.plan.optimizer_steps import check_optimizer_steps
from tuneline.pipelines.plan.plan import plan
from tuneline.placement import PlacementConfig
from tuneline.recipe import Recipe
from tuneline.train.batch_size import batch_size
from tuneline.train.config import LoraConfig
from tuneline.train.memory.estimate import GIB, estimate_memory
from tuneline.train.memory.plan import recipe_plan, run_settings
from tuneline.version import VERSION


def test_a_size_gives_the_shape_of_a_llama() -> None:
    # Its config: 32 layers of 4096, 14336 in the MLP, 1024 for keys; and its LoRA of seven modules.
    shape = llama_shape(LLAMA, LoraConfig())
    assert (shape.num_layers, shape.hidden, shape.mlp, shape.key_value) == (32, 4096, 14336, 1024)
    assert shape.num_quantized + shape.num_other == int(LLAMA)
    assert shape.num_adapter == 41_943_040
    assert llama_shape(LLAMA, LoraConfig(target_modules=("q_proj",))).num_adapter == 4_194_304
    # Small ones are off by their embeddings, not by their size.
    small = llama_shape(1.345e8, LoraConfig())
    assert small.num_quantized + small.num_other == pytest.approx(1.345e8)


@pytest.mark.parametrize("profile", ["t4", "a100-80g", "h100"])
@pytest.mark.parametrize("changes", [
    {}, {"kernels": "off"}, {"gradient_checkpointing": False, "kernels": "off"},
    {"micro_batch_size": 4}, {"load_in_4bit": False}, {"kernels": "fp8"},
    {"dtype": "float16"}, {"dtype": "float32"},
])  # fmt: skip
def test_plan_and_train_go_by_one_estimate(profile: str, changes: dict[str, Any]) -> None:
    loaded = recipe(profile=profile)
    loaded = loaded.model_copy(update={"train": loaded.train.model_copy(update=changes)})
    manifest = DatasetManifest.model_construct(method="sft", max_seq_length=2048)
    # As train itself settles it, on the model's own config; a T4 has no bfloat16.
    auto = "float32" if profile == "t4" else "bfloat16"
    own_dtype = auto if loaded.train.dtype == "auto" else loaded.train.dtype
    size = batch_size(loaded.train, 1)
    settings = run_settings(
        loaded.train,
        manifest,
        recipe_plan(loaded.train, size, manifest.max_seq_length),
        itemsize=4 if own_dtype == "float32" else 2,
        optimizer=loaded.train.optim,
        device="cuda",
        fused=loaded.train.kernels != "off" and profile != "t4",
    )
    known = estimate_memory(llama_shape(LLAMA, loaded.train.lora), settings).total
    assert estimate(loaded, LLAMA).gpu_bytes == known


def test_tables_of_an_assumed_llama_are_those_of_a_real_one() -> None:
    table = 128256 * 4096
    for saved, sizes in (
        ((), (2 * table, table)),
        (("lm_head",), (table, 0)),
        (("embed_tokens",), (table, table)),
        (("embed_tokens", "lm_head"), (0, 0)),
    ):
        lora = LoraConfig(modules_to_save=saved)
        assumed = llama_shape(LLAMA, lora)
        known = facts_of(*llama_8b()).shape(lora)
        assert (assumed.num_tables, assumed.num_copied) == sizes
        assert (known.num_tables, known.num_copied) == sizes
    # What train does last to fit is in the estimate, but not with ZeRO-2.
    found = estimate(recipe(), LLAMA)
    assert found.single_gpu_bytes - found.least_gpu_bytes > table
    sharded = recipe("placement.num_accelerators=2", "train.sharding=zero2")
    assert estimate(sharded, LLAMA).least_gpu_bytes == estimate(sharded, LLAMA).single_gpu_bytes


def test_several_gpus_divide_the_optimizer_and_the_time() -> None:
    steps = ("train.max_steps=100", "train.global_batch_size=16")
    one = recipe(*steps)
    eight = recipe(*steps, "placement.num_accelerators=8")
    sixteen = recipe(
        *steps, "placement.num_accelerators=8", "placement.num_nodes=2",
        "placement.shared_claim=shared",
    )  # fmt: skip
    found = [estimate(each, LLAMA) for each in (one, eight, sixteen)]
    assert [each.num_gpus for each in found] == [1, 8, 16]
    assert len({each.gpu_hours for each in found}) == 1
    hours = [each.hours or 0 for each in found]
    assert hours[0] == pytest.approx(8 * hours[1]) == pytest.approx(16 * hours[2])
    assert found[1].gpu_bytes == found[0].gpu_bytes
    # 8-bit moments on one; an eighth of fp32 gradients and moments on eight.
    zero2 = estimate(recipe(*steps, "placement.num_accelerators=8", "train.sharding=zero2"), LLAMA)
    bytes_a_parameter = (found[0].gpu_bytes - zero2.gpu_bytes) / 41_943_040
    assert bytes_a_parameter == pytest.approx((4 + 2) - (4 + 8) / 8, rel=0.01)
    words = {check.name: check.words for check in plan(sixteen)}
    assert words["time"].endswith("on 16 GPUs at best")
    assert words["ranks"] == "16 ranks and a global batch of 16 examples"


def test_gpus_that_cannot_share_a_step_are_told_so() -> None:
    (found,) = [
        each for each in plan(recipe("placement.num_accelerators=3")) if each.name == "ranks"
    ]
    assert (found.verdict, found.words) == (
        "fail",
        "3 ranks and a global batch of 8 examples, which they cannot divide equally",
    )  # fmt: skip
    with pytest.raises(
        RecipeError, match=r"size is 8, .* 16 ranks \(2 nodes x 8 GPUs\): .* multiple of 16"
    ):
        recipe("placement.num_accelerators=8", "placement.num_nodes=2", "placement.shared_claim=c")


def test_upstreams_batch_names_are_resolved_by_the_ranks_of_the_placement() -> None:
    raw = {"name": "a", "base_model": "org/m-8b", "dataset": "d", "publish_to": "dir:p"}
    loaded = Recipe.parse(
        {
            **raw,
            "train": {"per_device_train_batch_size": 2, "max_steps": 10},
            "placement": {"profile": "h100", "num_accelerators": 3},
        }
    )
    checks = {check.name: check for check in plan(loaded)}
    assert checks["ranks"].words == "3 ranks and a global batch of 24 examples"
    assert checks["batch size"].verdict == "warn"
    assert checks["batch size"].advice == (
        "write train.global_batch_size: 24 and train.micro_batch_size: 2 instead"
    )
    assert estimate(loaded, LLAMA).num_tokens == 10 * 24 * 2048


@pytest.mark.parametrize(
    ("profile", "assignments", "found"),
    [
        ("t4", [], ("ok", "PyTorch's, because t4 is older than Ampere")),
        ("t4", ['train.kernels="off"'], None),
        ("a10g", [], None),
        ("h100", ["train.kernels=fp8"], None),
        ("local", ["train.kernels=fp8"], None),
        ("h100", ["train.kernels=fp8", "placement.num_accelerators=0"], (
            "fail", "train.kernels is fp8, which needs a GPU, but placement.num_accelerators is 0",
        )),
    ],
)  # fmt: skip
def test_where_our_kernels_do_not_run_is_told(
    profile: str, assignments: list[str], found: tuple[str, str] | None
) -> None:
    checks = plan(recipe(*assignments, profile=profile))
    kernels = [(each.verdict, each.words) for each in checks if each.name == "kernels"]
    assert kernels == ([found] if found else [])


def test_fp8_in_pods_without_a_gpu_fails(cluster: Any) -> None:
    loaded = recipe("train.kernels=fp8", profile="local")
    loaded = loaded.model_copy(update={"placement": PlacementConfig()})
    assert verdicts(look(loaded))["kernels"] == "fail"


@pytest.mark.parametrize("claim", [None, "shared_claim", "cache_claim"])
def test_a_retry_that_would_start_from_step_0_is_told(claim: str | None) -> None:
    loaded = recipe(*([f"placement.{claim}=c"] if claim else []))
    found = [each.verdict for each in plan(loaded) if each.name == "checkpoints"]
    assert found == ([] if claim else ["warn"])


def test_time_is_what_the_measured_step_took() -> None:
    loaded = recipe(
        "train.global_batch_size=4",
        "train.micro_batch_size=4",
        "train.gradient_checkpointing=false",
        "train.max_steps=1000",
    )
    found = estimate(loaded, LLAMA)
    assert found.num_tokens == 1000 * 4 * 2048
    # docs/numbers.md: an H100 has room for all activations.
    assert found.gpu_hours == pytest.approx(1000 * 4 * 2048 / 16_927 / 3600, rel=0.01)
    changed = loaded.train.model_copy(update={"kernels": "off"})
    plain = estimate(loaded.model_copy(update={"train": changed}), LLAMA)
    assert plain.gpu_hours == pytest.approx(1000 * 0.702 / 3600, rel=0.01)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("meta-llama/Llama-3.1-8B", 8e9), ("Qwen/Qwen2.5-0.5B-Instruct", 5e8),
     ("builtin:smollm2-135m", 1.35e8), ("mistralai/Mistral-7B-v0.3", 7e9),
     ("org/model-v3", None), ("org/abc8bit", None)],
)  # fmt: skip
def test_names_say_how_large_a_model_is(name: str, expected: float | None) -> None:
    assert parameters_in_name(name) == expected


@pytest.mark.parametrize(
    ("profile", "num_parameters", "verdict", "advice"),
    [
        # Train makes eight rows a forward fewer; 70 B parameters it cannot make fewer.
        ("t4", 8e9, "warn", "smaller micro-batches, and more per step, down to 9."),
        # The head, one of the two tables, is copied back for the loss.
        ("a10g", 32e9, "warn", "the head in host memory, down to 19.7 GiB"),
        ("t4", 70e9, "fail", "take a larger GPU"),
        ("a10g", 8e9, "ok", ""),
        ("h100", 8e9, "ok", ""),
    ],
)
def test_a_gpu_that_is_too_small_is_named(
    profile: str, num_parameters: float, verdict: str, advice: str
) -> None:
    loaded = recipe("train.global_batch_size=32", "train.micro_batch_size=8", profile=profile)
    checks = plan(loaded, num_parameters=num_parameters)
    (memory,) = [each for each in checks if each.name == "GPU memory"]
    assert memory.verdict == verdict
    assert f"on {profile}" in memory.words
    assert advice in memory.advice and bool(advice) == bool(memory.advice)


@pytest.mark.parametrize("profile", GPU_PROFILES)
def test_every_gpu_is_checked(profile: str) -> None:
    gpu = GPU_PROFILES[profile]
    # So large that no GPU trains it.
    checks = {each.name: each for each in plan(recipe(profile=profile), num_parameters=2e12)}
    assert checks["GPU memory"].verdict == "fail"
    assert f"of {gpu.memory_bytes / GIB:.1f} GiB on {profile}" in checks["GPU memory"].words
    speed = estimate(recipe(profile=profile), LLAMA).tokens_per_second
    bounds = (13_900, 16_930) if gpu.runs_kernels else (8_290, 8_300)
    assert speed is not None
    assert bounds[0] < speed / gpu.relative_speed < bounds[1]


@pytest.mark.parametrize(
    ("registry", "verdict", "words"),
    [
        ("null", "warn", "so `submit` refuses it"),
        ("local", "ok", "which the nodes must have: they are never pulled"),
        ("host.example/team", "ok", f"host.example/team/*:{VERSION}, which the nodes pull"),
    ],
)
def test_where_the_images_are_is_said_without_a_cluster_too(
    registry: str, verdict: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    loaded = recipe(f"placement.registry={registry}")
    checks = plan(loaded, num_parameters=LLAMA, looks_up=True)
    (found,) = [each for each in checks if each.name == "images"]
    assert found.verdict == verdict and words in found.words
    # A local run needs no images.
    local = plan(recipe(profile="local"), num_parameters=LLAMA, looks_up=True)
    assert not [each for each in local if each.name == "images"]


def test_a_gpu_on_which_nothing_ran_is_a_warning() -> None:
    checks = plan(recipe(profile="mi300x"), num_parameters=LLAMA)
    (gpu,) = [each for each in checks if each.name == "GPU"]
    assert gpu.verdict == "warn"
    assert gpu.words.startswith("mi300x is declared from its data sheet, and tuneline never ran")
    assert "PyTorch for CUDA" in gpu.words and "ROCm" in gpu.advice
    (kernels,) = [each for each in checks if each.name == "kernels"]
    assert kernels.words == "PyTorch's, because mi300x is AMD's"
    assert not [each for each in plan(recipe(), num_parameters=LLAMA) if each.name == "GPU"]


def test_limits_that_the_run_would_hit_fail() -> None:
    loaded = recipe(
        "train.max_steps=100000",
        "placement.steps={train: {timeout_hours: 1}}",
    )  # fmt: skip
    checks = {check.name: check for check in plan(loaded, price_per_gpu_hour=2.0)}
    assert checks["time"].verdict == "fail"
    assert "ended after 1 h" in checks["time"].words
    hours = estimate(loaded, 8e9).gpu_hours
    assert hours is not None
    assert checks["cost"].words.endswith(f"{2 * hours:.2f} at 2 per GPU hour")
    own = loaded.model_copy(update={"train": loaded.train.model_copy(update={"price_per_hour": 3})})
    (cost,) = [check for check in plan(own) if check.name == "cost"]
    assert cost.words.endswith(f"{3 * hours:.2f} at 3 per GPU hour")
    for limit, verdict in ((4 * hours, "ok"), (2.5 * hours, "warn"), (hours, "fail")):
        train = loaded.train.model_copy(update={"price_per_hour": 3, "max_cost": limit})
        own = loaded.model_copy(update={"train": train})
        (cost,) = [check for check in plan(own) if check.name == "cost"]
        assert cost.verdict == verdict and f"{limit:g}" in cost.words
    unknown = train.model_copy(update={"max_steps": None, "max_cost": 6.0})
    (cost,) = [
        each for each in plan(loaded.model_copy(update={"train": unknown})) if each.name == "cost"
    ]
    assert cost.words == (
        "training stops at 6 (train.max_cost): after 2 device hours at 3 per hour"
    )


def test_host_memory_is_what_the_steps_took() -> None:
    # tests/measure/proof_memory.py, 8.03e9 parameters, two rows compared: 4.81, and 1 GiB for the
    # keys and values of 8192 positions, which the measurement had not reserved.
    loaded = recipe("quantize.num_proof_prompts=2", 'quantize.gguf=["f16", "q4_k_m"]')
    found = {each.step: each.own_bytes / GIB for each in host_memory(loaded, LLAMA)}
    assert found == {
        "convert-gguf": pytest.approx(3.43, rel=0.05),
        "quantize-gguf": pytest.approx(5.81, rel=0.05),
    }  # fmt: skip
    # Without a GPU models are loaded in float32.
    on_cpu = host_memory(recipe(profile="local").model_copy(
        update={"placement": PlacementConfig()}
    ), LLAMA)  # fmt: skip
    assert {each.step for each in on_cpu} == {*found, "quantize-gptq", "evaluate"}
    assert min(each.own_bytes for each in on_cpu[2:]) > 4 * LLAMA


@pytest.mark.parametrize(
    ("num_layers", "vocab", "tied", "gib"),
    [
        (4, 32768, False, 1.33),
        (12, 32768, False, 1.35),
        (2, 131072, False, 3.58),
        (2, 131072, True, 2.58),
    ],
)
def test_an_fp8_export_on_a_cpu_takes_what_is_not_in_fp8(
    num_layers: int, vocab: int, tied: bool, gib: float
) -> None:
    # tests/measure/proof_memory.py --steps fp8 --hidden 2048 --prompts 2: anonymous memory.
    config = {
        **{"model_type": "llama", "hidden_size": 2048, "num_hidden_layers": num_layers},
        **{"num_attention_heads": 16, "num_key_value_heads": 4, "intermediate_size": 7168},
        **{"vocab_size": vocab, "tie_word_embeddings": tied},
    }
    shapes = ends(2048, vocab)
    for layer in range(num_layers):
        shapes |= attention(layer, 2048, 2048, 512)
        shapes |= mlp(f"model.layers.{layer}.mlp", 2048, 7168)
    facts = facts_of(config, shapes)
    loaded = recipe("quantize.num_proof_prompts=2", "quantize.fp8=[fp8]", profile="local")
    loaded = loaded.model_copy(update={"placement": PlacementConfig()})
    steps = {each.step: each for each in host_memory(loaded, facts.num_parameters, facts)}
    assert steps["quantize-fp8"].own_bytes / GIB == pytest.approx(gib, rel=0.06)
    assert steps["quantize-fp8"].mapped_bytes == 2 * facts.num_parameters
    assert steps["evaluate"].own_bytes > 4 * facts.num_parameters


@pytest.mark.parametrize(
    ("steps", "verdict", "words", "advice"),
    [
        ("", "ok", "by quantize-gguf, of 48Gi", ""),
        ("{quantize-gguf: {memory_request: 5Gi}}", "warn", "requests 5Gi",
         "quantize-gguf.memory_request"),
        ("{quantize-gguf: {memory_limit: 5Gi}}", "warn", "but its limit is 5Gi",
         "quantize-gguf.memory_limit"),
        ("{quantize-gguf: {memory_limit: 2Gi}}", "fail", "but its limit is 2Gi",
         "quantize-gguf.memory_limit"),
        # Files may be read again; what a run cannot do without is there.
        ("{convert-gguf: {memory_limit: 12Gi}}", "warn",
         "files of 14.9 GiB do not fit and are read again", "to save hours"),
    ],
)  # fmt: skip
def test_a_pod_with_too_little_memory_is_named(
    steps: str, verdict: str, words: str, advice: str
) -> None:
    loaded = recipe(*([f"placement.steps={steps}"] if steps else []))
    (found,) = [each for each in plan(loaded) if each.name == "memory"]
    assert found.verdict == verdict
    assert words in found.words and advice in found.advice


def test_the_plan_is_made_without_kfp() -> None:
    """In a step's pod kfp.dsl has no tasks to place."""
    code = "import sys, tuneline.pipelines.plan.run; sys.exit('kfp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_pod_holds_a_run_on_this_machine_to_its_memory() -> None:
    loaded = recipe(profile="local").model_copy(update={"placement": PlacementConfig()})
    checks = [each for each in plan(loaded, num_parameters=70e9) if each.name == "memory"]
    assert {each.verdict for each in checks} == {"warn"}
    on_cluster = recipe(profile="h100")
    checks = [each for each in plan(on_cluster, num_parameters=180e9) if each.name == "memory"]
    assert "fail" in {each.verdict for each in checks}


def test_optimizer_steps_that_packing_leaves(tmp_path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("x" * 4 * 2048 * 20)  # about 20 packs
    loaded = recipe().model_copy(update={"dataset": str(rows)})

    def steps(**changes: Any) -> Any:
        changed = loaded.train.model_copy(update=changes)
        return next(iter(check_optimizer_steps(loaded.model_copy(update={"train": changed}))))

    few = steps(max_steps=None)
    assert few.verdict == "warn" and "about 3 for the 163,840 bytes" in few.words
    assert "train.global_batch_size (it is 8)" in few.advice and "packing" in few.advice
    enough = steps(max_steps=None, num_train_epochs=4.0)
    assert (
        enough.verdict == "ok"
        and "8 packs of 2048 tokens (16,384 tokens): about 12" in enough.words
    )
    assert steps(max_steps=7).words == "7 optimizer steps (train.max_steps)"
    assert "one optimizer step per 8 rows" in steps(max_steps=None, packing=False).words
    loaded = loaded.model_copy(update={"dataset": "org/name"})
    assert steps(max_steps=None).words.endswith("(16,384 tokens)")
