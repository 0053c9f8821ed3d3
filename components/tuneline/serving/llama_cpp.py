"""How llama.cpp's server serves a GGUF file, on a CPU.

The chat template and the stop tokens are in the file, and the sampling is given in arguments,
because not every version of the server reads it from the file.
"""

from pathlib import Path

from tuneline.artifacts import QuantizedModel
from tuneline.models.sampling import UNLIMITED_TOP_K, published_sampling, read_settings
from tuneline.serving.inference_service import MODELS_PATH, PORT, Container, Resources
from tuneline.serving.model_sizes import GIB, ModelSizes

IMAGE = "ghcr.io/ggml-org/llama.cpp:server-b9935"

PROCESS_BYTES = 1 * GIB
"""Estimated memory of the server besides weights and context."""


def gguf(merged_dir: Path, file: str, export: QuantizedModel, *, served_name: str) -> Container:
    """Return the container that serves one GGUF file.

    Args:
        merged_dir: directory of the merged model, which has the sizes and the sampling.
        file: name of the file in its repository.
        export: record of the export.
        served_name: the model's name in the API.
    """
    sizes = ModelSizes.read(merged_dir)
    num_context = export.num_context or sizes.num_context
    own = PROCESS_BYTES + sizes.context_bytes * num_context / sizes.num_context
    request = own + export.num_bytes
    return Container(
        image=IMAGE,
        command=["/app/llama-server"],
        arguments=[
            *("--model", f"{MODELS_PATH}/{file}", "--alias", served_name, "--jinja"),
            # One request at a time gets the whole context. The next one waits.
            *("--ctx-size", str(num_context), "--parallel", "1"),
            *_sampling(merged_dir, num_context),
            *("--host", "0.0.0.0", "--port", str(PORT)),
        ],
        environment={"HOME": "/tmp"},
        # llama.cpp copies the weights of some formats into another layout.
        resources=Resources(cpu=("4", "8"), memory=(request, request + export.num_bytes)),
    )


def _sampling(merged_dir: Path, num_context: int) -> list[str]:
    settings = read_settings(merged_dir)
    sampling, _ = published_sampling(settings)
    top_k = 0 if sampling.top_k >= UNLIMITED_TOP_K else sampling.top_k
    values = {
        "--temp": 0 if sampling.is_greedy else sampling.temperature,
        "--top-k": top_k,
        "--top-p": sampling.top_p,
        "--min-p": settings.get("min_p") or 0,
        "--repeat-penalty": sampling.repetition_penalty,
        # The whole context, as in transformers and vLLM. With -1, its word for it, llama-server of
        # 2026-10 penalises nothing.
        "--repeat-last-n": num_context,
    }
    return [text for name, value in values.items() for text in (name, f"{value:g}")]
