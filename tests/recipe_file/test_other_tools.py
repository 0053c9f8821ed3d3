"""Keys of other tools, and keys in the wrong place, are led to the keys of a recipe."""

import re
from pathlib import Path

import pytest

from tuneline.errors import RecipeError
from tuneline.recipe import Recipe, load_recipe
from tuneline.recipe_file.other_tools import FOREIGN_KEYS
from tuneline.schema.keys import keys_at, node_at

SCHEMA = Recipe.model_json_schema()

AXOLOTL = """\
base_model: NousResearch/Llama-3.2-1B
load_in_8bit: false
load_in_4bit: true
datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: alpaca
val_set_size: 0.1
output_dir: ./outputs
adapter: qlora
sequence_len: 2048
lora_r: 32
lora_alpha: 16
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_8bit
learning_rate: 0.0002
bf16: auto
flash_attention: true
"""
LLAMA_FACTORY = """\
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 2048
output_dir: saves/llama3-8b/lora/sft
per_device_train_batch_size: 1
num_train_epochs: 3.0
"""


def refusal(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    return str(caught.value).splitlines()


@pytest.mark.parametrize("name", FOREIGN_KEYS)
def test_every_key_leads_to_one_that_exists_or_says_why_there_is_none(name: str) -> None:
    foreign = FOREIGN_KEYS[name]
    assert foreign.tools and (foreign.keys or foreign.remark)
    for key in foreign.keys:
        path = tuple(int(p) if p.isdigit() else p for p in re.findall(r"[^.\[\]]+", key))
        assert path[-1] in keys_at(SCHEMA, path[:-1]), key
        assert node_at(SCHEMA, path)


@pytest.mark.parametrize(
    ("text", "tool", "lines"),
    [
        (
            AXOLOTL,
            "Axolotl",
            [
                "mine.yaml:3: load_in_4bit: unknown key here; set train.load_in_4bit",
                "mine.yaml:5: datasets[0].path: unknown key, which Axolotl has; set datasets[0].so",
                "mine.yaml:7: val_set_size: unknown key, which Axolotl has; set prepare.eval_share",
                "mine.yaml:10: sequence_len: unknown key, which Axolotl has; set prepare.max_seq_l",
                "mine.yaml:11: lora_r: unknown key, which Axolotl has; set train.lora.r",
                "mine.yaml:12: lora_alpha: unknown key here; set train.lora.lora_alpha",
                "mine.yaml:14: micro_batch_size: unknown key here; set train.micro_batch_size",
                "mine.yaml:18: bf16: unknown key, which Axolotl has; set train.dtype",
                "mine.yaml:19: flash_attention: unknown key, which Axolotl has; leave it out",
            ],
        ),
        (
            LLAMA_FACTORY,
            "LLaMA-Factory",
            [
                "mine.yaml:1: model_name_or_path: unknown key, which LLaMA-Factory has; set base_m",
                "mine.yaml:5: lora_rank: unknown key, which LLaMA-Factory has; set train.lora.r",
                "mine.yaml:8: template: unknown key here; set prepare.template",
                "mine.yaml:11: per_device_train_batch_size: unknown key, which LLaMA-Factory has;",
            ],
        ),
    ],
)
def test_a_whole_config_of_another_tool(
    tmp_path: Path, text: str, tool: str, lines: list[str]
) -> None:
    said = refusal(tmp_path, text)
    assert said[0].endswith(
        f"mine.yaml looks like a config of {tool}, which has other keys than a recipe:"
    )
    for line in lines:
        assert any(line in each for each in said), (line, said)
    # Every key has a line of its own, except base_model and datasets, which are a recipe's too.
    assert any(": publish_to: missing" in each for each in said)


MINIMAL = "name: mine\nbase_model: a/b\ndataset: c/d\npublish_to: e/f\n"


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("train: {r: 8}", "train.r: unknown key here; set train.lora.r"),
        ("max_length: 8", "max_length: unknown key, which TRL has; set prepare.max_seq_length"),
        ("max_seq_length: 8", "max_seq_length: unknown key here; set prepare.max_seq_length"),
        ("lora: {r: 8}", "lora: unknown key here; set train.lora"),
        ("seed: 1", "seed: unknown key here; set prepare.seed or train.seed or gate.seed"),
        ("train: {lora_target: all}", "which LLaMA-Factory has; set train.lora.target_modules"),
        ("train: {save-steps: 9}", "which transformers has; set train.checkpoint_minutes (in min"),
        ("train: {lerning_rate: 1}", "train.lerning_rate: unknown key; did you mean 'learning_ra"),
        ("prepare: {base_model: x}", "prepare.base_model: unknown key here; set base_model"),
    ],
)
def test_a_key_is_led_home(tmp_path: Path, key: str, says: str) -> None:
    (line,) = refusal(tmp_path, f"{MINIMAL}{key}\n")
    assert "mine.yaml:5: " in line and says in line


def test_every_error_has_a_line_and_no_type_of_pydantic(tmp_path: Path) -> None:
    said = refusal(
        tmp_path,
        "name: mine\nbase_model: a/b\ndataset: c/d\npublish_to: e/f\n"
        "train:\n  packing: yes\n  max_steps: 1e1\n  learning_rate: fast\n  dtype: bf16\n"
        "  lora:\n    target_modules: q_proj\n"
        "placement:\n  steps: {trian: {}}\nprepare:\nquantize:\n  max_mean_kl: {q4_k_m: x}\n",
    )
    assert [line.partition("mine.yaml")[2] for line in said] == [
        " has 8 errors:",
        ':6: train.packing is "yes", but must be true or false: write true',
        ":7: train.max_steps is 10.0, but must be a whole number at least 1 or null: write 10",
        ':8: train.learning_rate is "fast", but must be a number above 0 or auto',
        ':9: train.dtype is "bf16", but must be one of auto, bfloat16, float16, float32: did you '
        "mean bfloat16?",
        ':11: train.lora.target_modules is "q_proj", but must be a list of texts or one of auto, '
        "all-linear: write [q_proj]",
        ":13: placement.steps.trian: unknown key; did you mean 'train'?",
        ":14: prepare is empty, but must be a mapping of keys to values: give it keys, or remove "
        "the line",
        ':16: quantize.max_mean_kl.q4_k_m is "x", but must be a number above 0',
    ]
