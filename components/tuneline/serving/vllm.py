"""How vLLM serves a checkpoint, or an adapter beside its base model.

vLLM reads the sampling and the stop tokens of generation_config.json, and the chat template beside
the tokenizer, from the checkpoint itself.
"""

import json
from pathlib import Path, PurePosixPath

from tuneline.artifacts import CHAT_TEMPLATE_FILE, MergeProof, ModelOrigin, QuantizedModel
from tuneline.gpu_profiles import GPU_PROFILES
from tuneline.kinds import ExportKind
from tuneline.models.sampling import published_sampling, read_settings
from tuneline.placement import PlacementConfig
from tuneline.serving.inference_service import (
    MODELS_PATH,
    PORT,
    CannotServe,
    Container,
    Resources,
)
from tuneline.serving.model_sizes import GIB, ModelSizes

IMAGE = "vllm/vllm-openai:v0.29.0"

ARCHITECTURES = frozenset(
    f"{name}ForCausalLM"
    for name in """
    Afmoe Apertus Arcee Bamba Bloom Cohere Cohere2 Cohere2Moe Cwm Dbrx DeepseekV2 DeepseekV3
    DeepseekV32 DeepseekV4 Dots1 Ernie4_5 Ernie4_5_Moe Exaone4 Falcon FalconH1 FalconMamba FlexOlmo
    GPTBigCode GPTJ GPTNeoX Gemma Gemma2 Gemma3 Gemma3n Gemma4 Glm Glm4 Glm4Moe Glm4MoeLite
    GlmMoeDsa GptOss Granite GraniteMoe GraniteMoeHybrid GraniteMoeShared HYV3 HunYuanDenseV1
    HunYuanMoEV1 HyperCLOVAX Jais2 Jamba KimiLinear Laguna Lfm2 Lfm2Moe Llama Llama4 LongcatFlash
    Mamba Mamba2 MiMoV2Flash MiniCPM3 MiniMax MiniMaxM2 Ministral3 Mistral Mixtral Mpt Nemotron
    NemotronH OPT Olmo Olmo2 Olmo3 OlmoHybrid Olmoe Persimmon Phi Phi3 Qwen2 Qwen2Moe Qwen3 Qwen3Moe
    Qwen3Next Qwen3_5 Qwen3_5Moe SeedOss SmolLM3 StableLm Starcoder2 Zamba2
    """.split()
) | {
    "GPT2LMHeadModel",
    *(f"{name}ForConditionalGeneration" for name in ("Gemma3", "Gemma3n", "Gemma4")),
}
"""Classes of transformers that vLLM's registry of models lists under the same name (2026)."""

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM accepts for --max-lora-rank."""

MIN_CAPABILITIES: dict[ExportKind, tuple[int, int]] = {"awq": (7, 5), "fp8": (8, 0)}
"""Lowest compute capability of GPUs on which vLLM runs a kind of export. Below 8.9, it computes FP8
weights with activations in 16 bits (Marlin): slower than on GPUs that multiply FP8, and with the
memory of FP8."""

PROCESS_BYTES = 6 * GIB
"""Estimated host memory of vLLM's processes, each with torch and a CUDA context."""
GPU_FRACTION = 0.9
"""Fraction of a GPU's memory that vLLM uses (--gpu-memory-utilization)."""
WORKING_BYTES = 2 * GIB
"""Estimated memory of activations and CUDA graphs on each GPU."""
NUM_GPUS = (1, 2, 4, 8)
"""Numbers of GPUs of one node that can share a model."""
SHARED_MEMORY = "2Gi"
"""Size of /dev/shm if the placement sets none. Processes of several GPUs exchange data there."""

BASE_PATH, ADAPTER_PATH = f"{MODELS_PATH}/base", f"{MODELS_PATH}/adapter"


def checkpoint(
    model_dir: Path,
    *,
    served_name: str,
    num_bytes: int,
    num_files: int,
    placement: PlacementConfig,
    export: QuantizedModel | None = None,
) -> Container:
    """Return the container that serves the merged model or a quantised checkpoint.

    Args:
        model_dir: directory of the checkpoint.
        served_name: the model's name in the API.
        num_bytes: size of the weights.
        num_files: number of the files with the weights.
        placement: the recipe's placement.
        export: record of a quantised checkpoint; None: the merged model.

    Raises:
        CannotServe: vLLM cannot serve the model.
    """
    if export is not None and export.vllm_has_kernel is False:
        raise CannotServe(
            f"vLLM has no kernel for {export.format} in groups of {export.group_size} weights: "
            f"load the checkpoint with transformers, or export {_with_kernel(export)} with a group "
            "size of 128"
        )
    if export is not None:
        _check_gpu(export, placement)
    sizes = ModelSizes.read(model_dir)
    _check_architecture(sizes.architecture)
    num_gpus = _num_gpus(num_bytes, sizes, placement)
    arguments = [MODELS_PATH, "--served-model-name", served_name]
    return _container(arguments, sizes, num_gpus, num_bytes / max(1, num_files), placement)


