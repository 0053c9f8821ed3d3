"""The batch size: by its own two names, and by transformers' two, which count per rank."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file
from train_setups import cpu_setup
from transformers import AutoTokenizer

from tuneline.artifacts import DatasetManifest, ModelOrigin
from tuneline.errors import RecipeError
from tuneline.recipe import Recipe
from tuneline.train import TrainConfig
from tuneline.train.batch_size import batch_size, largest_micro_batch
from tuneline.train.run import _identity, decide, run
from tuneline.train.setup import Inputs

SETTINGS = {"dtype": "float32", "learning_rate": 5e-3, "max_steps": 3, "sample_tokens": 0}
OURS = {"global_batch_size": 4, "micro_batch_size": 1}
UPSTREAM = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}


def sizes(settings, num_ranks=1):
    size = batch_size(TrainConfig.parse(settings), num_ranks)
    return size.global_batch_size, size.micro_batch_size


def test_the_default_is_four_micro_batches_of_two():
    assert sizes({}) == (8, 2)
    plan = cpu_setup(TrainConfig()).plan
    assert (plan.global_batch_size, plan.micro_batch_size) == (8, 2)
    assert plan.accumulation_steps(1) == 4


@pytest.mark.parametrize(
    ("settings", "num_ranks", "expected"),
    [
        (UPSTREAM, 1, (4, 1)),
        (UPSTREAM, 2, (8, 1)),
        ({"per_device_train_batch_size": 3}, 2, (24, 3)),
        ({"gradient_accumulation_steps": 5}, 2, (20, 2)),
        (OURS, 1, (4, 1)),
        (OURS, 2, (4, 1)),
        ({"micro_batch_size": "auto"}, 2, (8, 4)),
        ({"micro_batch_size": 6}, 4, (8, 2)),  # a rank has no more than 2
    ],
)
def test_upstreams_names_count_per_rank_and_ours_over_all(settings, num_ranks, expected):
    assert sizes(settings, num_ranks) == expected


def test_a_micro_batch_divides_what_a_rank_has():
    assert largest_micro_batch(12, 4, 2) == 3
    with pytest.raises(
        RecipeError,
        match=r"global_batch_size is 6, which 4 ranks cannot divide equally: set "
        r"train.global_batch_size to a multiple of 4, such as 4 or 8, or set train.num_ranks to 2$",
    ):
        largest_micro_batch(6, 2, 4)
    with pytest.raises(RecipeError, match="a multiple of 4, such as 4, or set train.num_ranks to "):
        largest_micro_batch(3, 2, 4)


@pytest.mark.parametrize("ours", OURS)
@pytest.mark.parametrize("upstream", UPSTREAM)
def test_both_spellings_together_are_refused(ours, upstream):
    with pytest.raises(RecipeError, match=f"{ours} and transformers' {upstream} both set .*remove"):
        TrainConfig.parse({ours: 2, upstream: 2})


def test_auto_needs_the_estimate():
    with pytest.raises(RecipeError, match="micro_batch_size auto uses the estimate that fit: off"):
        TrainConfig.parse({"micro_batch_size": "auto", "fit": "off"})


@pytest.mark.parametrize("settings", [{}, OURS, UPSTREAM, {"gradient_accumulation_steps": 2}])
def test_a_saved_recipe_means_the_same_later(settings):
    values = {"name": "a", "base_model": "m", "dataset": "d", "publish_to": "dir:p"}
    recipe = Recipe.parse({**values, "train": settings})
    saved = recipe.model_dump_json()
    assert Recipe.parse(saved) == recipe
    names = set(json.loads(saved)["train"])
    # Only the spelling in use, with its defaults.
    assert bool(names & set(OURS)) != bool(names & set(UPSTREAM))
    for num_ranks in (1, 2):
        again = Recipe.parse(saved).train
        assert batch_size(again, num_ranks) == batch_size(recipe.train, num_ranks)


def test_the_schema_marks_upstreams_names_as_deprecated():
    properties = TrainConfig.model_json_schema()["properties"]
    assert {name for name in properties if properties[name].get("deprecated")} == set(UPSTREAM)
    assert properties["global_batch_size"]["default"] == 8


def test_a_recipe_for_nodes_is_checked_by_the_ranks_of_its_placement():
    values = {"name": "a", "base_model": "m", "dataset": "d", "publish_to": "dir:p"}
    placement = {"num_nodes": 2, "num_accelerators": 3, "shared_claim": "c", "profile": "h100"}
    with pytest.raises(RecipeError, match=r"is 8, .* 6 ranks \(2 nodes x 3 GPUs\): .* 6 or 12"):
        Recipe.parse({**values, "placement": placement})
    per_rank = Recipe.parse({**values, "placement": placement, "train": UPSTREAM})
    assert per_rank.num_ranks == 6
    assert batch_size(per_rank.train, per_rank.num_ranks).global_batch_size == 24


@pytest.fixture
def inputs(tiny_model_dir, dataset_dir, answer_rows) -> Inputs:
    data = dataset_dir(answer_rows)
    return Inputs(
        base_model_dir=tiny_model_dir,
        dataset_dir=data,
        origin=ModelOrigin.read(tiny_model_dir),
        manifest=DatasetManifest.read(data),
        tokenizer=AutoTokenizer.from_pretrained(str(tiny_model_dir)),
    )


def test_the_setup_resolves_upstreams_names_by_its_ranks_and_warns(inputs, caplog):
    setup = decide(TrainConfig.parse({**UPSTREAM, "num_ranks": 2}), inputs)
    assert setup.plan.global_batch_size == 8 and setup.accumulation_steps == 4
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.getMessage().endswith(
        "4 x 2 ranks are deprecated names for a global batch of 8 examples: write "
        "train.global_batch_size: 8 and train.micro_batch_size: 1 instead"
    )
    caplog.clear()
    decide(TrainConfig.parse({**OURS, "num_ranks": 2}), inputs)
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]


def test_auto_takes_all_that_a_rank_has_if_it_fits(inputs, monkeypatch):
    config = TrainConfig.parse({"micro_batch_size": "auto", "num_ranks": 2})
    setup = decide(config, inputs)
    assert (setup.plan.micro_batch_size, setup.changes) == (4, "")
    monkeypatch.setattr("tuneline.train.within_memory.model_shape", lambda *_: None)
    setup = decide(config, inputs)
    assert (setup.plan.micro_batch_size, setup.changes) == (1, "")


def test_the_identity_of_a_run_is_its_global_batch_on_any_number_of_ranks(inputs):
    def identity(num_ranks, **settings):
        config = TrainConfig.parse({**settings, "num_ranks": num_ranks})
        return _identity(config, cpu_setup(config, num_ranks=num_ranks), inputs)

    assert identity(1, **OURS) == identity(2, **OURS) == identity(4, **OURS)
    assert identity(1, **OURS) == identity(1, **UPSTREAM)
    # On two ranks these are the examples of another training.
    assert identity(2, **UPSTREAM) != identity(1, **UPSTREAM)
    assert identity(2, **UPSTREAM) == identity(2, global_batch_size=8, micro_batch_size=1)


def test_training_is_the_same_by_either_spelling(tmp_path, inputs):
    def train(name, settings):
        where = tmp_path / name
        run(
            TrainConfig.parse({**SETTINGS, **settings}),
            base_model_dir=inputs.base_model_dir,
            dataset_dir=inputs.dataset_dir,
            adapter_dir=where / "adapter",
            curves_path=where / "curves.html",
        )
        return load_file(where / "adapter" / "adapter_model.safetensors")

    ours, theirs = train("ours", OURS), train("upstream", UPSTREAM)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)
