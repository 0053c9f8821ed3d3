"""Whatever value a run has instead of its recipe's, page and card say it."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from small_records import new_export, new_merge, new_origin, new_training

from tuneline.artifacts import DatasetManifest, Decision, RunHeader
from tuneline.kinds import EXPORT_KINDS
from tuneline.pipelines.catalog import find_recipe
from tuneline.recipe import Recipe
from tuneline.record import Ancestor
from tuneline.recorded_recipe import PRIVATE_KEYS, RecordedRecipe, recorded_recipe
from tuneline.schema.keys import Path, all_keys, choices_of, dotted, node_at, types_of

SCHEMA = Recipe.model_json_schema()
PARAMETERS = (
    *("base_model", "dataset", "publish_to", "fetch", "prepare", "train", "merge", "quantize"),
    *("evaluate", "gate", "publish"),
)
"""Keys of the recipe whose values are parameters of the pipeline, so that KFP can change them."""
FIXED = {("quantize", kind) for kind in EXPORT_KINDS}
"""Keys that shape the graph of the pipeline; the records say what was made."""
PRIVATE = {(section, key) for section, keys in PRIVATE_KEYS.items() for key in keys}


def recorded(given: dict, used: dict) -> RecordedRecipe:
    """Return the recipe of a run by records whose steps had the values of `used`."""
    formats = [(kind, name) for kind in EXPORT_KINDS for name in given["quantize"][kind]]
    target = used["publish_to"]
    return recorded_recipe(
        RunHeader.parse(json.dumps(given)),
        origin=new_origin(source=used["base_model"], settings=used["fetch"]),
        dataset=DatasetManifest.model_construct(
            source=used["dataset"], sources=[], settings=used["prepare"]
        ),
        training=new_training(settings=used["train"]),
        merge=new_merge(settings=used["merge"]),
        exports=[
            new_export(kind=kind, format=name, settings=used["quantize"]) for kind, name in formats
        ],
        decision=Decision.model_construct(
            settings=used["gate"],
            made_from={"tuned_scores": Ancestor(sha256="", settings=used["evaluate"])},
        ),
        target=target if isinstance(target, str) else json.dumps(target),
        publish=used["publish"],
    )


def leaves(recipe: dict) -> Iterator[Path]:
    """Yield the path of every value of the recipe that is no section of known keys."""
    for path in all_keys(SCHEMA):
        value: Any = recipe
        for key in path:
            value = value.get(key, ()) if isinstance(value, dict) else ()
        known = isinstance(value, dict) and any(
            other[: len(path)] == path and len(other) > len(path) for other in all_keys(SCHEMA)
        )
        if path[0] in PARAMETERS and path not in FIXED and value != () and not known:
            yield path


def another(path: Path, value: Any) -> Any:
    """Return another value than the one at `path`."""
    node = node_at(SCHEMA, path)
    types = types_of(SCHEMA, node)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, list):
        return [*value, "more"]
    if isinstance(value, dict):
        return {**value, "more": 1}
    if isinstance(value, str):
        return next((x for x in choices_of(SCHEMA, node) if x not in (value, None)), f"{value}x")
    return 1 if types & {"integer", "number"} else ["some"] if "array" in types else "some"


def test_every_value_of_a_run_that_is_not_its_recipes_is_said() -> None:
    given = find_recipe("demo", []).model_dump(mode="json")
    same = recorded(given, given)
    assert same.remark == ""
    paths = list(leaves(given))
    assert len(paths) > 90 and {path[0] for path in paths} == {*PARAMETERS}
    for path in paths:
        used = copy.deepcopy(given)
        place = used
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = another(path, place[path[-1]])
        recipe = recorded(given, used)
        (said,) = recipe.differences
        assert said.startswith(f"{dotted(path)} was ") or f"{dotted(path)}." in said
        assert recipe.sha256 != same.sha256
        if path not in PRIVATE:
            assert recipe.public().differences, path
            assert recipe.public().sha256 != same.public().sha256, path


@pytest.mark.parametrize(
    ("given", "used", "said"),
    [
        ({}, {"question": "q"}, 'columns.question was "q", the recipe does not set it'),
        ({"question": "q"}, {}, 'columns.question was not set, the recipe has "q"'),
        ({"question": "q"}, {"question": "r"}, "columns.question was r, the recipe has q"),
    ],
)
def test_keys_that_only_one_of_them_has_are_said(given: dict, used: dict, said: str) -> None:
    recipe = find_recipe("demo", []).model_dump(mode="json")
    recipe["prepare"]["columns"] = given
    changed = copy.deepcopy(recipe)
    changed["prepare"]["columns"] = used
    assert recorded(recipe, changed).differences == (f"prepare.{said.replace(chr(34), '')}",)
