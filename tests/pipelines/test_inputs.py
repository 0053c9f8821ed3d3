"""Files of this machine and claims: what is sent, mounted or refused, by every command."""

import base64
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import compiler

from tuneline.artifacts import write_jsonl
from tuneline.errors import DataError, RecipeError
from tuneline.pipelines.finetune import finetune
from tuneline.pipelines.inputs import claims_of, is_local, local_problems, prepare_upload
from tuneline.pipelines.lint.lint import lint_file
from tuneline.pipelines.plan.plan import plan
from tuneline.prepare import PrepareConfig
from tuneline.prepare.fingerprint import fingerprint
from tuneline.prepare.sources.files import SUFFIXES
from tuneline.prepare.sources.kinds import read_rows
from tuneline.prepare.uploads import MAX_CHARACTERS, locate, pack, unpack
from tuneline.recipe import Recipe
from tuneline.runtime.source_names import DATA_SUFFIXES


def recipe(**values: Any) -> Recipe:
    return Recipe.parse(
        {"name": "x", "base_model": "builtin:smollm2-135m", "publish_to": "org/x", **values}
    )


def rows(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"Question {number}?", "completion": str(number)} for number in range(count)]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", rows(500))
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "train.jsonl", rows(10))
    write_jsonl(tmp_path / "data" / "test.jsonl", rows(3))
    return tmp_path


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("rows.jsonl", True),
        ("./rows.jsonl", True),
        ("data", True),
        ("data/*.jsonl", True),
        ("absent.jsonl.gz", True),
        ("./absent", True),
        ("~/absent", True),
        ("org/rows", False),
        ("gsm8k", False),
        ("/in/the/image.jsonl", False),
        ("/cache/rows.jsonl", False),
        ("/claims/name/rows.jsonl", False),
        ("claim:name/rows.jsonl", False),
        ("s3://bucket/rows.jsonl", False),
        ("file:///opt/rows.jsonl", False),
        ("builtin:kubernetes-quantities", False),
        ("upload:rows.jsonl", False),
    ],
)
def test_what_is_a_path_of_this_machine(here: Path, source: str, expected: bool) -> None:
    assert is_local(source, cache_claim="cache") is expected


def test_an_absolute_path_is_local_if_it_exists_here(here: Path) -> None:
    assert is_local(f"{here}/rows.jsonl", cache_claim=None)
    assert not is_local(f"file://{here}/rows.jsonl", cache_claim=None)


def test_the_suffixes_are_those_that_prepare_reads() -> None:
    assert set(DATA_SUFFIXES) == set(SUFFIXES)


def test_small_files_are_sent_and_read_as_before(here: Path, tmp_path: Path) -> None:
    given = recipe(
        datasets=[
            {"source": "rows.jsonl"},
            {"source": "data", "weight": 2},
            {"source": "org/rows"},
        ],
        prepare={"heldout": {"source": "data/te*.jsonl"}},
    )
    upload = prepare_upload(given)
    assert upload.files == ["rows.jsonl", "data", "data/te*.jsonl"]
    sent = [entry.source for entry in upload.recipe.datasets]
    assert sent == ["upload:0-rows.jsonl", "upload:1-data", "org/rows"]
    assert upload.recipe.prepare.heldout.source == "upload:2-data/te*.jsonl"
    assert local_problems(upload.recipe) == []
    assert upload.archive is not None and len(upload.archive) < MAX_CHARACTERS
    target = tmp_path / "received"
    unpack(upload.archive, target)
    placed, config = locate(upload.recipe.datasets, upload.recipe.prepare, str(target))
    assert [row.values for row in read_rows(placed[0].source)] == rows(500)
    assert [row.values for row in read_rows(placed[1].source)] == rows(10)
    assert [row.values for row in read_rows(str(config.heldout.source))] == rows(3)
    with pytest.raises(DataError, match="was not sent with this run: submit the recipe with"):
        read_rows("upload:0-rows.jsonl")


