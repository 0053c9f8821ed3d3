"""What is known of a base model before it is fetched, and whether the steps can use it.

config.json and the headers of the weights answer what fetch and quantize would ask later: whether
stored weights can be trained on, and whether the exports can be made.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from tuneline.errors import ModelError
from tuneline.fetch.quantised import Quantisation, quantisation_of
from tuneline.gpu_profiles import GPU_PROFILES
from tuneline.html.units import parameters
from tuneline.kinds import ExportKind
from tuneline.models.multimodal import Part, loaded_part, text_config
from tuneline.pipelines.plan.check import Check
from tuneline.pipelines.plan.model_facts import ModelFacts, model_facts
from tuneline.pipelines.plan.model_files import Unknown, read_model
from tuneline.quantize.awq.families import awq_problem
from tuneline.quantize.gguf.converter import known_architectures
from tuneline.quantize.gguf.support import gguf_problem
from tuneline.recipe import Recipe

_PARTS: dict[Part, str] = {
    "whole": "its encoders of images and sounds are loaded, but stay as they are",
    "text": "only its text model is loaded and trained, not its encoders of images and sounds",
}
"""What a run does with a multimodal model, in words, by the part that is loaded."""


@dataclass(frozen=True)
class BaseModel:
    """A base model, as far as it can be read."""

    facts: ModelFacts | None = None
    """The model's sizes; None if they are not known."""
    reason: str = ""
    """Why the sizes are not known."""
    refusal: str = ""
    """Why fetch will refuse the model; empty if no reason is known."""
    config: dict[str, Any] = field(default_factory=dict)
    """The content of config.json; empty if it cannot be read."""
    part: Part | None = None
    """The part of a multimodal model that is loaded; None: the model reads text alone."""
    quantisation: Quantisation | None = None
    """How the weights are quantised; None: they are not."""


def read_base_model(recipe: Recipe) -> BaseModel:
    """Read what a recipe's base model is made of."""
    source = recipe.base_model
    try:
        files = read_model(source, revision=recipe.fetch.revision)
    except Unknown as reason:
        return BaseModel(reason=str(reason))
    try:
        part = loaded_part(files.config, source=source)
        quantisation = quantisation_of(files.config, source=source)
    except ModelError as error:
        return BaseModel(reason="it cannot be a base model", refusal=str(error))
    known = BaseModel(config=files.config, part=part, quantisation=quantisation)
    try:
        return replace(known, facts=model_facts(files))
    except Unknown as reason:
        return replace(known, reason=str(reason))


def check_base_model(
    recipe: Recipe, num_parameters: float | None, model: BaseModel
) -> Iterator[Check]:
    """Check that fetch takes a base model, and that its exports can be made.

    Args:
        recipe: the recipe.
        num_parameters: parameters of the base model; None if they are not known.
        model: what is known of it.
    """
    if model.refusal:
        yield Check("base model", "fail", model.refusal)
        return
    if num_parameters is not None:
        yield _sizes(recipe, num_parameters, model)
    has_experts = model.facts is not None and model.facts.experts is not None
    if model.part is not None:
        yield Check("base model", "ok", _PARTS[model.part])
    if model.quantisation is not None:
        is_kept = model.quantisation.is_kept and not has_experts
        what = "trained on as they are" if is_kept else "converted to bfloat16 by fetch"
        words = f"its weights are in {model.quantisation.name}, and {what}"
        yield Check("base model", "ok", words)
    yield from _exports(recipe, model.config, has_experts=has_experts)


def _sizes(recipe: Recipe, num_parameters: float, model: BaseModel) -> Check:
    """Say how large the base model is."""
    size_in_words = f"{parameters(num_parameters)} parameters"
    if model.facts is None:
        words = f"{recipe.base_model} is known by its name only, because {model.reason}"
        return Check("base model", "unknown", f"{words}: a Llama of {size_in_words} is assumed")
    words = f"{recipe.base_model}: {size_in_words}"
    experts = model.facts.experts
    if experts is not None:
        words += (
            f", of which {parameters(model.facts.num_active)} compute each token: "
            f"{experts.top_k} of {experts.num_experts} experts"
        )
    return Check("base model", "ok", words)


def _exports(recipe: Recipe, config: dict[str, Any], *, has_experts: bool) -> Iterator[Check]:
    """Yield a failure for each kind of export that cannot be made of the model."""
    problem = _gguf_problem(config)
    if recipe.quantize.gguf and problem is not None:
        words = f"{recipe.base_model} cannot be exported as GGUF: {problem}"
        yield Check("exports", "fail", words, "set quantize.gguf to [], or take another base model")
    checkpoints: tuple[ExportKind, ...] = ("gptq", "awq", "fp8")
    for kind in checkpoints:
        if getattr(recipe.quantize, kind) and has_experts:
            words = (
                f"{recipe.base_model} is a mixture of experts, and transformers cannot read "
                f"experts that {kind.upper()} has packed"
            )
            advice = f"set quantize.{kind} to [], and export it as GGUF"
            yield Check("exports", "fail", words, advice)
    problem = awq_problem(config)
    if recipe.quantize.awq and problem is not None:
        words = f"{recipe.base_model} cannot be exported as AWQ: {problem}"
        yield Check("exports", "fail", words, "set quantize.awq to [], and take gptq-4bit or fp8")
    gpu = GPU_PROFILES.get(recipe.placement.profile)
    if recipe.quantize.fp8 and gpu is not None and not gpu.has_fp8:
        words = (
            f"the GPUs of the profile {recipe.placement.profile} do not multiply FP8, so vLLM "
            "serves an FP8 checkpoint on them with activations in 16 bits, or not at all"
        )
        yield Check("exports", "warn", words, "serve it on Ada, Hopper or later, or take gptq-8bit")


def _gguf_problem(config: dict[str, Any]) -> str | None:
    """Return why a model cannot be exported as GGUF; None: no reason is known."""
    problem = gguf_problem(config)
    if problem is not None:
        return problem
    # The converter prefers the text model's architecture too.
    names = text_config(config).get("architectures") or config.get("architectures")
    known = known_architectures()
    if isinstance(names, list) and names and known and names[0] not in known:
        return f"llama.cpp does not know its architecture ({names[0]})"
    return None
