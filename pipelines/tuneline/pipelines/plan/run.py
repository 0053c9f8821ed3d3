"""The plan as the first step of a run, in a pod of the run and with the run's credentials.

The step is part of tuneline.pipelines and not one of the components, because it reads the config of
every step, and components do not import each other.
"""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tuneline.errors import ClusterError, RecipeError, UserError
from tuneline.pipelines.kube import Kube
from tuneline.pipelines.parameters import check_formats, check_recipe, join
from tuneline.pipelines.plan.base_model import read_base_model
from tuneline.pipelines.plan.check import Check, markdown_page
from tuneline.pipelines.plan.plan import plan
from tuneline.pods import POD_NAME_VARIABLE
from tuneline.recipe import Recipe
from tuneline.runtime.environment import IMAGE_VARIABLE
from tuneline.runtime.kubernetes_client import own_namespace
from tuneline.seals import seal_page

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
"""Seconds within which the Kubernetes API must accept a connection."""


@dataclass(frozen=True)
class Planned:
    """What the plan found."""

    recipe: Recipe
    """The recipe with the values of this run."""
    checks: list[Check]


def run(
    recipe: str,
    *,
    base_model: str,
    train: str,
    prepare: str,
    quantize: str,
    summary_path: str,
    typed: Mapping[str, Any] | None = None,
    recipe_sha256: str = "",
    store: str = "",
) -> Planned:
    """Check a run that is starting, and write the result to a Markdown page.

    Args:
        recipe: the recipe that the pipeline was compiled from, as JSON.
        base_model: base model of this run.
        train: config of the train step in this run, as JSON.
        prepare: config of the prepare step in this run, as JSON.
        quantize: config of the quantize step in this run, as JSON.
        summary_path: file for the Markdown page.
        typed: values of the typed parameters of this run, which the sections then do not have.
        recipe_sha256: SHA-256 of the recipe that the pipeline was compiled from; "": not checked.
        store: URI of an artifact in the store that KFP uses.

    Raises:
        RecipeError: the recipe is another one than that of the pipeline, or has keys that this
            image does not know, a section has a value that
            a typed parameter sets, or a kind of export was added or left out.
        UserError: the run cannot work as configured.
    """
    check_recipe(recipe, recipe_sha256)
    values = json.loads(recipe)
    typed = typed or {}
    check_formats(_parse(values), typed)
    sections = {"train": train, "prepare": prepare, "quantize": quantize}
    values |= join({name: _section(name, text) for name, text in sections.items()}, typed)
    changed = _parse({**values, "base_model": base_model})
    checks = _checks(changed, uploads_to_s3=not store.startswith("gs://"))
    for check in checks:
        level = logging.ERROR if check.verdict == "fail" else logging.INFO
        logger.log(level, "%s: %s: %s", check.verdict, check.name, check.words)
    Path(summary_path).parent.mkdir(parents=True, exist_ok=True)
    Path(summary_path).write_text(seal_page(markdown_page(checks)), encoding="utf-8")
    failed = [check for check in checks if check.verdict == "fail"]
    if failed:
        problems = "; ".join(f"{check.name}: {check.words}" for check in failed)
        advice = "; ".join(dict.fromkeys(check.advice for check in failed if check.advice))
        raise UserError(f"this run cannot work as configured: {problems}. What to change: {advice}")
    return Planned(changed, checks)


def _section(name: str, text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise RecipeError(f"{name}_config is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{name}_config is {text[:60]}, but a JSON object is needed")
    return values


def _parse(values: dict[str, object]) -> Recipe:
    try:
        return Recipe.parse(values)
    except RecipeError as error:
        image = os.environ.get(IMAGE_VARIABLE, "unknown")
        raise RecipeError(
            f"{error}; if the recipe is right, this step's image ({image}) has another version of "
            "tuneline than the one that compiled the pipeline: rebuild the images"
        ) from None


def _checks(recipe: Recipe, *, uploads_to_s3: bool) -> list[Check]:
    namespace = own_namespace() if os.environ.get(POD_NAME_VARIABLE) else None
    model = read_base_model(recipe)
    check = partial(plan, recipe, model=model, uploads_to_s3=uploads_to_s3)
    if namespace is None:
        return check()
    # Of all steps only train-on-nodes needs the API, so its absence is no reason to fail.
    kube = Kube(namespace)
    if not kube.answers(CONNECT_SECONDS):
        words = f"{kube.host} accepts no connection from this pod: does a network policy allow it?"
        return [*check(), Check("API", "unknown", words)]
    try:
        return check(kube=kube, is_step=True)
    except ClusterError as error:
        return [*check(), Check("API", "unknown", str(error))]