def test_links_within_a_directory_are_sent_and_those_out_of_it_refused(
    here: Path, tmp_path: Path
) -> None:
    (here / "data" / "more").symlink_to(".shared")
    (here / "data" / ".shared").mkdir()
    write_jsonl(here / "data" / ".shared" / "train-2.jsonl", rows(7))
    upload = prepare_upload(recipe(dataset="data"))
    assert upload.archive is not None
    unpack(upload.archive, tmp_path / "received")
    names = sorted(path.name for path in (tmp_path / "received").rglob("*.jsonl"))
    assert names == ["test.jsonl", "train-2.jsonl", "train.jsonl"]
    (here / "data" / "key.jsonl").symlink_to(here / "rows.jsonl")
    for source in ("data", "data/*.jsonl"):
        with pytest.raises(
            DataError, match=r"data/key\.jsonl is a link that leads out of data, to"
        ):
            prepare_upload(recipe(dataset=source))


def test_an_archive_is_the_same_on_the_same_day(here: Path) -> None:
    first = pack({"a": here / "rows.jsonl"})
    os.utime(here / "rows.jsonl", (86_400, 86_400))
    second = pack({"a": here / "rows.jsonl"})
    os.utime(here / "rows.jsonl", (86_400 + 3600, 86_400 + 3600))
    assert pack({"a": here / "rows.jsonl"}) == second != first
    # Its files have the time of the day, by which a template's date is chosen.
    unpack(second, here / "out")
    assert (here / "out" / "a").stat().st_mtime == 86_400
    with pytest.raises(DataError, match="damaged"):
        unpack("no archive", here / "none")
    with pytest.raises(DataError, match="damaged"):
        unpack(base64.b64encode(b"PK").decode(), here / "none")
    for outside in ("../a", "/a", "b/../../a"):
        with pytest.raises(DataError, match=r"damaged .* is not a file below the archive"):
            unpack(pack({outside: here / "rows.jsonl"}), here / "none")


def test_the_fingerprint_is_of_the_content_that_was_sent(here: Path) -> None:
    def of() -> str:
        upload = prepare_upload(recipe(dataset="rows.jsonl"))
        assert upload.archive is not None
        target = here / f"received-{len(list(here.iterdir()))}"
        unpack(upload.archive, target)
        return fingerprint(PrepareConfig(), source=upload.recipe.data, uploads_dir=str(target))

    first = of()
    assert of() == first
    write_jsonl(here / "rows.jsonl", rows(501))
    assert of() != first


def test_files_that_are_too_large_or_absent_are_refused(here: Path) -> None:
    random.seed(1)
    noise = [{"prompt": str(random.random()), "completion": "x"} for _ in range(20_000)]
    write_jsonl(here / "large.jsonl", noise)
    with pytest.raises(DataError) as refused:
        prepare_upload(recipe(dataset="large.jsonl"))
    for words in ("large.jsonl", "too large", "claim:NAME/PATH", "s3://", "the Hub"):
        assert words in str(refused.value)
    with pytest.raises(DataError, match="there is no file or directory absent.jsonl"):
        prepare_upload(recipe(dataset="absent.jsonl"))


def test_plan_tells_what_is_sent_and_what_cannot_be_read(here: Path) -> None:
    def checks(**values: Any) -> list[tuple[str, str]]:
        values = {"placement": {"profile": "h100"}, **values}
        return [
            (check.verdict, check.words) for check in plan(recipe(**values)) if check.name == "data"
        ]

    assert checks(dataset="org/rows") == []
    assert checks(dataset="rows.jsonl", placement={}) == []
    assert checks(dataset="rows.jsonl") == [
        ("ok", "`tuneline submit` sends rows.jsonl with the run")
    ]
    ((verdict, words),) = checks(dataset="absent.jsonl")
    assert verdict == "fail" and "absent.jsonl" in words
    (here / "model").mkdir()
    ((verdict, words),) = checks(dataset="org/rows", base_model="./model")
    assert verdict == "fail" and words.startswith("base_model ./model is a path of this machine")


def compiled(loaded: Recipe, path: Path, archive: str | None = None) -> tuple[dict, dict]:
    compiler.Compiler().compile(finetune(loaded, archive=archive), str(path))
    pipeline, platform = yaml.safe_load_all(path.read_text())
    return pipeline, platform


def tasks_of(pipeline: dict) -> dict[str, Any]:
    """Return the tasks of the DAG that prepares the data."""
    dags = (part.get("dag", {}).get("tasks", {}) for part in pipeline["components"].values())
    (tasks,) = (tasks for tasks in dags if "prepare" in tasks)
    return tasks


