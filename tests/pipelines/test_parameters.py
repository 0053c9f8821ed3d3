"""The typed parameters of the pipeline: each value is in one place, and the plan joins them."""

import copy
import inspect
import json
from pathlib import Path
from typing import Any

import kfp_runs
import pytest
import yaml
from kfp import compiler

from tuneline.errors import RecipeError
from tuneline.kinds import EXPORT_KINDS
from tuneline.pipelines.catalog import RECIPES_DIR, find_recipe
from tuneline.pipelines.finetune import finetune
from tuneline.pipelines.kfp_client.graph import graph_of
from tuneline.pipelines.parameters import (
    SECTIONS,
    TYPED,
    join,
    section_json,
    sha256_of,
    typed_values,
)
from tuneline.pipelines.plan.component import plan
from tuneline.pipelines.plan.run import run
from tuneline.recipe import Recipe
from tuneline.runtime.kfp_run import read_attempts
from tuneline.runtime.parameter_text import to_json


def parameters_of(recipe: Recipe, tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "pipeline.yaml"
    compiler.Compiler().compile(finetune(recipe), str(path))
    root = next(yaml.safe_load_all(path.read_text()))["root"]
    declared: dict[str, Any] = root["inputDefinitions"]["parameters"]
    return declared


def test_every_value_that_people_change_has_a_type_and_a_description(tmp_path: Path) -> None:
    declared = parameters_of(find_recipe("demo", []), tmp_path)
    assert {name: declared[name]["parameterType"] for name in TYPED} == {
        "learning_rate": "NUMBER_DOUBLE",
        "num_train_epochs": "NUMBER_DOUBLE",
        **dict.fromkeys(("max_steps", "lora_r", "lora_alpha", "max_seq_length"), "NUMBER_INTEGER"),
        **dict.fromkeys((f"{kind}_formats" for kind in EXPORT_KINDS), "LIST"),
    }
    assert [name for name, each in declared.items() if not each.get("description")] == []
    assert set(TYPED) <= set(inspect.signature(plan.python_func).parameters)


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES_DIR.glob("*.yaml")))
def test_joined_sections_are_those_of_the_recipe(name: str) -> None:
    recipe = find_recipe(name, ["train.learning_rate=auto", "prepare.max_seq_length=auto"])
    # A protobuf value has no integers.
    typed = {
        key: float(value) if isinstance(value, int) else value
        for key, value in typed_values(recipe).items()
    }
    texts = {section: section_json(recipe, section) for section in SECTIONS}
    joined = join({section: json.loads(text) for section, text in texts.items()}, typed)
    assert Recipe.parse({**recipe.model_dump(mode="json"), **joined}) == recipe
    for parameter in TYPED.values():
        part = json.loads(texts[parameter.section])
        *path, key = parameter.key.split(".")
        for each in path:
            part = part[each]
        assert key not in part


def started(tmp_path: Path, sections: dict[str, str], **typed: Any) -> Recipe:
    recipe = find_recipe("demo", [])
    texts = {section: section_json(recipe, section) for section in SECTIONS} | sections
    return run(
        recipe.model_dump_json(),
        base_model=recipe.base_model,
        **texts,
        typed=typed_values(recipe) | typed,
        summary_path=str(tmp_path / "summary"),
    ).recipe


def test_a_run_has_the_values_that_it_was_started_with(tmp_path: Path) -> None:
    changed = started(
        tmp_path,
        {"train": '{"lora":{"lora_dropout":0.1},"seed":7}'},
        learning_rate=0.0,
        lora_r=8.0,
        max_steps=0.0,
        gguf_formats=["q8_0"],
    )
    assert (changed.train.learning_rate, changed.train.lora.r) == ("auto", 8)
    assert (changed.train.max_steps, changed.train.seed) == (None, 7)
    assert changed.train.lora.lora_dropout == 0.1
    assert changed.quantize.gguf == ("q8_0",)


