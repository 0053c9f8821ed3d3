"""Paths of a recipe are relative to its file, and absolute when they are used."""

from pathlib import Path

import pytest

from tuneline.errors import RecipeError
from tuneline.pipelines.catalog import find_recipe

RECIPE = """\
name: mine
base_model: {model}
dataset: {dataset}
publish_to: {target}
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a recipe's files, which is not the working directory."""
    place = tmp_path / "home"
    (place / "data").mkdir(parents=True)
    (place / "model").mkdir()
    (place / "data" / "rows.csv").write_text("prompt,completion\na,b\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return place


def write(home: Path, dataset: str = "a/b", model: str = "a/b", target: str = "c/d") -> str:
    path = home / "mine.yaml"
    path.write_text(RECIPE.format(dataset=dataset, model=model, target=target))
    return str(path)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("data/rows.csv", "{home}/data/rows.csv"),
        ("./data/rows.csv", "{home}/data/rows.csv"),
        ("../home/data/rows.csv", "{home}/data/rows.csv"),
        ("data", "{home}/data"),
        ("data/*.csv", "{home}/data/*.csv"),
        ("org/rows", "org/rows"),
        ("gsm8k", "gsm8k"),
        ("/in/the/image.csv", "/in/the/image.csv"),
        ("s3://bucket/rows.csv", "s3://bucket/rows.csv"),
        ("claim:team/rows.csv", "claim:team/rows.csv"),
        ("builtin:kubernetes-quantities", "builtin:kubernetes-quantities"),
    ],
)
def test_a_source_is_relative_to_the_recipe(home: Path, given: str, expected: str) -> None:
    recipe = find_recipe(write(home, dataset=f'"{given}"'), [])
    assert recipe.dataset == expected.format(home=home)


def test_so_are_the_model_the_tasks_and_every_other_source(home: Path) -> None:
    path = home / "mine.yaml"
    path.write_text(
        "name: mine\nbase_model: ./model\ndatasets: [{source: data/rows.csv}, {source: a/b}]\n"
        "publish_to: dir:out\nfetch: {trust_remote_code: ./model}\n"
        "prepare:\n  heldout: {source: data/rows.csv}\n  general: {source: data/rows.csv}\n"
        "evaluate: {task_dir: data}\n"
    )
    recipe = find_recipe(str(path), [], is_local=True)
    rows = f"{home}/data/rows.csv"
    assert recipe.base_model == recipe.fetch.trust_remote_code == f"{home}/model"
    assert [entry.source for entry in recipe.datasets] == [rows, "a/b"]
    assert recipe.prepare.heldout.source == rows
    assert recipe.prepare.general is not None and recipe.prepare.general.source == rows
    assert recipe.evaluate.task_dir == f"{home}/data"
    assert recipe.publish_to == f"dir:{home}/out"
    # In a pod, the directories of this machine mean nothing.
    assert find_recipe(str(path), []).publish_to == "dir:out"
    several = find_recipe(str(path), ["publish_to=[org/x, dir:out, claim:c/out]"], is_local=True)
    assert several.publish_to == ["org/x", f"dir:{Path.cwd()}/out", "claim:c/out"]


def test_an_option_is_relative_to_the_working_directory(home: Path) -> None:
    Path("own.csv").write_text("prompt,completion\na,b\n")
    recipe = find_recipe(
        write(home, dataset="data/rows.csv", target="dir:out"),
        ["dataset=own.csv", "publish_to=dir:there"],
        is_local=True,
    )
    assert recipe.dataset == f"{Path.cwd()}/own.csv"
    assert recipe.publish_to == f"dir:{Path.cwd()}/there"


def test_a_shipped_recipe_is_relative_to_the_working_directory(home: Path) -> None:
    assert find_recipe("demo", [], is_local=True).publish_to == f"dir:{Path.cwd()}/published"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("data/absent.csv", "there is no file or directory {home}/data/absent.csv: paths are rel"),
        ("./absent", "there is no file or directory {home}/absent: paths are relative to {home}"),
        ("data/*.jsonl", "no file matches {home}/data/*.jsonl"),
        ("~/absent.csv", "there is no file or directory"),
    ],
)
def test_a_file_that_is_not_there_is_named_with_its_line(home: Path, given: str, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        find_recipe(write(home, dataset=f'"{given}"'), [])
    assert f"mine.yaml:3: dataset is {given}, but {says.format(home=home)}" in str(caught.value)


@pytest.mark.parametrize("name", ["rows.csv", "org/rows"])
def test_a_file_of_the_working_directory_is_not_taken_without_a_word(home: Path, name: str) -> None:
    place = Path(name)
    place.parent.mkdir(exist_ok=True)
    place.write_text("prompt,completion\na,b\n")
    with pytest.raises(RecipeError, match="is another one; write that path in full"):
        find_recipe(write(home, dataset=name), [])