def test_a_pipeline_with_files_has_a_task_that_writes_them(here: Path, tmp_path: Path) -> None:
    upload = prepare_upload(recipe(dataset="rows.jsonl"))
    path = tmp_path / "pipeline.yaml"
    pipeline, _ = compiled(upload.recipe, path, upload.archive)
    assert lint_file(path) == []
    tasks = tasks_of(pipeline)
    constant = tasks["receive-files"]["inputs"]["parameters"]["archive"]["runtimeValue"]["constant"]
    assert constant == upload.archive
    for name in ("prepare", "look-up-data"):
        source = tasks[name]["inputs"]["artifacts"]["uploads"]["taskOutputArtifact"]
        assert source == {"outputArtifactKey": "files", "producerTask": "receive-files"}
        assert "receive-files" in tasks[name]["dependentTasks"]
    without, _ = compiled(recipe(dataset="org/rows"), path)
    assert "receive-files" not in tasks_of(without)


def test_claims_are_mounted_where_they_are_read(tmp_path: Path) -> None:
    loaded = recipe(
        dataset="claim:datasets/a.jsonl",
        base_model="claim:models/llama",
        prepare={
            "heldout": {"source": "claim:held/x.jsonl"},
            "general": {"source": "claim:datasets/general"},
        },
    )
    assert claims_of(loaded, "prepare") == ["datasets", "held"]
    assert claims_of(loaded, "fetch") == ["models"] and claims_of(loaded, "train") == []
    assert claims_of(loaded, "publish") == []
    targets = ["org/x", "claim:served/team"]
    loaded = loaded.model_copy(update={"publish_to": targets})
    assert claims_of(loaded, "publish") == claims_of(loaded, "look-up-published") == ["served"]
    path = tmp_path / "pipeline.yaml"
    _, platform = compiled(loaded, path)
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    mounts = {
        name: [(mount["constant"], mount["mountPath"]) for mount in executor.get("pvcMount", [])]
        for name, executor in executors.items()
    }
    data = [("datasets", "/claims/datasets"), ("held", "/claims/held")]
    assert mounts["exec-prepare"] == mounts["exec-look-up-data"] == data
    assert mounts["exec-fetch"] == mounts["exec-look-up-model"] == [("models", "/claims/models")]
    assert mounts["exec-train"] == []
    assert lint_file(path) == []
    with pytest.raises(RecipeError, match="'claim:Wrong_Name/x' is not claim:NAME/PATH"):
        finetune(recipe(dataset="claim:Wrong_Name/x"))


def test_lint_names_local_files_and_claims_that_are_not_mounted(here: Path) -> None:
    path = here / "pipeline.yaml"
    compiled(recipe(dataset="rows.jsonl", prepare={"heldout": {"source": "data"}}), path)
    found = [(finding.rule, finding.value) for finding in lint_file(path)]
    assert found == [("local-file", "rows.jsonl"), ("local-file", "data")]
    compiled(recipe(dataset="org/rows"), path)
    path.write_text(path.read_text().replace("defaultValue: org/rows", "defaultValue: claim:a/b"))
    (finding,) = lint_file(path)
    assert (finding.rule, finding.value) == ("claim", "claim:a/b is not mounted")
    assert finding.path == "root.inputDefinitions.parameters.dataset"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "neither of dataset and datasets is given"),
        ({"dataset": "a", "datasets": [{"source": "b"}]}, "both of dataset and datasets is given"),
        (
            {"datasets": [{"source": "b"}], "prepare": {"subset": "main"}},
            "prepare.subset is given with several datasets: give subset to the dataset",
        ),
        ({"datasets": [{"source": "b", "weight": 0}]}, r"s\[0\].weight is .* a number above 0"),
    ],
)
def test_recipes_that_do_not_say_what_to_read(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(**values)


def test_several_datasets_are_one_parameter(tmp_path: Path) -> None:
    loaded = recipe(datasets=[{"source": "org/a"}, {"source": "org/b", "weight": 2}])
    assert loaded.data_names == "org/a and org/b (weight 2)"
    pipeline, _ = compiled(loaded, tmp_path / "pipeline.yaml")
    parameters = pipeline["root"]["inputDefinitions"]["parameters"]
    assert json.loads(parameters["dataset"]["defaultValue"]) == [
        {"source": "org/a"},
        {"source": "org/b", "weight": 2.0},
    ]
