"""A real model through train and merge: slow, because 135 million parameters are."""

import pytest

from tuneline.merge import MergeConfig
from tuneline.merge.run import run as merge
from tuneline.train import TrainConfig
from tuneline.train.run import run as train


@pytest.mark.slow
def test_a_real_model_learns_and_merges(tmp_path, smollm2_dir, dataset_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(smollm2_dir))
    rows = []
    for number in range(2, 10):
        prompt = tokenizer(f"{number} Ki in bytes is")["input_ids"]
        answer = tokenizer(f" {number * 1024}.<|im_end|>")["input_ids"]
        mask = [0] * len(prompt) + [1] * len(answer)
        rows.append({"input_ids": prompt + answer, "loss_mask": mask})
    dataset = dataset_dir(rows, max_seq_length=128)
    summary = train(
        TrainConfig(
            learning_rate=2e-3,
            max_steps=4,
            warmup_steps=0,
            global_batch_size=2,
            gradient_checkpointing=False,
        ),
        base_model_dir=smollm2_dir,
        dataset_dir=dataset,
        adapter_dir=tmp_path / "adapter",
        curves_path=tmp_path / "curves.html",
    )
    assert summary.final_eval_loss < 0.7 * summary.first_eval_loss
    proof = merge(
        MergeConfig(),
        base_model_dir=smollm2_dir,
        adapter_dir=tmp_path / "adapter",
        dataset_dir=dataset,
        merged_dir=tmp_path / "merged",
    )
    assert proof.num_merged_modules == 210 and proof.mean_kl < 0.01