def adapter(
    adapter_dir: Path,
    merged_dir: Path,
    origin: ModelOrigin,
    merge: MergeProof,
    *,
    served_name: str,
    placement: PlacementConfig,
) -> Container:
    """Return the container that serves a base model with the adapter beside it.

    Args:
        adapter_dir: directory of the adapter.
        merged_dir: directory of the merged model, whose sizes are those of the base model.
        origin: record of the base model.
        merge: record of the merged model.
        served_name: the adapter's name in the API; the base model's is its Hub ID.
        placement: the recipe's placement.

    Raises:
        CannotServe: vLLM cannot load such an adapter, or it would answer differently.
    """
    if origin.revision is None or "/" not in origin.source:
        raise CannotServe(
            f"the base model {PurePosixPath(origin.source).name} is not in a repository "
            "NAMESPACE/NAME of the Hub, from which KServe could download it: serve the merged model"
        )
    if origin.quantization is not None:
        raise CannotServe(
            f"the base model's repository holds quantised weights ({origin.quantization}), beside "
            "which the adapter answers differently: serve the merged model"
        )
    if merge.base != "original":
        raise CannotServe(
            "the adapter was trained on 4-bit weights and is merged with them, and it answers "
            "differently beside the base model's 16-bit weights: serve the merged model, or set "
            "merge.base to original"
        )
    settings = json.loads((adapter_dir / "adapter_config.json").read_text(encoding="utf-8"))
    for key, what in (
        ("modules_to_save", "whole layers"),
        ("use_dora", "magnitudes (DoRA)"),
        ("target_parameters", "the weights of experts"),
    ):
        if settings.get(key):
            raise CannotServe(
                f"the adapter holds {what} ({key}), which vLLM does not load beside a base model: "
                "serve the merged model"
            )
    rank = max([settings.get("r") or 1, *(settings.get("rank_pattern") or {}).values()])
    if rank > RANKS[-1]:
        raise CannotServe(
            f"the adapter has rank {rank}, and vLLM loads ranks up to {RANKS[-1]}: serve the "
            "merged model"
        )
    sizes = ModelSizes.read(merged_dir)
    _check_architecture(sizes.architecture)
    num_gpus = _num_gpus(merge.num_bytes, sizes, placement)
    arguments = [
        *(BASE_PATH, "--served-model-name", origin.source, "--enable-lora"),
        *("--lora-modules", f"{served_name}={ADAPTER_PATH}"),
        *("--max-lora-rank", str(next(known for known in RANKS if known >= rank))),
    ]
    if (adapter_dir / CHAT_TEMPLATE_FILE).is_file():
        arguments += ["--chat-template", f"{ADAPTER_PATH}/{CHAT_TEMPLATE_FILE}"]
    # The base model's own sampling was chosen for another model.
    sampling, _ = published_sampling(read_settings(merged_dir))
    arguments += ["--override-generation-config", json.dumps(sampling.model_dump())]
    largest = merge.num_bytes / max(1, merge.num_shards)
    return _container(arguments, sizes, num_gpus, largest, placement)


def _with_kernel(export: QuantizedModel) -> str:
    return "awq" if export.kind == "awq" else "gptq-4bit"


def _check_gpu(export: QuantizedModel, placement: PlacementConfig) -> None:
    """Check that vLLM has a kernel for an export on the GPU of the profile."""
    gpu = GPU_PROFILES.get(placement.profile)
    least = MIN_CAPABILITIES.get(export.kind)
    # `_num_gpus` refuses GPUs of AMD, which have no such capability.
    if gpu is None or least is None or gpu.capability is None or gpu.capability >= least:
        return
    has, needed = (f"{major}.{minor}" for major, minor in (gpu.capability, least))
    raise CannotServe(
        f"vLLM needs a GPU of compute capability {needed} for {export.kind.upper()}, and the "
        f"profile {placement.profile} has {has}: set placement.profile to a newer GPU, or serve "
        "the merged model"
    )


def _check_architecture(architecture: str) -> None:
    if architecture not in ARCHITECTURES:
        named = f"the architecture {architecture}" if architecture else "no architecture"
        raise CannotServe(
            f"the model's config.json names {named}, which is not in vLLM's list of models: try "
            "`vllm serve`, which may load it through transformers, or serve a GGUF file"
        )


def _num_gpus(num_bytes: int, sizes: ModelSizes, placement: PlacementConfig) -> int:
    """Return the number of GPUs that hold the weights and one full context."""
    gpu = GPU_PROFILES.get(placement.profile)
    if gpu is None:
        return 1
    if gpu.capability is None:
        raise CannotServe(
            f"{IMAGE} has CUDA, which finds no GPU of the profile {placement.profile}: set "
            "placement.profile to a GPU of NVIDIA, run vLLM's image for ROCm yourself, or serve a "
            "GGUF file"
        )
    usable = GPU_FRACTION * gpu.memory_bytes - WORKING_BYTES
    for number in NUM_GPUS:
        needed = (num_bytes + sizes.context_bytes) / number
        if sizes.num_heads % number == 0 and needed <= usable:
            return number
    raise CannotServe(
        f"the weights ({num_bytes / GIB:.1f} GiB) and one context "
        f"({sizes.context_bytes / GIB:.1f} GiB) do not fit {NUM_GPUS[-1]} GPUs of the profile "
        f"{placement.profile}: set placement.profile to a larger GPU, or serve a quantised export"
    )


def _container(
    arguments: list[str],
    sizes: ModelSizes,
    num_gpus: int,
    largest_file: float,
    placement: PlacementConfig,
) -> Container:
    gpu = GPU_PROFILES.get(placement.profile)
    arguments = [*arguments, "--max-model-len", str(sizes.num_context), "--port", str(PORT)]
    if gpu is not None and not gpu.has_bfloat16:
        arguments += ["--dtype", "float16"]
    if num_gpus > 1:
        arguments += ["--tensor-parallel-size", str(num_gpus)]
    request = PROCESS_BYTES * num_gpus + largest_file
    return Container(
        image=IMAGE,
        command=["vllm", "serve"],
        arguments=arguments,
        # Caches are written below HOME, and torch asks for a user's name, which a user that is not
        # in /etc/passwd lacks.
        environment={"HOME": "/tmp", "USER": "vllm"},
        resources=Resources(cpu=("4", "8"), memory=(request, 2 * request), num_gpus=num_gpus),
        shared_memory=placement.shared_memory or SHARED_MEMORY,
    )
