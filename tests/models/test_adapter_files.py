"""An adapter of this peft has no key that an older peft refuses."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest

from tuneline.errors import ModelError
from tuneline.models.adapter_files import check_tensors, make_portable

# The arguments of LoraConfig in peft 0.13.2.
OLD = set(
    """
    r target_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora modules_to_save
    init_lora_weights layers_to_transform layers_pattern rank_pattern alpha_pattern megatron_config
    megatron_core loftq_config use_dora layer_replication task_type inference_mode
    base_model_name_or_path revision auto_mapping peft_type
    """.split()
)


def written(directory: Path, **settings: Any) -> dict[str, Any]:
    config = peft.LoraConfig(r=4, target_modules={"v_proj", "q_proj", "a_proj"}, **settings)
    config.save_pretrained(str(directory))
    make_portable(directory, peft.LoraConfig().to_dict())
    return json.loads((directory / "adapter_config.json").read_text())


def test_a_plain_adapter_needs_only_old_keys(tmp_path: Path) -> None:
    ours = written(tmp_path, use_rslora=True)
    assert set(ours) <= OLD
    assert ours["target_modules"] == ["a_proj", "q_proj", "v_proj"]
    read = peft.LoraConfig.from_pretrained(str(tmp_path))
    assert (read.r, read.use_rslora, read.peft_type) == (4, True, "LORA")
    expected = peft.LoraConfig(r=4, target_modules={"v_proj", "q_proj", "a_proj"}, use_rslora=True)
    different = {
        name
        for name, value in expected.to_dict().items()
        if read.to_dict()[name] != value and name not in ("inference_mode", "peft_version")
    }
    assert not different


def test_a_new_setting_stays(tmp_path: Path) -> None:
    assert written(tmp_path, lora_bias=True, bias="none")["lora_bias"] is True


def test_tensors_that_are_only_in_one_of_two_adapters() -> None:
    check_tensors(["a", "b"], ("b", "a"), called="mine")
    for stored, own in ((["a"], ["a", "c"]), (["a", "c"], ["a"])):
        with pytest.raises(ModelError, match=r"mine has other tensors .*\(1 are .* first c\)"):
            check_tensors(stored, own, called="mine")