@pytest.mark.parametrize(
    ("sections", "typed", "says"),
    [
        (
            {"train": '{"lora":{"r":8}}'},
            {},
            "train_config has lora.r, which the parameter lora_r sets: take the key out of "
            "train_config and set lora_r",
        ),
        ({"train": "[]"}, {}, r"train_config is \[\], but a JSON object is needed"),
        ({"prepare": "{"}, {}, "prepare_config is not JSON: Expecting"),
        ({}, {"lora_r": 8.5}, "train.lora.r is 8.5, but must be a whole number"),
        ({}, {"gguf_formats": ["q9"]}, "quantize.gguf.*q9"),
        ({}, {"gptq_formats": []}, "gptq_formats is empty, but the pipeline was compiled with"),
    ],
)
def test_what_a_run_cannot_be_started_with(
    sections: dict[str, str], typed: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=says):
        started(tmp_path, sections, **typed)


def test_another_recipe_is_refused(tmp_path: Path) -> None:
    recipe = find_recipe("demo", [])
    other = find_recipe("demo", ["train.seed=1"])
    with pytest.raises(RecipeError, match="recipe_json is not the recipe that this pipeline was"):
        run(
            to_json(other),
            recipe_sha256=sha256_of(to_json(recipe)),
            base_model=recipe.base_model,
            **{section: section_json(recipe, section) for section in SECTIONS},
            typed=typed_values(recipe),
            summary_path=str(tmp_path / "summary"),
        )


def test_a_kind_without_steps_takes_no_formats(tmp_path: Path) -> None:
    recipe = find_recipe("demo", ["quantize.gptq=[]"])
    with pytest.raises(RecipeError, match="gptq_formats is gptq-4bit, but .* without steps for"):
        run(
            recipe.model_dump_json(),
            base_model=recipe.base_model,
            **{section: section_json(recipe, section) for section in SECTIONS},
            typed=typed_values(recipe) | {"gptq_formats": ["gptq-4bit"]},
            summary_path=str(tmp_path / "summary"),
        )


def test_the_graph_of_a_run_has_the_formats_of_the_run(tmp_path: Path) -> None:
    path = tmp_path / "pipeline.yaml"
    compiler.Compiler().compile(finetune(find_recipe("demo", [])), str(path))
    spec = next(yaml.safe_load_all(path.read_text()))
    for parameters, formats in (
        ({}, ["f16", "q8_0", "q5_k_m", "q4_k_m"]),
        ({"gguf_formats": ["iq4_xs"]}, ["iq4_xs"]),
    ):
        names = [step.name for step in graph_of(spec, parameters).steps]
        made = [name for name in names if name.startswith("quantize-gguf")]
        assert made == [f"quantize-gguf {each}" for each in formats]


def test_attempts_have_the_names_of_the_formats() -> None:
    pods, recorded = kfp_runs.recorded("demo-nodes")
    expected = {attempt.step for attempt in read_attempts(pods, recorded)}
    workflow = copy.deepcopy(recorded)
    kinds = ("gguf", "gptq")
    for node in workflow["status"]["nodes"].values():
        # The loop of the recorded run has constant items. This is one over a parameter, as KFP
        # 2.17 writes it (backend/src/v2/compiler/argocompiler/dag.go).
        kind = "gptq" if "export-gptq" in node["name"] else "gguf"
        channels = {f"pipelinechannel--{kind}_formats": f"{kind}_formats" for kind in kinds}
        sources = channels | {
            "formats": f"pipelinechannel--{kind}_formats",
            "pipelinechannel--formats": "formats",
        }
        inputs = {name: {"componentInputParameter": each} for name, each in sources.items()}
        for parameter in node.get("inputs", {}).get("parameters", []):
            task = json.loads(parameter["value"])
            if "parameterIterator" in task:
                task["parameterIterator"]["items"] = {"inputParameter": "pipelinechannel--formats"}
            task["inputs"] = {"parameters": inputs}
            parameter["value"] = json.dumps(task)
        if node["name"].endswith(".root-driver(0)"):
            values = {
                "gguf_formats": ["f16", "q8_0", "q5_k_m", "q4_k_m"],
                "gptq_formats": ["gptq-4bit"],
            }
            config = json.dumps({"parameterValues": values})
            node["inputs"]["parameters"].append({"name": "runtime-config", "value": config})
    attempts = read_attempts([], workflow)
    assert {each.step for each in attempts} == expected
    assert "quantize-gguf q5_k_m" in expected
