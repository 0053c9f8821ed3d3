"""The section of a model card that shows how to run each repository of the family."""

from collections.abc import Callable, Sequence

from tuneline.artifacts import MODELFILE, OLLAMA_TEMPLATE
from tuneline.kinds import RepoKind
from tuneline.publish.sources import Repository, Sources


def usage(sources: Sources, repo: Repository, family: Sequence[Repository]) -> str:
    """Return the section: how to run `repo`, then the other repositories of the family."""
    ordered = [repo, *(other for other in family if other != repo)]
    paragraphs = [USAGE.get(item.kind, _checkpoint)(sources, item) for item in ordered]
    return "\n\n".join(["## How to run it", *paragraphs])


def _adapter(sources: Sources, repo: Repository) -> str:
    origin = sources.origin
    base, revision = origin.source, f', revision="{origin.revision}"' if origin.revision else ""
    if not origin.revision:
        base = "path/to/the/base/model"  # readers cannot use a path on this machine
    classes = ["AutoModelForCausalLM", "AutoTokenizer"]
    settings = quantized = ""
    if origin.dequantized:
        settings = (
            f"# Before training, the base model's weights ({origin.quantization}) were converted.\n"
            "# The adapter answers differently on the stored ones: prefer the merged model.\n"
        )
    elif sources.training.experts_quantized:
        settings = (
            "# The adapter was trained on experts in NF4, which transformers alone does not load.\n"
            "# It answers differently on those in 16 bits: prefer the merged model.\n"
        )
    elif sources.training.base_quantization == "nf4" and origin.quantization is None:
        classes.append("BitsAndBytesConfig")
        settings = (
            "# The adapter was trained on NF4 base weights and answers differently on others.\n"
            "nf4 = BitsAndBytesConfig(\n"
            '    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,\n'
            f"    bnb_4bit_compute_dtype=torch.{sources.training.compute_dtype},\n"
            ")\n"
        )
        quantized = ", quantization_config=nf4"
    torch = "import torch\n" if quantized else ""
    return (
        f"Adapter, with transformers and peft (`{repo.name}`):\n\n"
        f"```python\n{torch}from peft import PeftModel\n"
        f"from transformers import {', '.join(classes)}\n\n{settings}"
        f'base = AutoModelForCausalLM.from_pretrained("{base}"{revision}{quantized})\n'
        f'model = PeftModel.from_pretrained(base, "{repo.name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{repo.name}")\n```'
    )


def _checkpoint(sources: Sources, repo: Repository) -> str:
    title, packages = repo.traits.title, repo.traits.packages
    served = all(export.vllm_has_kernel is not False for export in repo.exports.values())
    programs = "transformers or vLLM" if served else "transformers"
    serve = f"\n\n```sh\nvllm serve {repo.name}\n```" if served else ""
    install = f"# needs: pip install {packages}\n" if packages else ""
    return (
        f"{title[0].upper()}{title[1:]}, with {programs} (`{repo.name}`):\n\n"
        f"```python\n{install}from transformers import pipeline\n\n"
        f'chat = pipeline("text-generation", model="{repo.name}")\n'
        f'print(chat([{{"role": "user", "content": "Hello"}}]))\n```{serve}'
    )


def _gguf(sources: Sources, repo: Repository) -> str:
    name = repo.short_name.removesuffix(repo.traits.suffix)
    exports = list(repo.exports.values())
    formats = [export.format for export in exports]
    example = formats[-1]
    # Without the file, the Hub would guess a template for Ollama.
    has_template = all(OLLAMA_TEMPLATE in export.files for export in exports)
    num_context = exports[-1].num_context
    context = f" -c {num_context}" if num_context else ""
    lines = [
        f"llama-cli -m {name}-{example}.gguf -cnv{context}",
        f"llama-cli -hf {repo.name}:{example.upper()} -cnv{context}",
        *([f"ollama run hf.co/{repo.name}:{example.upper()}"] if has_template else []),
        f"ollama create {name} -f {MODELFILE}-{example}  # in a copy of the repository",
    ]
    commands = "\n".join(lines)
    return (
        f"GGUF, with llama.cpp or Ollama (`{repo.name}`, {', '.join(formats)}):\n\n"
        f"```sh\n{commands}\n```"
    )


USAGE: dict[RepoKind, Callable[[Sources, Repository], str]] = {
    "adapter": _adapter,
    "gguf": _gguf,
}
"""Functions that return the paragraph of a kind whose repositories do not hold one complete
checkpoint."""
