"""The values of a recipe that people change between runs, as typed parameters of the pipeline.

Each of them is a field of its own in KFP's form for a run, and its default is the recipe's value.
The JSON parameter of its section does not have the key, so a run has each value in one place. The
step plan puts both together, checks the whole, and passes the sections on to the other steps.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tuneline.errors import RecipeError
from tuneline.kinds import EXPORT_KINDS
from tuneline.recipe import Recipe
from tuneline.runtime.parameter_text import to_json

SECTIONS = ("train", "prepare", "quantize")
"""Sections that have typed parameters."""


@dataclass(frozen=True)
class Parameter:
    """Where the value of a typed parameter is in a recipe."""

    section: str
    key: str
    """Key in the section, with dots."""
    zero: tuple[Any, ...] = ()
    """The recipe's value that is no number, as a tuple of one; the parameter has 0 instead."""


TYPED: dict[str, Parameter] = {
    "learning_rate": Parameter("train", "learning_rate", ("auto",)),
    "num_train_epochs": Parameter("train", "num_train_epochs"),
    "max_steps": Parameter("train", "max_steps", (None,)),
    "lora_r": Parameter("train", "lora.r"),
    "lora_alpha": Parameter("train", "lora.lora_alpha"),
    "max_seq_length": Parameter("prepare", "max_seq_length", ("auto",)),
    **{f"{kind}_formats": Parameter("quantize", kind) for kind in EXPORT_KINDS},
}
"""The typed parameters, by name. Base model, dataset and target are parameters too, but no section
has them."""


def typed_values(recipe: Recipe) -> dict[str, Any]:
    """Return the value of each typed parameter that a recipe amounts to."""
    sections = {section: _plain(recipe, section) for section in SECTIONS}
    values = {}
    for name, parameter in TYPED.items():
        holder, key = _place(sections[parameter.section], parameter.key)
        values[name] = 0 if holder[key] in parameter.zero else holder[key]
    return values


def section_json(recipe: Recipe, section: str) -> str:
    """Return a section of a recipe as JSON, without the keys that have typed parameters."""
    values = _plain(recipe, section)
    for parameter in TYPED.values():
        if parameter.section == section:
            holder, key = _place(values, parameter.key)
            del holder[key]
    return to_json(values)


def join(sections: Mapping[str, Mapping[str, Any]], typed: Mapping[str, Any]) -> dict[str, Any]:
    """Return sections with the values of the typed parameters in their places.

    Args:
        sections: the sections as their JSON parameters have them.
        typed: values by the name of the parameter.

    Raises:
        RecipeError: the JSON has a key that has a typed parameter.
    """
    joined = {section: _copy(values) for section, values in sections.items()}
    for name, value in typed.items():
        parameter = TYPED[name]
        holder, key = _place(joined[parameter.section], parameter.key)
        if key in holder:
            raise RecipeError(
                f"{parameter.section}_config has {parameter.key}, which the parameter {name} sets: "
                f"take the key out of {parameter.section}_config and set {name}"
            )
        if parameter.zero and value == 0:
            holder[key] = parameter.zero[0]
        else:
            # KFP's integers may arrive as floats.
            is_whole = isinstance(value, float) and value.is_integer()
            holder[key] = int(value) if is_whole else value
    return joined


def check_formats(recipe: Recipe, typed: Mapping[str, Any]) -> None:
    """Check that the formats of a run are of kinds for which the pipeline has steps, and of all.

    Args:
        recipe: the recipe that the pipeline was compiled from.
        typed: values by the name of the parameter.

    Raises:
        RecipeError: a kind of export was added or left out.
    """
    for kind in EXPORT_KINDS:
        name = f"{kind}_formats"
        compiled = getattr(recipe.quantize, kind)
        if name not in typed or bool(compiled) == bool(typed[name]):
            continue
        if compiled:
            raise RecipeError(
                f"{name} is empty, but the pipeline was compiled with steps for {kind}: name at "
                f"least one format, or compile a recipe with quantize.{kind}: []"
            )
        raise RecipeError(
            f"{name} is {', '.join(map(str, typed[name]))}, but the pipeline was compiled without "
            f"steps for {kind}: leave it empty, or compile a recipe with quantize.{kind}"
        )


def sha256_of(recipe_text: str) -> str:
    """Return the SHA-256 of a recipe's text, by which the plan knows the recipe of its pipeline."""
    return hashlib.sha256(recipe_text.encode()).hexdigest()


def check_recipe(recipe_text: str, recipe_sha256: str) -> None:
    """Check that a run has the recipe that its pipeline was compiled from.

    Raises:
        RecipeError: it has another one, whose values would not reach the steps.
    """
    if recipe_sha256 and sha256_of(recipe_text) != recipe_sha256:
        raise RecipeError(
            "recipe_json is not the recipe that this pipeline was compiled from, and steps do not "
            "take their values from it: leave it as it is and change the other parameters, or "
            "compile the other recipe"
        )


def _plain(recipe: Recipe, section: str) -> dict[str, Any]:
    values: dict[str, Any] = getattr(recipe, section).model_dump(mode="json")
    return values


def _copy(value: Any) -> Any:
    return {key: _copy(each) for key, each in value.items()} if isinstance(value, dict) else value


def _place(values: dict[str, Any], dotted: str) -> tuple[dict[str, Any], str]:
    """Return the mapping that has a dotted key, and the last part of the key."""
    *path, key = dotted.split(".")
    for part in path:
        values = values.setdefault(part, {})
    return values, key
