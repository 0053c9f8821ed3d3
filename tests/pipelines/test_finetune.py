"""The compiled pipeline: the golden file, what must not stand in it, and how it is wired."""

import hashlib
import json
import os
import re
from pathlib import Path

import pytest
import yaml
from google.protobuf import json_format
from kfp import compiler

from tuneline.errors import UserError
from tuneline.images import USER_ID
from tuneline.pipelines.catalog import RECIPES_DIR
from tuneline.pipelines.finetune import finetune
from tuneline.pipelines.lint.lint import lint_file
from tuneline.prepare import PrepareConfig
from tuneline.publish import PublishConfig
from tuneline.recipe import Recipe, load_recipe
from tuneline.runtime.parameter_text import decode_text
from tuneline.steps import STEPS

GOLDEN = Path(__file__).parent / "golden" / "demo.yaml"
RECIPES = sorted(path.stem for path in RECIPES_DIR.glob("*.yaml"))


def compile_recipe(name: str, path: Path) -> list[dict]:
    """Compile a shipped recipe and return the documents: the IR, and the platform's part."""
    compiler.Compiler().compile(finetune(load_recipe(RECIPES_DIR / f"{name}.yaml")), str(path))
    return list(yaml.safe_load_all(path.read_text()))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict, dict]:
    path = tmp_path_factory.mktemp("compiled") / "demo.yaml"
    pipeline, platform = compile_recipe("demo", path)
    return path.read_text(), pipeline, platform


def test_the_demo_compiles_to_the_golden_file(demo: tuple[str, dict, dict]) -> None:
    text = demo[0]
    if os.environ.get("UPDATE_GOLDEN"):
        assert not os.environ.get("CI"), "the golden file is never rewritten in CI"
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text(), (
        "the compiled demo differs from the golden file: read the difference, then "
        "UPDATE_GOLDEN=1 make test"
    )


@pytest.mark.parametrize("name", RECIPES)
def test_nothing_that_must_not_be_there(name: str, tmp_path: Path) -> None:
    path = tmp_path / "pipeline.yaml"
    compile_recipe(name, path)
    text = path.read_text()
    assert "pip install" not in text
    assert not re.search(r"hf_[A-Za-z0-9]{8,}", text)
    assert ":latest" not in text
    for home in ("/root", "/home", os.path.expanduser("~"), str(Path.cwd())):
        assert home not in text
    assert lint_file(path) == []


def executors(pipeline: dict) -> dict[str, dict]:
    found = pipeline["deploymentSpec"]["executors"]
    return {name.removeprefix("exec-"): spec["container"] for name, spec in found.items()}


def test_every_pod_has_requests_limits_and_a_user(demo: tuple[str, dict, dict]) -> None:
    _, pipeline, platform = demo
    kubernetes = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    containers = executors(pipeline)
    # The others are for recipes that ask for an importance matrix, nodes, AWQ, FP8 or tasks of
    # lm-eval, and for files that are sent.
    always = set(STEPS) - {"measure-importance", "train-on-nodes", "quantize-awq", "quantize-fp8"}
    always -= {"collect-benchmarks", "receive-files"}
    assert {re.sub(r"-\d+$", "", name) for name in containers} == always
    for name, container in containers.items():
        resources = container["resources"]
        for key in ("CpuRequest", "CpuLimit", "MemoryRequest", "MemoryLimit"):
            assert resources[f"resource{key}"], name
        context = kubernetes[f"exec-{name}"]["securityContext"]
        assert context == {"runAsUser": str(USER_ID), "runAsNonRoot": True}, name
        assert re.fullmatch(r"localhost/tuneline/[a-z]+:\d+\.\d+\.\d+", container["image"]), name


def tasks(pipeline: dict) -> dict[str, dict]:
    """Every task of every nested DAG, by its name."""
    found = dict(pipeline["root"]["dag"]["tasks"])
    for component in pipeline["components"].values():
        found.update(component.get("dag", {}).get("tasks", {}))
    return found


def test_the_wiring(demo: tuple[str, dict, dict]) -> None:
    _, pipeline, _ = demo
    found = tasks(pipeline)
    assert set(found["evaluate"]["dependentTasks"]) == {"fetch", "prepare"}
    assert set(found["evaluate-2"]["dependentTasks"]) == {"merge", "prepare"}
    assert set(found["train"]["dependentTasks"]) == {"plan", "fetch", "prepare", "check-exports"}
    assert set(found["check-exports"]["dependentTasks"]) == {"plan", "fetch", "prepare"}
    assert set(found["gate"]["dependentTasks"]) == {
        *("evaluate", "evaluate-2", "look-up-published"),
        *("merge", "export-gguf", "export-gptq"),
    }
    assert found["look-up-published"]["dependentTasks"] == ["plan"]
    assert pipeline["root"]["dag"]["tasks"]["diagnose"]["triggerPolicy"]["strategy"] == (
        "ALL_UPSTREAM_TASKS_COMPLETED"
    )
    for kind in ("gguf", "gptq"):
        exporting = found[f"export-{kind}"]["inputs"]["parameters"]["formats"]
        assert exporting == {"componentInputParameter": f"pipelinechannel--{kind}_formats"}
        (loop,) = (
            task
            for task in pipeline["components"][f"comp-export-{kind}"]["dag"]["tasks"].values()
            if "parameterIterator" in task
        )
        name = loop["parameterIterator"]["items"]["inputParameter"]
        assert loop["inputs"]["parameters"][name] == {"componentInputParameter": "formats"}


