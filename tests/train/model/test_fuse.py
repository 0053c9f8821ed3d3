"""A trainer with our kernels learns what it learns without them; on a CPU, by their references."""

import math
from pathlib import Path

import pytest
import torch
from train_setups import cpu_setup
from transformers import AutoTokenizer

from tuneline.artifacts import DatasetManifest
from tuneline.errors import RecipeError
from tuneline.kernels import FlatAdamW, unpatch
from tuneline.kernels.ops.host_tables import HostHead
from tuneline.models.nf4 import load_base
from tuneline.train import TrainConfig
from tuneline.train.model.adapter import keep_adapter_in_fp32
from tuneline.train.model.fuse import (
    can_fuse,
    fuse_model,
    fuse_trainer,
    give_trl_the_copied_head,
)
from tuneline.train.model.targets import lora_config
from tuneline.train.rows.load import load_rows
from tuneline.train.trainer.arguments import training_arguments
from tuneline.train.trainer.judged import JudgedTrainer
from tuneline.train.trainer.trainers import PreferenceTrainer, SupervisedTrainer

ROWS = [
    {"input_ids": [5 + (start * 7 + n * n) % 90 for n in range(size)], "loss_mask": mask}
    for start, size in enumerate([9, 17, 30, 12, 25, 40])
    for mask in [[int(n >= 4) for n in range(size)]]
]


def make_trainer(
    config,
    base_dir,
    data,
    work,
    *,
    kind=SupervisedTrainer,
    method="sft",
    fused=True,
    cached=False,
    device="cpu",
):
    rows, held = load_rows(
        data, DatasetManifest.read(data), packing=config.packing, cache_dir=work / "cache"
    )
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = load_base(base_dir, dtype=dtype, device=device, quantized=True)
    if fused:
        fuse_model(model)
    torch.manual_seed(3)
    trainer = kind(
        model=model,
        args=training_arguments(
            config,
            cpu_setup(config, learning_rate=1e-2, device=device, dtype=dtype),
            method=method,
            num_steps=config.max_steps,
            evaluates=True,
            packing=config.packing,
            work_dir=work,
            cache_reference=cached,
        ),
        train_dataset=rows,
        eval_dataset=held,
        processing_class=AutoTokenizer.from_pretrained(str(base_dir)),
        peft_config=lora_config(config.lora, model),
    )
    keep_adapter_in_fp32(trainer.model)
    return trainer


def train(base_dir: Path, data: Path, work: Path, *, fused: bool, packing: bool) -> tuple:
    config = TrainConfig(
        packing=packing,
        max_steps=4,
        warmup_steps=0,
        global_batch_size=2,
        micro_batch_size=1,
        optim="adamw_torch",
        learning_rate=1e-2,
    )
    trainer = make_trainer(config, base_dir, data, work, fused=fused)
    if fused:
        assert fuse_trainer(trainer) == "llama: 2 layers fused; loss: fused"
        assert isinstance(trainer.optimizer, FlatAdamW)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora" in n}
    after = trainer.evaluate()["eval_loss"]
    unpatch(trainer.model)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(after, rel=1e-6)
    return [before, *losses, after], weights


PREFERENCES = [
    {"prompt_ids": [100 + n, 101, 102], "chosen_ids": [200, 210 + n], "rejected_ids": [201]}
    for n in range(4)
]
JUDGED = [
    {"prompt_ids": [100 + n, 101, 102], "completion_ids": [200, 210 + n], "label": n % 2 == 0}
    for n in range(4)
]


@pytest.mark.parametrize(
    ("method", "kind", "rows", "cached"),
    [
        pytest.param("dpo", PreferenceTrainer, PREFERENCES, False, marks=pytest.mark.slow),
        pytest.param("dpo", PreferenceTrainer, PREFERENCES, True, marks=pytest.mark.slow),
        ("kto", JudgedTrainer, JUDGED, False),
    ],
)
def test_policy_and_reference_agree_bit_for_bit_before_the_first_step(
    dataset_dir, tiny_model_dir, tmp_path, method, kind, rows, cached
):
    config = TrainConfig(
        packing=False,
        max_steps=1,
        warmup_steps=0,
        global_batch_size=4,
        micro_batch_size=4,
        optim="adamw_torch",
        learning_rate=1e-2,
    )
    data = dataset_dir(rows, method=method)
    trainer = make_trainer(
        config, tiny_model_dir, data, tmp_path, kind=kind, method=method, cached=cached
    )
    fuse_trainer(trainer)
    # The stock layers of an evaluation agree with themselves too.
    assert trainer.evaluate()["eval_rewards/chosen"] == 0.0
    trainer.train()
    (first,) = [entry for entry in trainer.state.log_history if "rewards/chosen" in entry]
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0.0
    assert first["loss"] == pytest.approx(0.5 if method == "kto" else math.log(2), abs=1e-4)
    assert trainer.evaluate()["eval_rewards/chosen"] != 0.0


