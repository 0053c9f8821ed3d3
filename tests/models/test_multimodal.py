"""The table of multimodal families is that of transformers."""

import pytest
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tuneline.errors import ModelError
from tuneline.models.multimodal import LOADED_PARTS, loaded_part, text_config


@pytest.mark.parametrize("kind", LOADED_PARTS)
def test_the_part_is_the_one_that_transformers_loads(kind: str) -> None:
    model = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])
    config = CONFIG_MAPPING[kind]
    assert "text_config" in config.sub_configs
    loads_all = model.config_class is config
    assert LOADED_PARTS[kind] == ("whole" if loads_all else "text")


def test_a_family_without_a_causal_language_model_is_refused() -> None:
    config = {"model_type": "llava", "text_config": {"model_type": "llama"}}
    with pytest.raises(ModelError, match=r"X/Y is a multimodal model of a family \(llava\) that"):
        loaded_part(config, source="X/Y")
    assert "llava" not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    assert text_config(config) == {"model_type": "llama"}
    assert loaded_part({"model_type": "llama"}, source="X/Y") is None
