"""Recipes: strict, with errors that name the nearest known key."""

from pathlib import Path

import jsonschema
import pytest
import yaml

from tuneline.errors import RecipeError
from tuneline.gpu_profiles import GPU_PROFILES
from tuneline.kernels.limits import FP8_CAPABILITY, MIN_CAPABILITY
from tuneline.pipelines.catalog import RECIPES_DIR
from tuneline.recipe import Recipe, load_recipe

MINIMAL = {"name": "mine", "base_model": "a/b", "dataset": "c/d", "publish_to": "e/f"}


def write(tmp_path: Path, **changes: object) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, **changes}))
    return path


def test_the_guides_values_are_the_defaults(tmp_path: Path) -> None:
    train = load_recipe(write(tmp_path)).train
    assert (train.lora.r, train.lora.lora_alpha, train.lora.lora_dropout) == (16, 16, 0.0)
    assert train.lora.target_modules == "auto"
    assert (train.learning_rate, train.lr_scheduler_type, train.warmup_steps) == (2e-4, "cosine", 5)
    assert (train.optim, train.max_grad_norm, train.weight_decay) == ("adamw_8bit", 0.3, 0.01)
    assert train.seed == 3407


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"trian": {}}, "trian: unknown key; did you mean 'train'?"),
        (
            {"train": {"lerning_rate": 1}},
            "train.lerning_rate: unknown key; did you mean 'learning_rate'?",
        ),
        ({"train": {"lora": {"rank": 8}}}, "train.lora.rank: unknown key"),
        (
            {"train": {"max_steps": "60"}},
            'is "60", but must be a whole number at least 1 or null: write 60, without quotes',
        ),
        (
            {"train": {"kernels": False}},
            "train.kernels is false, but must be one of auto, off, fp8: write off",
        ),
        (
            {"quantize": {"gguf": ["q3_k"]}},
            "quantize.gguf[0]: the export format 'q3_k' is unknown",
        ),
        ({"name": "Not A Name"}, 'name is "Not A Name", but must be text that matches'),
        (
            {"gate": {"target_tasks": ["arc_easy"]}},
            "mine.yaml: gate.target_tasks names ['arc_easy']",
        ),
        (
            {"publish_to": "my--model"},
            "publish_to: publish_to is 'my--model': write namespace/name",
        ),
        (
            {"base_model": "file:///cache/base"},
            "base_model: 'file:///cache/base' is an address, but only rows are read from file://",
        ),
        ({"base_model": "hf://a/b"}, "Write a Hub ID such as"),
        ({"gate": {"max_regression": 0.0}}, "no number of samples proves"),
        ({"prepare": {"heldout": {"max_rows": 0}}}, "evaluate.tasks needs held-out rows"),
    ],
)
def test_a_bad_recipe_says_what_is_wrong(tmp_path: Path, changes: dict, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, **changes))
    assert says in str(caught.value)
    assert "mine.yaml" in str(caught.value)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\n")
    with pytest.raises(RecipeError, match="base_model: missing"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a: [1", "mine.yaml:1: not YAML: the list that begins here with \\[ does not end"),
        (b"- 1", "contains a list, but a recipe is a mapping"),
        (b"\xff\xfe\x00", "not UTF-16"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=says):
        load_recipe(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no recipe at"):
        load_recipe(tmp_path / "none.yaml")


def test_overrides_reach_nested_keys_and_are_checked(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert load_recipe(path, {"train.lora.r": 8}).train.lora.r == 8
    with pytest.raises(RecipeError, match="did you mean 'max_steps'"):
        load_recipe(path, {"train.max_step": 60})
    with pytest.raises(RecipeError, match="'name' is a value"):
        load_recipe(path, {"name.x": 1})


def test_ranks_get_a_gpu_each(tmp_path: Path) -> None:
    path = write(tmp_path)
    values = {"train.num_ranks": 4, "placement.profile": "a100-80g"}
    with pytest.raises(RecipeError, match="num_ranks is 4 but placement.num_accelerators is 1"):
        load_recipe(path, values)
    assert load_recipe(path, {**values, "placement.num_accelerators": 4}).train.num_ranks == 4


def test_eight_bit_products_need_a_profile_that_has_them(tmp_path: Path) -> None:
    path = write(tmp_path)
    for profile, gpu in GPU_PROFILES.items():
        values = {"train.kernels": "fp8", "placement.profile": profile}
        capability = gpu.capability or (0, 0)
        assert gpu.runs_kernels == (capability >= MIN_CAPABILITY)
        if capability >= FP8_CAPABILITY:
            assert load_recipe(path, values).train.kernels == "fp8"
            continue
        found = ".".join(map(str, capability)) if gpu.capability else "none, being AMD's"
        with pytest.raises(RecipeError) as refused:
            load_recipe(path, values)
        assert (
            "train.kernels is fp8, which needs compute capability 9.0 (Hopper), but the GPU of "
            f"placement.profile {profile} has {found}: set kernels to auto, or the profile to "
            "h100 or h200 or b200"
        ) in str(refused.value)
    # What the machine has that a local run is on only the run knows.
    assert load_recipe(path, {"train.kernels": "fp8"}).train.kernels == "fp8"


def test_every_shipped_recipe_fits_the_schema() -> None:
    schema = Recipe.model_json_schema()
    paths = sorted(RECIPES_DIR.glob("*.yaml"))
    assert {path.stem for path in paths} >= {
        *("demo", "llama3-8b-instruct", "qwen2.5-7b-korean", "mistral-7b-dpo", "domain-cpt")
    }
    for path in paths:
        assert load_recipe(path).name == path.stem
        jsonschema.validate(yaml.safe_load(path.read_text()), schema)


def test_a_recipe_survives_its_own_json(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path))
    assert Recipe.parse(recipe.model_dump_json()) == recipe