def test_trls_loss_reads_the_copy_of_a_head_in_host_memory(dataset_dir, tiny_model_dir, tmp_path):
    config = TrainConfig(max_steps=1, learning_rate=1e-2)
    trainer = make_trainer(config, tiny_model_dir, dataset_dir(ROWS), tmp_path)
    causal = trainer.model.get_base_model().train()
    head = causal.lm_head
    ids = torch.arange(5, 45)[None]
    adapter = [p for n, p in causal.named_parameters() if "lora_B" in n]
    copies = []

    class OnAnotherDevice(HostHead):
        """A head whose copy is another tensor, as on a GPU, and which counts the copies."""

        table = head.weight.detach()

        def begin(self):
            if self._tuneline_is_expected and self._tuneline_copy is None:
                self._tuneline_copy = self.table.clone(), None
                copies.append(self._tuneline_copy[0].shape)

    def log_probs():
        return causal(input_ids=ids, labels=ids, fused_lm_head=True).log_probs

    def score():
        found = log_probs()
        with torch.no_grad():
            reference = log_probs()
        return found.detach(), reference, torch.autograd.grad(found.sum(), adapter)

    want = score()
    head.__class__, head._tuneline_device = OnAnotherDevice, torch.device("cpu")
    give_trl_the_copied_head(causal)
    for num_copies in (1, 2):
        # The reference reads the copy that waits for the policy's backward pass.
        torch.testing.assert_close(score(), want, rtol=0, atol=0)
        assert len(copies) == num_copies
        assert head._tuneline_copy is None and causal.get_output_embeddings() is head
    # The copy is what is read.
    OnAnotherDevice.table = head.weight.detach().flip(0)
    with torch.no_grad():
        hidden = causal.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        expected = torch.log_softmax(hidden @ OnAnotherDevice.table.T, dim=-1)
    expected = expected.gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(score()[0], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError):
        causal(input_ids=ids, labels=None, fused_lm_head=True)
    assert causal.get_output_embeddings() is head
    unpatch(causal)
    torch.testing.assert_close(score()[0], want[0], rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("method", "kind", "rows"),
    [
        ("sft", SupervisedTrainer, ROWS),
        ("dpo", PreferenceTrainer, PREFERENCES),
        ("kto", JudgedTrainer, JUDGED),
    ],
)
def test_tables_in_host_memory_change_no_loss(
    dataset_dir, tiny_model_dir, tmp_path, method, kind, rows
):
    config = TrainConfig(
        packing=method == "sft",
        max_steps=3,
        warmup_steps=0,
        global_batch_size=4,
        micro_batch_size=2,
        learning_rate=1e-2,
    )
    data = dataset_dir(rows, method=method)
    runs = []
    for on_host in (False, True):
        work = tmp_path / str(on_host)
        trainer = make_trainer(
            config, tiny_model_dir, data, work, kind=kind, method=method, device="cuda"
        )
        assert fuse_trainer(trainer, tables_on_host=on_host).startswith("llama: 2 layers fused")
        causal = trainer.model.get_base_model()
        losses = [trainer.evaluate()["eval_loss"]]
        trainer.train()
        losses += [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        losses.append(trainer.evaluate()["eval_loss"])
        trainer.model.eval()
        prompt = torch.tensor([[5, 12, 19]], device=causal.device)
        answer = trainer.model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False)
        assert causal.device.type == answer.device.type == "cuda"
        # Neither the trainer nor an evaluation has moved them.
        assert causal.lm_head.weight.is_pinned() == on_host
        assert causal.get_input_embeddings().weight.is_cuda != on_host
        runs.append((losses, answer.tolist()))
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-3) and len(runs[0][0]) == 5
    assert runs[1][1] == runs[0][1]


@pytest.mark.slow
@pytest.mark.parametrize("packing", [True, False])
def test_losses_and_adapter_equal_those_of_the_stock_model(
    dataset_dir, tiny_model_dir, tmp_path, packing
):
    data = dataset_dir(ROWS)
    stock, stock_weights = train(
        tiny_model_dir, data, tmp_path / "stock", fused=False, packing=packing
    )
    ours, our_weights = train(tiny_model_dir, data, tmp_path / "ours", fused=True, packing=packing)
    assert ours == pytest.approx(stock, abs=2e-5)
    assert ours[-1] < ours[0] - 0.1
    for name, theirs in stock_weights.items():
        # By the norm: Adam makes full steps of gradients that are nothing but rounding, too.
        assert (our_weights[name] - theirs).norm() <= 2e-3 * theirs.norm(), name


def test_kernels_stay_off_where_they_cannot_run():
    assert not can_fuse("auto", "cpu")
    assert not can_fuse("off", "cuda")
    with pytest.raises(RecipeError, match=r"train.kernels: fp8 .* this is cpu: set it to auto"):
        can_fuse("fp8", "cpu")
