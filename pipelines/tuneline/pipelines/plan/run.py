"""The plan as the first step of a run, in the run's own pod and with its own credentials.

It stands with the pipelines, because it looks at every step's config, and steps do not know each
other.
"""

import json
import logging
import os
from pathlib import Path

from tuneline.errors import ClusterError, RecipeError, UserError
from tuneline.pipelines.kube import Kube
from tuneline.pipelines.plan.check import Check
from tuneline.pipelines.plan.plan import plan
from tuneline.recipe import Recipe
from tuneline.runtime.environment import IMAGE_VARIABLE
from tuneline.runtime.kubernetes_client import own_namespace

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
POD_VARIABLE = "KFP_POD_NAME"
"""Set in the steps' pods on a cluster, and nowhere else."""


def run(
    recipe: str, *, base_model: str, train: str, prepare: str, quantize: str, summary_path: str
) -> list[Check]:
    """Check a run that begins, and write down what was found.

    Args:
        recipe: as JSON.
        base_model: of this run.
        train: its config, as JSON; the next two alike.
        prepare: see there.
        quantize: see there.
        summary_path: a Markdown page.

    Raises:
        RecipeError: this image does not know what the recipe says.
        UserError: the run cannot work as it stands.
    """
    values = json.loads(recipe)
    values |= {"base_model": base_model}
    values |= {"train": json.loads(train), "prepare": json.loads(prepare)}
    values |= {"quantize": json.loads(quantize)}
    checks = _checks(_parse(values))
    for check in checks:
        level = logging.ERROR if check.verdict == "fail" else logging.INFO
        logger.log(level, "%s: %s: %s", check.verdict, check.name, check.words)
    Path(summary_path).parent.mkdir(parents=True, exist_ok=True)
    Path(summary_path).write_text(_page(checks), encoding="utf-8")
    failed = [check for check in checks if check.verdict == "fail"]
    if failed:
        said = "; ".join(f"{check.name}: {check.words}" for check in failed)
        advice = "; ".join(dict.fromkeys(check.advice for check in failed if check.advice))
        raise UserError(f"this run cannot work as it stands: {said}. What to change: {advice}")
    return checks


def _parse(values: dict[str, object]) -> Recipe:
    try:
        return Recipe.parse(values)
    except RecipeError as error:
        image = os.environ.get(IMAGE_VARIABLE, "not named")
        raise RecipeError(
            f"{error}; if the recipe is right, this step's image ({image}) is of another version "
            "of tuneline than what compiled the pipeline: build the images anew"
        ) from None


def _checks(recipe: Recipe) -> list[Check]:
    namespace = own_namespace() if os.environ.get(POD_VARIABLE) else None
    if namespace is None:
        return plan(recipe)
    # The steps themselves need no API, but for several nodes, which wait longer for it.
    kube = Kube(namespace)
    if not kube.answers(CONNECT_SECONDS):
        words = f"{kube.host} takes no connection from this pod: does a network policy allow it?"
        return [*plan(recipe), Check("API", "unknown", words)]
    try:
        return plan(recipe, kube=kube, is_step=True)
    except ClusterError as error:
        return [*plan(recipe), Check("API", "unknown", str(error))]


def _page(checks: list[Check]) -> str:
    rows = [
        f"| {check.verdict} | {check.name} | {_cell(check.words)} | {_cell(check.advice)} |"
        for check in checks
    ]
    head = ["# Before the first step", "", "| | what | found | what to do |", "|---|---|---|---|"]
    return "\n".join([*head, *rows, ""])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
