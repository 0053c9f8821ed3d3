"""InferenceServices for published repositories, against KServe's own definition."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from kube_server import strict
from small_records import new_export, new_merge, new_origin

from tuneline.gpu_profiles import GPU_PROFILES
from tuneline.pipelines.lint.lint import lint_documents
from tuneline.placement import PlacementConfig
from tuneline.serving import vllm
from tuneline.serving.inference_service import service_name
from tuneline.serving.manifests import Model, Repo, public_placement, serving_files
from tuneline.serving.storage import storage_uri

CRD = Path(__file__).parents[1] / "data" / "crds" / "kserve-v0.19.0" / "inferenceservices.yaml"
GIB = 2**30

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "max_position_embeddings": 131072,
}
SAMPLING = {
    "do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1.15,
    "eos_token_id": [128001, 128009],
}  # fmt: skip
FORMAT = {"gptq": "gptq-4bit", "awq": "awq", "fp8": "fp8"}
"""A format of each kind that is published as a checkpoint."""
LORA = {"r": 24, "lora_alpha": 16, "target_modules": ["q_proj"], "modules_to_save": None}


@pytest.fixture(scope="module")
def schema() -> Any:
    (version,) = yaml.load(CRD.read_text(encoding="utf-8"), yaml.CSafeLoader)["spec"]["versions"]
    # One validator for all tests, because checking the definition itself takes a moment.
    return jsonschema.Draft202012Validator(strict(version["schema"]["openAPIV3Schema"]))


def model(directory: Path, **changes: Any) -> Model:
    """An 8B model on disk, without its weights.

    Args:
        directory: where its files are written.
        **changes: settings of config.json, "lora" for adapter_config.json, "merge" and "origin" for
            the records.
    """
    adapter, merged = directory / "adapter", directory / "merged"
    for path in (adapter, merged):
        path.mkdir(exist_ok=True)
    lora, merge, origin = (changes.pop(key, {}) for key in ("lora", "merge", "origin"))
    (adapter / "adapter_config.json").write_text(json.dumps(LORA | lora))
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    (merged / "config.json").write_text(json.dumps(LLAMA_8B | changes))
    (merged / "generation_config.json").write_text(json.dumps(SAMPLING))
    origin = {"source": "meta-llama/Llama-3.1-8B", "revision": "a" * 40} | origin
    proof = {"base": "original", "num_bytes": 16 * GIB, "num_shards": 4} | merge
    return Model(new_origin(**origin), new_merge(**proof), adapter, merged)


def files(
    directory: Path, kind: str, placement: PlacementConfig | None = None, **changes: Any
) -> dict[str, str]:
    """The files in serving/ of a repository `me/mine` of the kind."""
    made = model(directory, **changes)
    exports: dict[str, Any] = {}
    suffix = {"adapter": "-lora", "merged": "", "gguf": "-gguf"}.get(kind, f"-{FORMAT.get(kind)}")
    if kind == "gguf":
        export = new_export(format="q4_k_m", num_bytes=5 * GIB, num_context=8192)
        exports = {"mine-q4_k_m.gguf": (made.merged_dir, export)}
    if kind in FORMAT:
        has_kernel = changes.get("vllm_has_kernel", True)
        export = new_export(
            format=FORMAT[kind], kind=kind, file=".", group_size=None if kind == "fp8" else 128,
            num_bytes=(9 if kind == "fp8" else 6) * GIB, vllm_has_kernel=has_kernel,
        )  # fmt: skip
        exports = {".": (made.merged_dir, export)}
    repo = Repo(f"mine{suffix}", kind, storage_uri(f"me/mine{suffix}"), exports)  # type: ignore[arg-type]
    return serving_files(made, repo, placement or PlacementConfig(profile="l4"))


def only_service(written: dict[str, str]) -> dict[str, Any]:
    (text,) = (text for name, text in written.items() if name.endswith(".yaml"))
    service: dict[str, Any] = yaml.safe_load(text)
    return service


@pytest.mark.parametrize("profile", ["local", "t4", "l4", "h100"])
@pytest.mark.parametrize("kind", ["adapter", "merged", "gguf", *FORMAT])
def test_a_service_keeps_to_kserves_definition_and_to_the_lint_rules(
    tmp_path: Path, schema: Any, kind: str, profile: str
) -> None:
    placement = PlacementConfig(
        profile=profile, node_selector={"pool": "serving"}, queue="team", run_as_user=None
    )
    written = files(tmp_path, kind, placement)
    if (kind, profile) == ("fp8", "t4"):
        assert "compute capability 8.0 for FP8, and the profile t4 has 7.5" in "".join(
            written.values()
        )
        return
    service = only_service(written)
    schema.validate(service)
    predictor = service["spec"]["predictor"]
    # The rest of a predictor is the spec of a pod.
    not_of_a_pod = ("minReplicas", "maxReplicas", "storageUris")
    pod = {key: value for key, value in predictor.items() if key not in not_of_a_pod}
    wrapped = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod}
    assert lint_documents([service, wrapped]) == []
    limits = predictor["containers"][0]["resources"]["limits"]
    if kind == "gguf":
        assert "nvidia.com/gpu" not in limits and "nodeSelector" not in predictor
        return
    # 16 GiB of weights and 1 GiB of keys and values do not fit the 14.6 GiB of one T4.
    number = "2" if profile == "t4" and kind not in FORMAT else "1"
    assert limits["nvidia.com/gpu"] == number
    assert predictor["nodeSelector"] == {"pool": "serving"}
    arguments = predictor["containers"][0]["args"]
    # A T4 has no bfloat16.
    assert ("--dtype" in arguments) == (profile == "t4")
    assert ("--tensor-parallel-size" in arguments) == (number != "1")
    if profile in GPU_PROFILES:
        (term,) = predictor["affinity"]["nodeAffinity"][
            "requiredDuringSchedulingIgnoredDuringExecution"
        ]["nodeSelectorTerms"]
        assert term["matchExpressions"][0]["values"] == list(GPU_PROFILES[profile].products)


def test_no_server_for_gpus_that_its_image_does_not_find(tmp_path: Path) -> None:
    written = files(tmp_path, "merged", PlacementConfig(profile="mi300x"))
    assert not [name for name in written if name.endswith(".yaml")]
    (text,) = written.values()
    assert "not served" in text and "finds no GPU of the profile mi300x" in " ".join(text.split())


def test_an_unknown_field_breaks_the_definition(tmp_path: Path, schema: Any) -> None:
    service = only_service(files(tmp_path, "merged"))
    service["spec"]["predictor"]["storageUri"] = "hf://me/mine"
    with pytest.raises(jsonschema.ValidationError, match="storageUri"):
        schema.validate(service)


def test_how_each_kind_is_served(tmp_path: Path) -> None:
    merged = only_service(files(tmp_path, "merged"))["spec"]["predictor"]
    assert merged["storageUris"] == [{"uri": "hf://me/mine", "mountPath": "/mnt/models"}]
    (container,) = merged["containers"]
    assert container["args"] == [
        *("/mnt/models", "--served-model-name", "mine", "--max-model-len", "8192"),
        *("--port", "8080"),
    ]
    for name in ("awq", "fp8"):
        written = files(tmp_path, name)
        assert f"serving/{name}.yaml" in written
        (container,) = only_service(written)["spec"]["predictor"]["containers"]
        # vLLM reads the quantisation from config.json.
        assert container["args"][:3] == ["/mnt/models", "--served-model-name", f"mine-{name}"]
        assert "--quantization" not in container["args"]
    gguf = only_service(files(tmp_path, "gguf"))["spec"]["predictor"]
    (container,) = gguf["containers"]
    # The weights, 1 GiB of keys and values (32 layers, 8 heads of 128, 8192 tokens, 16 bits), and
    # 1 GiB for the process.
    assert container["resources"]["requests"]["memory"] == "7Gi"
    assert container["resources"]["limits"]["memory"] == "12Gi"
    assert container["args"] == [
        *("--model", "/mnt/models/mine-q4_k_m.gguf", "--alias", "mine-q4_k_m", "--jinja"),
        *("--ctx-size", "8192", "--parallel", "1", "--temp", "0.8", "--top-k", "50"),
        *("--top-p", "0.95", "--min-p", "0", "--repeat-penalty", "1.15"),
        *("--repeat-last-n", "8192"),
        *("--host", "0.0.0.0", "--port", "8080"),
    ]
    written = files(tmp_path, "adapter")
    adapter = only_service(written)["spec"]["predictor"]
    assert adapter["storageUris"] == [
        {"uri": f"hf://meta-llama/Llama-3.1-8B:{'a' * 40}", "mountPath": "/mnt/models/base"},
        {"uri": "hf://me/mine-lora", "mountPath": "/mnt/models/adapter"},
    ]
    (container,) = adapter["containers"]
    arguments = container["args"]
    options = dict(zip(arguments, arguments[1:], strict=False))
    assert options["--lora-modules"] == "mine-lora=/mnt/models/adapter"
    assert options["--max-lora-rank"] == "32"
    assert options["--chat-template"] == "/mnt/models/adapter/chat_template.jinja"
    assert json.loads(options["--override-generation-config"]) == {
        key: SAMPLING[key] for key in ("temperature", "top_p", "top_k", "repetition_penalty")
    }
    assert "tokens 128001, 128009" in written["serving/README.md"]


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("merged", {"architectures": ["PhimoeForCausalLM"]}, "names the architecture Phimoe"),
        ("merged", {"architectures": None}, "names no architecture"),
        ("merged", {"merge": {"num_bytes": 900 * GIB}}, "do not fit 8 GPUs of the profile l4"),
        ("merged", {"num_attention_heads": 9, "merge": {"num_bytes": 30 * GIB}}, "do not fit"),
        ("gptq", {"vllm_has_kernel": False}, "no kernel for gptq-4bit in groups of 128"),
        (
            "awq",
            {"vllm_has_kernel": False},
            "no kernel for awq in groups of 128 .* export awq with",
        ),
        ("adapter", {"merge": {"base": "dequantized"}}, "trained on 4-bit weights"),
        ("adapter", {"origin": {"revision": None, "source": "/home/me/base"}}, "model base is not"),
        ("adapter", {"origin": {"source": "gpt2"}}, "gpt2 is not in a repository"),
        ("adapter", {"origin": {"quantization": "fp8"}}, "quantised weights (fp8)"),
        ("adapter", {"lora": {"modules_to_save": ["embed_tokens"]}}, "whole layers"),
        ("adapter", {"lora": {"target_parameters": ["mlp.up"]}}, "the weights of experts"),
        ("adapter", {"lora": {"r": 1024}}, "rank 1024"),
    ],
)
def test_a_sentence_takes_the_place_of_a_file(
    tmp_path: Path, kind: str, changes: dict[str, Any], said: str
) -> None:
    written = files(tmp_path, kind, **changes)
    assert list(written) == ["serving/README.md"]
    assert "not served" in written["serving/README.md"]
    assert re.search(said if ".*" in said else re.escape(said), written["serving/README.md"])


def test_the_published_files_have_no_names_of_a_cluster() -> None:
    own = PlacementConfig(
        profile="h100", node_selector={"pool": "secret"}, queue="team", registry="here.example/x"
    )
    assert public_placement(own) == PlacementConfig(profile="h100")


def test_names_and_storage() -> None:
    long = service_name("My.Model_8B-" + "x" * 60)
    assert service_name("My.Model_8B-gguf-q4_k_m") == "my-model-8b-gguf-q4-k-m"
    assert service_name("7b") == "m-7b" and len(long) == 40
    assert long != service_name("My.Model_8B-" + "x" * 61)
    for repo, uri in {
        "me/mine": f"hf://me/mine:{'c' * 40}",
        "s3://bucket/models/mine": "s3://bucket/models/mine/v2",
        "claim:models/team/mine": "pvc://models/team/mine",
        "/srv/out/mine": "pvc://CLAIM/mine",
        "oci://registry.example.com/team/mine": "pvc://CLAIM/mine",
        "mine": "pvc://CLAIM/mine",
    }.items():
        assert storage_uri(repo, commit="c" * 40, version="v2") == uri


def test_the_architectures_are_classes_of_transformers() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as known

    classes = {
        name for names in known.values() for name in ([names] if isinstance(names, str) else names)
    }
    assert vllm.ARCHITECTURES <= classes