def test_publish_waits_for_the_verdict_in_a_condition_of_its_own(
    demo: tuple[str, dict, dict],
) -> None:
    # KFP 2.17 passes one item of a list into the DAG that dsl.If would make.
    publish = tasks(demo[1])["publish"]
    name = "pipelinechannel--gate-Output"
    assert publish["triggerPolicy"] == {
        "condition": f"inputs.parameter_values['{name}'] == 'promote'"
    }
    assert publish["inputs"]["parameters"][name] == {
        "taskOutputParameter": {"outputParameterKey": "Output", "producerTask": "gate"}
    }
    assert "gate" in publish["dependentTasks"]


def inputs_of(task: dict) -> dict[str, tuple[str, str]]:
    """The artifacts that a task gets, as (task that makes it, name of the output)."""
    return {
        name: (
            found["taskOutputArtifact"]["producerTask"],
            found["taskOutputArtifact"]["outputArtifactKey"],
        )
        for name, found in task["inputs"]["artifacts"].items()
    }


def test_only_publish_gets_models_and_only_those_that_it_uploads(
    demo: tuple[str, dict, dict],
) -> None:
    found = tasks(demo[1])
    records = {"base_model": ("fetch", "record"), "dataset": ("prepare", "record")}
    decision = {"decision": ("gate", "decision")}
    scores = {
        "base_scores": ("evaluate", "scores"),
        "tuned_scores": ("evaluate-2", "scores"),
    }
    exports = {kind: (f"export-{kind}", "records") for kind in ("gguf", "gptq")}
    assert inputs_of(found["gate"]) == scores | exports | {
        "earlier": ("look-up-published", "earlier"),
        "merged": ("merge", "record"),
    }
    assert inputs_of(found["report"]) == records | decision | scores | {
        "adapter": ("train", "record"),
        "merged": ("merge", "record"),
        **exports,
    }
    assert inputs_of(found["publish"]) == records | decision | {
        "adapter": ("train", "adapter"),
        "merged": ("merge", "merged"),
        "gguf": ("export-gguf", "exports"),
        "gptq": ("export-gptq", "exports"),
    }


def test_the_questions_of_benchmarks_reach_prepare(tmp_path: Path) -> None:
    pipeline, platform = compile_recipe("qwen2.5-7b-korean", tmp_path / "pipeline.yaml")
    found = tasks(pipeline)
    assert inputs_of(found["prepare"])["benchmarks"] == ("collect-benchmarks", "questions")
    assert found["collect-benchmarks"]["dependentTasks"] == ["plan"]
    assert executors(pipeline)["collect-benchmarks"]["image"].startswith(
        "localhost/tuneline/evaluate:"
    )
    kubernetes = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert "secretAsEnv" in kubernetes["exec-collect-benchmarks"]


def test_held_out_rows_need_no_questions(demo: tuple[str, dict, dict]) -> None:
    found = tasks(demo[1])
    assert "collect-benchmarks" not in found
    assert "benchmarks" not in inputs_of(found["prepare"])


HOSTILE = "cost $$5$$ $(HOME) {{item}} {{{x}}} {{workflow.name}} {{=1+1}} [[Index]] <b> \\$$ \u00e9"


def test_text_of_people_is_passed_so_that_nothing_replaces_it(tmp_path: Path) -> None:
    values = {
        "description": HOSTILE,
        "base_model": f"/models/{HOSTILE}",
        "dataset": f"/data/{HOSTILE}.jsonl",
        "publish_to": f"dir:/{HOSTILE}",
        "prepare.columns": {"prompt": HOSTILE},
        "publish.tags": [HOSTILE],
    }
    recipe = load_recipe(RECIPES_DIR / "demo.yaml", values)
    path = tmp_path / "pipeline.yaml"
    compiler.Compiler().compile(finetune(recipe), str(path))
    assert lint_file(path) == []
    pipeline = next(yaml.safe_load_all(path.read_text()))
    given = pipeline["root"]["inputDefinitions"]["parameters"]
    passed = {name: declared["defaultValue"] for name, declared in given.items()}
    assert Recipe.parse(passed["recipe_json"]) == recipe
    planned = tasks(pipeline)["plan"]["inputs"]["parameters"]["recipe_sha256"]["runtimeValue"]
    assert planned == {"constant": hashlib.sha256(passed["recipe_json"].encode()).hexdigest()}
    length = {"max_seq_length": int(passed["max_seq_length"])}
    assert PrepareConfig.parse(json.loads(passed["prepare_config"]) | length) == recipe.prepare
    assert PublishConfig.parse(passed["publish_config"]) == recipe.publish
    for name in ("base_model", "dataset", "publish_to"):
        assert decode_text(passed[name]) == values[name]


