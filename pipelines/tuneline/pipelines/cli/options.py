"""Arguments and options that several commands share, each defined once."""

from collections.abc import Iterator
from typing import Annotated

import typer

from tuneline.pipelines.catalog import shipped_recipes
from tuneline.steps import STEPS


def complete_recipe(incomplete: str) -> Iterator[str]:
    """Yield the shipped recipes that begin with what was typed."""
    # If no shipped recipe matches, the shell itself completes file names.
    for path in shipped_recipes():
        if path.stem.startswith(incomplete):
            yield path.stem


def complete_step(incomplete: str) -> Iterator[str]:
    """Yield the steps that begin with what was typed."""
    yield from (name for name in STEPS if name.startswith(incomplete))


RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="Recipe file, or name of a shipped recipe (see `tuneline recipes`).",
        autocompletion=complete_recipe,
    ),
]
SetOption = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override one key of the recipe, e.g. train.max_steps=60. Can be repeated.",
    ),
]
NoCacheOption = Annotated[
    list[str],
    typer.Option(
        "--no-cache",
        metavar="STEP",
        help="Run this step again even if the cache has its result, and then the steps after it. "
        "Can be repeated; all means every step. The new results are not put into the cache.",
        autocompletion=complete_step,
    ),
]
RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="ID or name of a run, or directory of a local run.")
]
HostOption = Annotated[
    str | None,
    typer.Option(
        envvar="KFP_ENDPOINT",
        metavar="URL",
        help="URL of the KFP API (found automatically inside a cluster).",
    ),
]
NamespaceOption = Annotated[
    str | None,
    typer.Option(metavar="NAMESPACE", help="Your namespace, if your Kubeflow uses profiles."),
]
ExperimentOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="KFP experiment that groups the runs.",
        show_default="the recipe's name",
    ),
]
AccountOption = Annotated[
    str | None,
    typer.Option(
        metavar="ACCOUNT", help="Service account that the pods use, e.g. tuneline-runner."
    ),
]
RootOption = Annotated[
    str | None,
    typer.Option(
        metavar="URI",
        help="Where KFP stores artifacts, e.g. s3://bucket/path.",
        show_default="set by the KFP installation",
    ),
]
ContextOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Context of your kubeconfig to use.",
        show_default="the current context",
    ),
]
