"""Embeddings and head that are trained in full, beside the adapter."""

import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from small_records import record_again

from tuneline.errors import ModelError, RecipeError
from tuneline.models.nf4 import load_base
from tuneline.train import TrainConfig
from tuneline.train.config import LoraConfig
from tuneline.train.memory.shape import model_shape
from tuneline.train.model.targets import check_targets, lora_config
from tuneline.train.run import run
from tuneline.train.trainer.rates import set_rate

NAMES = ("embed_tokens", "lm_head")
SETTINGS = {
    "lora": {"modules_to_save": NAMES},
    "learning_rate": 1e-3,
    "dtype": "float32",
    "max_steps": 4,
    "warmup_steps": 0,
    "global_batch_size": 2,
    "lr_scheduler_type": "constant",
    "early_stopping_patience": None,
}


@pytest.fixture(scope="module")
def untied_dir(tiny_model_dir, tmp_path_factory):
    """The tiny model, its head a matrix of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("untied") / "model"
    shutil.copytree(tiny_model_dir, path, ignore=shutil.ignore_patterns("*.safetensors"))
    config = LlamaConfig.from_pretrained(tiny_model_dir, tie_word_embeddings=False)
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(path)
    record_again(path)
    return path


def train(where, base_dir, dataset, **settings):
    summary = run(
        TrainConfig.parse({**SETTINGS, **settings}),
        base_model_dir=base_dir,
        dataset_dir=dataset,
        adapter_dir=where / "adapter",
        curves_path=where / "curves.html",
    )
    weights = load_file(where / "adapter" / "adapter_model.safetensors")
    before = load_file(base_dir / "model.safetensors")
    ends = {"embed_tokens": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}
    moved = {
        name: float((weights[f"base_model.model.{tensor}"] - before[tensor]).abs().max())
        for name, tensor in ends.items()
    }
    return summary, moved


def test_they_are_saved_with_the_adapter_and_load_in_plain_peft(
    tmp_path, untied_dir, dataset_dir, answer_rows
):
    summary, moved = train(tmp_path, untied_dir, dataset_dir(answer_rows))
    assert min(moved.values()) > 5e-4
    assert summary.final_eval_loss < summary.first_eval_loss - 0.1
    lora = LoraConfig(modules_to_save=NAMES)
    assert summary.num_trainable_parameters == model_shape(untied_dir, lora).num_adapter
    base = load_base(untied_dir, dtype=torch.float32, device="cpu", quantized=True)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    total, count = 0.0, 0
    for row in answer_rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        counts = torch.tensor(row["loss_mask"][1:], dtype=torch.bool)
        total -= float(log_probs.gather(1, ids[0, 1:, None])[counts].sum())
        count += int(counts.sum())
    assert total / count == pytest.approx(summary.final_eval_loss, abs=2e-5)


@pytest.mark.slow
def test_a_rate_of_their_own(tmp_path, untied_dir, dataset_dir, answer_rows):
    dataset = dataset_dir(answer_rows)
    _, fast = train(tmp_path / "fast", untied_dir, dataset)
    _, slow = train(tmp_path / "slow", untied_dir, dataset, embedding_learning_rate=1e-5)
    # Adam's first steps are about as long as the rate.
    for name in NAMES:
        assert slow[name] == pytest.approx(fast[name] / 100, rel=0.3), name


def test_a_schedule_scales_both_rates():
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    optimizer = torch.optim.AdamW([{"params": weights[:2]}, {"params": weights[2:]}], lr=1e-3)
    set_rate(optimizer, weights[1:], 1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    rates = {
        id(parameter): group["lr"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert [rates[id(weight)] for weight in weights] == pytest.approx([5e-4, 5e-5, 5e-5])
    assert len(schedule.base_lrs) == len(optimizer.param_groups)


def test_hidden_states_stay_in_the_compute_type(untied_dir, dataset_dir, answer_rows, tmp_path):
    from peft import get_peft_model

    from tuneline.train.model.adapter import keep_adapter_in_fp32, keep_hidden_states_in

    base = load_base(untied_dir, dtype=torch.bfloat16, device="cpu", quantized=False)
    model = get_peft_model(base, lora_config(LoraConfig(modules_to_save=NAMES), base))
    keep_adapter_in_fp32(model)
    embedding = model.get_input_embeddings()
    ids = torch.tensor([[1, 2, 3]])
    assert embedding(ids).dtype == torch.float32
    keep_hidden_states_in(model, torch.bfloat16)
    assert embedding(ids).dtype == torch.bfloat16


def test_names_that_cannot_be_trained_so(tiny_model_dir, untied_dir):
    check_targets(LoraConfig(modules_to_save=NAMES), untied_dir)
    wrong = LoraConfig(modules_to_save=("embed_token",))
    with pytest.raises(ModelError, match=r"modules_to_save names 'embed_token'.*mean embed_tokens"):
        check_targets(wrong, untied_dir)
    with pytest.raises(ModelError, match="are one matrix here"):
        check_targets(LoraConfig(modules_to_save=("lm_head",)), tiny_model_dir)
    with pytest.raises(ModelError, match="or train it in full as one of lora.modules_to_save"):
        check_targets(LoraConfig(target_modules=("lm_head",)), untied_dir)
    with pytest.raises(
        RecipeError, match="embedding_learning_rate is the rate of lora.modules_to_save"
    ):
        TrainConfig.parse({"embedding_learning_rate": 1e-5})
