"""Both generations of transformers read the same rotary embeddings from a written config.json."""

import copy
from typing import Any

import pytest
from transformers import AutoConfig

from tuneline.models.rope import with_old_names

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}


def read(settings: dict[str, Any]) -> Any:
    config = AutoConfig.for_model(**copy.deepcopy(settings))
    return config.get_text_config().rope_parameters


def test_scaling_and_base_stand_where_4_reads_them() -> None:
    settings = {"model_type": "llama", "rope_parameters": {**LLAMA3, "rope_theta": 5e5}}
    named = with_old_names(settings)
    assert named["rope_scaling"] == LLAMA3
    assert named["rope_theta"] == 5e5
    assert named["rope_parameters"] == settings["rope_parameters"]
    assert read(named) == read(settings)
    assert with_old_names(named) == named


def test_a_share_of_the_head_that_rotates() -> None:
    parameters = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    named = with_old_names({"model_type": "stablelm", "rope_parameters": parameters})
    assert named["partial_rotary_factor"] == 0.5
    assert "rope_scaling" not in named


@pytest.mark.parametrize("is_inner", [False, True])
def test_parameters_per_type_of_layer(is_inner: bool) -> None:
    text = {
        "model_type": "gemma3_text",
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    }
    settings = {"model_type": "gemma3", "text_config": text} if is_inner else text
    named = with_old_names(settings)
    part = named["text_config"] if is_inner else named
    assert part["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert (part["rope_theta"], part["rope_local_base_freq"]) == (1e6, 1e4)
    assert read(named) == read(settings)


def test_phi_3_has_its_own_keys() -> None:
    factors = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    parameters = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    parameters["original_max_position_embeddings"] = 4096
    named = with_old_names({"model_type": "phi3", "rope_parameters": parameters})
    assert named["rope_scaling"] == {"type": "longrope", **factors}
    assert named["original_max_position_embeddings"] == 4096


def test_names_that_would_change_what_5_reads_are_left_out() -> None:
    settings = {
        "model_type": "olmo3",
        "num_hidden_layers": 4,
        "rope_parameters": {
            "full_attention": {**LLAMA3, "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
        },
    }
    assert read(with_old_names(settings)) == read(settings)


def test_a_config_of_transformers_4_is_left_alone() -> None:
    settings = {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": LLAMA3}
    assert with_old_names(settings) == settings
