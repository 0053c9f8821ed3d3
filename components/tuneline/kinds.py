"""The kinds of repositories that a run publishes, and what differs between them.

Some kinds are exports: a run makes one export per format, and every format belongs to one kind.
Publish and report take what differs between kinds from this table.
"""

from dataclasses import dataclass
from typing import Literal, get_args

ExportKind = Literal["gguf", "gptq", "awq", "fp8"]
RepoKind = Literal["adapter", "merged", ExportKind]


@dataclass(frozen=True)
class KindTraits:
    """Properties of one kind that publish and report read."""

    title: str
    """Name of the kind in a model card."""
    library_name: str
    """`library_name` of a model card's front matter."""
    base_model_relation: Literal["adapter", "finetune", "quantized"]
    """`base_model_relation` of a model card's front matter."""
    suffix: str
    """End of the repository's name, e.g. -gguf. If the suffix contains `{format}`, each export
    has its own repository with the whole checkpoint. Otherwise all exports of the kind are files in
    one repository."""
    packages: str = ""
    """Packages that transformers needs in order to load the checkpoint, separated by spaces."""
    runs_with: str = ""
    """Programs that run the export, for the report's recommendations."""
    runs_on_cpu: bool = False
    """Whether the export is meant for machines without a GPU."""

    @property
    def has_repo_per_format(self) -> bool:
        """Return whether every format has a separate repository."""
        return "{format}" in self.suffix


KINDS: dict[RepoKind, KindTraits] = {
    "adapter": KindTraits("LoRA adapter", "peft", "adapter", "-lora"),
    "merged": KindTraits("merged model", "transformers", "finetune", ""),
    "gguf": KindTraits(
        "GGUF files",
        "gguf",
        "quantized",
        "-gguf",
        runs_with="llama.cpp and Ollama",
        runs_on_cpu=True,
    ),
    "gptq": KindTraits(
        "GPTQ checkpoint",
        "transformers",
        "quantized",
        "-{format}",
        packages="gptqmodel optimum",
        runs_with="vLLM and transformers on a GPU",
    ),
    "awq": KindTraits(
        "AWQ checkpoint",
        "transformers",
        "quantized",
        "-{format}",
        packages="gptqmodel",
        runs_with="vLLM and transformers on a GPU",
    ),
    "fp8": KindTraits(
        "FP8 checkpoint",
        "transformers",
        "quantized",
        "-{format}",
        packages="compressed-tensors",
        runs_with="vLLM on a GPU of Ada, Hopper or later",
    ),
}

EXPORT_KINDS: tuple[ExportKind, ...] = get_args(ExportKind)
