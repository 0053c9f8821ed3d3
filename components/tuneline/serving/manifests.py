"""The files in `serving/` of a published repository: InferenceServices, and how to use them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tuneline.artifacts import MergeProof, ModelOrigin, QuantizedModel
from tuneline.kinds import RepoKind
from tuneline.models.sampling import stop_tokens
from tuneline.placement import PlacementConfig
from tuneline.serving import llama_cpp, vllm
from tuneline.serving.inference_service import (
    MODELS_PATH,
    CannotServe,
    Container,
    inference_service,
    service_name,
)
from tuneline.serving.storage import UNKNOWN_STORAGE, storage_uri

FOLDER = "serving"
README = "README.md"


@dataclass(frozen=True)
class Model:
    """The artifacts of a run that its InferenceServices are made from."""

    origin: ModelOrigin
    merge: MergeProof
    adapter_dir: Path
    merged_dir: Path


@dataclass(frozen=True)
class Repo:
    """A repository that is served."""

    name: str
    """Name without a namespace."""
    kind: RepoKind
    uri: str
    """Storage URI of its files."""
    exports: Mapping[str, tuple[Path, QuantizedModel]]
    """File name in the repository ("." if it is a whole checkpoint) -> directory and record of the
    export."""


def serving_files(model: Model, repo: Repo, placement: PlacementConfig) -> dict[str, str]:
    """Return the text of each file in `serving/` of a repository, by its path there.

    There is one InferenceService per format, and a README.md that says how to apply them, or why
    there is none.

    Args:
        model: the artifacts of the run.
        repo: the repository.
        placement: where the servers run: that of the recipe, or of a GPU profile alone.
    """
    files: dict[str, str] = {}
    notes: list[str] = []
    for form, (name, uris, container) in _forms(model, repo, placement).items():
        try:
            service = inference_service(
                service_name(name), container(), uris=uris, placement=placement
            )
        except CannotServe as reason:
            notes.append(f"{form}: not served. {_sentence(str(reason))}")
            continue
        path = f"{FOLDER}/{form}.yaml"
        files[path] = yaml.safe_dump(service, sort_keys=False, width=100)
        notes.append(f"{form}: `kubectl apply -f {path}`. {_about(service)}")
    files[f"{FOLDER}/{README}"] = _readme(model, repo, files, notes)
    return files


def public_placement(placement: PlacementConfig) -> PlacementConfig:
    """Return a placement with the GPU's profile alone, without the names of a cluster."""
    return PlacementConfig(profile=placement.profile)


_Form = tuple[str, dict[str, str], Callable[[], Container]]


def _forms(model: Model, repo: Repo, placement: PlacementConfig) -> dict[str, _Form]:
    """Return name, storage URIs and server of each form in which a repository is served."""
    if repo.kind == "adapter":
        uris = {
            vllm.BASE_PATH: storage_uri(model.origin.source, commit=model.origin.revision),
            vllm.ADAPTER_PATH: repo.uri,
        }
        return {
            "lora": (
                repo.name,
                uris,
                lambda: vllm.adapter(
                    model.adapter_dir,
                    model.merged_dir,
                    model.origin,
                    model.merge,
                    served_name=repo.name,
                    placement=placement,
                ),
            )
        }
    uris = {MODELS_PATH: repo.uri}
    if repo.kind == "merged":
        return {
            "merged": (
                repo.name,
                uris,
                lambda: vllm.checkpoint(
                    model.merged_dir,
                    served_name=repo.name,
                    num_bytes=model.merge.num_bytes,
                    num_files=model.merge.num_shards,
                    placement=placement,
                ),
            )
        }
    return {
        export.format: (
            repo.name if file == "." else f"{repo.name}-{export.format}",
            uris,
            _export_server(model, repo, file, directory, export, placement),
        )
        for file, (directory, export) in repo.exports.items()
    }


def _export_server(
    model: Model,
    repo: Repo,
    file: str,
    directory: Path,
    export: QuantizedModel,
    placement: PlacementConfig,
) -> Callable[[], Container]:
    if export.kind == "gguf":
        name = Path(file).stem
        return lambda: llama_cpp.gguf(model.merged_dir, file, export, served_name=name)
    return lambda: vllm.checkpoint(
        directory,
        served_name=repo.name,
        num_bytes=export.num_bytes,
        num_files=1,
        placement=placement,
        export=export,
    )


def _about(service: dict[str, Any]) -> str:
    (container,) = service["spec"]["predictor"]["containers"]
    requests = dict(container["resources"]["requests"])
    needs = ", ".join(f"{number} {name}" for name, number in requests.items())
    return f"Server: {container['image']}. Requests: {needs}."


def _readme(model: Model, repo: Repo, files: Mapping[str, str], notes: list[str]) -> str:
    lines = [f"# Serving {repo.name} with KServe", "", *(f"- {note}" for note in notes)]
    if not files:
        return "\n".join([*lines, ""])
    lines += [
        "",
        "KServe 0.16 or later is needed. The API is OpenAI's, under `/v1`, and the container's "
        "arguments have the model's name in it. If the repository is private, add the name of a "
        "service account to `spec.predictor.serviceAccountName` (`tuneline serve "
        "--service-account`), one of whose secrets has the key `HF_TOKEN`.",
    ]
    if any(UNKNOWN_STORAGE in text for text in files.values()):
        lines += [
            "",
            f"Replace `{UNKNOWN_STORAGE}` with the claim or the bucket that holds the repository, "
            "or let `tuneline serve --storage` do it.",
        ]
    if any(name.endswith("/lora.yaml") for name in files):
        stops = ", ".join(map(str, stop_tokens(model.merged_dir)))
        lines += [
            "",
            f"An answer ends at one of the tokens {stops}. If the base model's "
            "generation_config.json does not list them, give them with each request as "
            "`stop_token_ids`. More adapters of the same base model can be added to "
            "`--lora-modules`.",
        ]
    return "\n".join([*lines, ""])


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