def test_no_reference_dangles(demo: tuple[str, dict, dict]) -> None:
    # KFP's own loader takes references to tasks and outputs that do not exist.
    _, pipeline, _ = demo
    dags = [pipeline["root"]["dag"]]
    dags += [part["dag"] for part in pipeline["components"].values() if "dag" in part]
    for dag in dags:
        for task in dag["tasks"].values():
            for needed in task.get("dependentTasks", []):
                assert needed in dag["tasks"]
            inputs = task.get("inputs", {})
            for source in inputs.get("artifacts", {}).values():
                output = source.get("taskOutputArtifact")
                if output:
                    producer = dag["tasks"][output["producerTask"]]["componentRef"]["name"]
                    outputs = pipeline["components"][producer]["outputDefinitions"]["artifacts"]
                    assert output["outputArtifactKey"] in outputs


LOOK_UPS = ("look-up-model", "look-up-data", "look-up-published")


def test_side_effects_are_never_cached(demo: tuple[str, dict, dict]) -> None:
    _, pipeline, _ = demo
    found = tasks(pipeline)
    for name in ("plan", "publish", "report", "diagnose", *LOOK_UPS):
        assert not found[name].get("cachingOptions", {}).get("enableCache", False)
    for name in ("fetch", "prepare", "train", "merge", "evaluate", "gate"):
        assert found[name]["cachingOptions"]["enableCache"] is True


def test_a_step_that_a_run_names_is_not_taken_from_the_cache() -> None:
    """A damaged artifact in the cache was a dead end: every further run took it again."""
    recipe = load_recipe(RECIPES_DIR / "demo.yaml")
    spec = finetune(recipe, on_cluster=False, uncached=["train"]).pipeline_spec
    found = tasks(json_format.MessageToDict(spec))
    cached = {name: task.get("cachingOptions", {}) for name, task in found.items()}
    assert not cached["train"].get("enableCache", False)
    assert cached["prepare"]["enableCache"] is cached["merge"]["enableCache"] is True
    with pytest.raises(UserError, match="--no-cache names trian, but this run has no such step"):
        finetune(recipe, on_cluster=False, uncached=["trian"])


def test_the_cache_asks_what_stands_behind_the_names(demo: tuple[str, dict, dict]) -> None:
    found = tasks(demo[1])
    for name, looked_up in (("fetch", "look-up-model"), ("prepare", "look-up-data")):
        version = found[name]["inputs"]["parameters"]["fingerprint"]["taskOutputParameter"]
        assert version == {"outputParameterKey": "Output", "producerTask": looked_up}
        assert looked_up in found[name]["dependentTasks"]
        # Beside each other, and after nothing but the plan.
        assert found[looked_up]["dependentTasks"] == ["plan"]
    assert "dependentTasks" not in found["plan"]


def test_a_recipe_with_one_kind_of_export_compiles(tmp_path: Path) -> None:
    for kind, other in (("gguf", "gptq"), ("gptq", "gguf")):
        recipe = load_recipe(RECIPES_DIR / "demo.yaml", {f"quantize.{other}": []})
        path = tmp_path / f"{kind}.yaml"
        compiler.Compiler().compile(finetune(recipe), str(path))
        names = set(executors(next(yaml.safe_load_all(path.read_text()))))
        assert f"quantize-{kind}" in names
        assert f"quantize-{other}" not in names


def test_an_importance_matrix_is_measured_once_for_all_formats(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES_DIR / "demo.yaml", {"quantize.num_importance_rows": 64})
    path = tmp_path / "weighed.yaml"
    compiler.Compiler().compile(finetune(recipe), str(path))
    pipeline = next(yaml.safe_load_all(path.read_text()))
    found = tasks(pipeline)
    assert set(found["measure-importance"]["dependentTasks"]) == {"convert-gguf"}
    assert "importance" in found["quantize-gguf"]["inputs"]["artifacts"]
    # Both kinds of export have a loop of that name, so it is looked for in its own pipeline.
    loops = [
        task["inputs"]["artifacts"]
        for name, task in pipeline["components"]["comp-export-gguf"]["dag"]["tasks"].items()
        if name.startswith("for-loop")
    ]
    assert [loop["pipelinechannel--measure-importance-importance"] for loop in loops] == [
        {
            "taskOutputArtifact": {
                "outputArtifactKey": "importance",
                "producerTask": "measure-importance",
            }
        }
    ]


def test_accelerators_go_where_they_are_needed(tmp_path: Path) -> None:
    pipeline = compile_recipe("llama3-8b-instruct", tmp_path / "big.yaml")[0]
    for name, container in executors(pipeline).items():
        accelerator = container["resources"].get("accelerator")
        if STEPS[re.sub(r"-\d+$", "", name)].gpu:
            assert accelerator["resourceType"] == "nvidia.com/gpu"
        else:
            assert accelerator is None
