"""How to run each repository of a family, for its model card: this one first, then the others."""

from typing import TYPE_CHECKING

from tuneline.artifacts import MODELFILE

if TYPE_CHECKING:
    from tuneline.publish.staging import Kind, Sources


def usage(sources: "Sources", *, repo: str, all_repos: "dict[str, Kind]") -> str:
    """Return the card's section."""
    others = [other for other in all_repos if other != repo]
    parts = [_of(sources, other, all_repos[other]) for other in (repo, *others)]
    return "\n\n".join(["## How to run it", *parts])


def _of(sources: "Sources", repo: str, kind: "Kind") -> str:
    if kind == "adapter":
        return _adapter(sources, repo)
    if kind == "gguf":
        return _gguf(sources, repo)
    own = (e for e in sources.exports.values() if kind == "gptq" and repo.endswith(e.format))
    served = all(export.vllm_has_kernel is not False for export in own)
    return _checkpoint(repo, kind, served)


def _adapter(sources: "Sources", repo: str) -> str:
    origin = sources.origin
    base, revision = origin.source, f', revision="{origin.revision}"' if origin.revision else ""
    if not origin.revision:
        base = "path/to/the/base"  # what this machine calls it means nothing on another
    loads = ["AutoModelForCausalLM", "AutoTokenizer"]
    settings = quantized = ""
    if sources.training.base_quantization == "nf4":
        loads.append("BitsAndBytesConfig")
        settings = (
            "# The adapter was trained on the base in these 4 bits; on 16 it answers otherwise.\n"
            "nf4 = BitsAndBytesConfig(\n"
            '    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,\n'
            f"    bnb_4bit_compute_dtype=torch.{sources.training.compute_dtype},\n"
            ")\n"
        )
        quantized = ", quantization_config=nf4"
    torch = "import torch\n" if settings else ""
    return (
        f"Adapter, with transformers and peft (`{repo}`):\n\n"
        f"```python\n{torch}from peft import PeftModel\n"
        f"from transformers import {', '.join(loads)}\n\n{settings}"
        f'base = AutoModelForCausalLM.from_pretrained("{base}"{revision}{quantized})\n'
        f'model = PeftModel.from_pretrained(base, "{repo}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{repo}")\n```'
    )


def _checkpoint(repo: str, kind: "Kind", served: bool) -> str:
    what = "Merged model" if kind == "merged" else "GPTQ"
    serve = f"\n\n```sh\nvllm serve {repo}\n```" if served else ""
    needs = "" if kind == "merged" else "# needs: pip install gptqmodel optimum\n"
    return (
        f"{what}, with transformers{' or vLLM' if served else ''} (`{repo}`):\n\n"
        f"```python\n{needs}from transformers import pipeline\n\n"
        f'chat = pipeline("text-generation", model="{repo}")\n'
        f'print(chat([{{"role": "user", "content": "Hello"}}]))\n```{serve}'
    )


def _gguf(sources: "Sources", repo: str) -> str:
    name = repo.rsplit("/", 1)[-1].removesuffix("-gguf")
    formats = [export.format for export in sources.exports.values() if export.kind == "gguf"]
    chosen = formats[-1]
    lines = [
        f"llama-cli -m {name}-{chosen}.gguf -cnv",
        f"llama-cli -hf {repo}:{chosen.upper()} -cnv",
        f"ollama run hf.co/{repo}:{chosen.upper()}",
        f"ollama create {name} -f {MODELFILE}-{chosen}  # from a copy of the repository",
    ]
    shown = "\n".join(lines)
    return (
        f"GGUF, with llama.cpp or Ollama (`{repo}`, {', '.join(formats)}):\n\n```sh\n{shown}\n```"
    )
