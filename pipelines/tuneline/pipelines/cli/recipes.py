"""The commands for recipes: recipes, compile, schema."""

import csv
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table

from tuneline.errors import OutputExistsError, RecipeError, UserError
from tuneline.images import origin_in_words
from tuneline.pipelines.catalog import RECIPES_DIR, find_recipe, shipped_recipes
from tuneline.pipelines.cli.options import SetOption, complete_recipe, complete_step
from tuneline.pipelines.cli.run import PANEL
from tuneline.pipelines.cli.terminal import console, say
from tuneline.pipelines.recipe_reference import recipe_reference
from tuneline.recipe import Recipe, load_recipe
from tuneline.runtime.source_names import builtin_name

app = typer.Typer()


@app.command(rich_help_panel=PANEL)
def recipes(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="Name of a shipped recipe, which is printed.",
            show_default="list the shipped recipes",
            autocompletion=complete_recipe,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the generated rows of this recipe to a .csv or .jsonl file instead.",
        ),
    ] = None,
) -> None:
    """List the recipes that ship with tuneline, or print one as a start for your own."""
    if data is not None:
        _write_rows(name, data)
        return
    if name is not None:
        if not (RECIPES_DIR / f"{name}.yaml").is_file():
            names = ", ".join(path.stem for path in shipped_recipes())
            raise RecipeError(f"no shipped recipe '{name}': choose one of {names}")
        typer.echo((RECIPES_DIR / f"{name}.yaml").read_text(encoding="utf-8"), nl=False)
        return
    # Names are not cut even in a narrow terminal, because the user has to type one of them next.
    name_column = Column("name", no_wrap=True, min_width=20)
    table = Table(name_column, "base model", "dataset", "method", "description", box=None)
    for path in shipped_recipes():
        loaded = load_recipe(path)
        table.add_row(
            loaded.name,
            loaded.base_model,
            loaded.data_names,
            loaded.prepare.method,
            loaded.description,
        )
    console.print(table)


def _write_rows(name: str | None, path: Path) -> None:
    """Write the generated rows of a shipped recipe to a file.

    Raises:
        RecipeError: the recipe has no generated rows.
        UserError: the file's name does not end in .csv or .jsonl.
        OutputExistsError: the file exists.
    """
    # Imported here only, because pyarrow takes a moment.
    from tuneline.prepare.sources.builtin import find_builtin

    generated = {
        path.stem: loaded.dataset
        for path in shipped_recipes()
        if (loaded := load_recipe(path)).dataset and builtin_name(loaded.dataset) is not None
    }
    if name not in generated:
        raise RecipeError(
            f"--data needs a recipe whose rows are generated, not '{name or ''}': choose one of "
            f"{', '.join(generated)}"
        )
    if path.suffix not in (".csv", ".jsonl"):
        raise UserError(f"--data {path}: name a file that ends in .csv or .jsonl")
    if path.exists():
        raise OutputExistsError(f"{path} exists, and nothing is overwritten: name another file")
    builtin = find_builtin(generated[name] or "")
    assert builtin is not None
    rows = list(builtin.rows())
    with open(path, "x", encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    say(f"wrote {path.absolute()}: {len(rows)} rows")


@app.command(name="compile", rich_help_panel=PANEL)
def compile_(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE",
            help="Recipe file, or name of a shipped recipe (see `tuneline recipes`).",
            show_default="only --component needs none",
            autocompletion=complete_recipe,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="File to write; its name ends in .yaml. Only a compiled file is replaced.",
            show_default="NAME.pipeline.yaml, beside the recipe, or STEP.component.yaml",
        ),
    ] = None,
    set_: SetOption = [],  # noqa: B006, typer copies it
    resources: Annotated[
        str | None,
        typer.Option(
            metavar="NAMESPACE",
            help="Write Kubernetes resources for this namespace instead, for GitOps.",
        ),
    ] = None,
    component: Annotated[
        str | None,
        typer.Option(
            metavar="STEP",
            help="Compile only the component of this step, for a pipeline of your own. With a "
            "recipe, its image is in the registry of the recipe.",
            autocompletion=complete_step,
        ),
    ] = None,
) -> None:
    """Compile a recipe to a KFP pipeline for a cluster, or one component of it."""
    from kfp import compiler

    from tuneline.pipelines.compiled_file import check_output, output_beside
    from tuneline.pipelines.finetune import finetune
    from tuneline.pipelines.gitops import write_resources
    from tuneline.pipelines.inputs import local_problems

    if component is not None:
        if resources is not None:
            raise UserError("--resources writes a pipeline: give it without --component")
        _compile_component(component, recipe, output, set_)
        return
    if recipe is None:
        raise UserError("name a recipe, e.g. tuneline compile demo, or a step with --component")
    loaded = find_recipe(recipe, set_)
    problems = local_problems(loaded)
    if problems:
        raise RecipeError("\n".join(problems))
    path = output or output_beside(recipe, loaded.name)
    check_output(path)
    if resources is not None:
        version = write_resources(loaded, path, namespace=resources)
        say(f"wrote {path.absolute()}: version {version}")
    else:
        compiler.Compiler().compile(finetune(loaded), str(path))
        say(f"wrote {path.absolute()}")
    _say_images(loaded.placement.registry)


def _compile_component(
    name: str, recipe: str | None, output: Path | None, assignments: list[str]
) -> None:
    from tuneline.pipelines.compiled_file import check_output
    from tuneline.pipelines.component_reference import compile_component

    if recipe is None and assignments:
        raise UserError("--set changes a recipe: name one, e.g. tuneline compile demo --component")
    registry = find_recipe(recipe, assignments).placement.registry if recipe is not None else None
    path = output or Path(f"{name}.component.yaml")
    check_output(path)
    compile_component(name, path, registry=registry)
    say(f"wrote {path.absolute()}")
    _say_images(registry)


def _say_images(registry: str | None) -> None:
    """Say which images a compiled file names."""
    say(f"images: {origin_in_words(registry)}")
    if registry is None:
        say("to name a registry, set placement.registry of the recipe")


@app.command(rich_help_panel=PANEL)
def schema(
    markdown: Annotated[
        bool,
        typer.Option("--markdown", help="Print a reference of every key in Markdown instead."),
    ] = False,
) -> None:
    """Print the JSON Schema of a recipe, for editors and other tools."""
    if markdown:
        typer.echo(recipe_reference(), nl=False)
        return
    typer.echo(json.dumps(Recipe.model_json_schema(), indent=2))
