"""Answers before and after training are those of plain transformers and PEFT."""

from html import escape

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer

from tuneline.artifacts import DatasetManifest
from tuneline.models.nf4 import load_base
from tuneline.train import TrainConfig
from tuneline.train.observe.samples import prompts_of
from tuneline.train.run import run

SETTINGS = {
    "learning_rate": 2e-2,
    "dtype": "float32",
    "max_steps": 6,
    "warmup_steps": 0,
    "global_batch_size": 2,
    "sample_tokens": 6,
}


def test_the_page_has_the_answers_of_base_and_adapter(
    tmp_path, tiny_model_dir, dataset_dir, answer_rows
):
    dataset = dataset_dir(answer_rows, eval_rows=answer_rows[2:])
    run(
        TrainConfig.parse(SETTINGS),
        base_model_dir=tiny_model_dir,
        dataset_dir=dataset,
        adapter_dir=tmp_path / "adapter",
        curves_path=tmp_path / "curves.html",
    )
    page = (tmp_path / "curves.html").read_text()
    for heading in (
        "Loss",
        "Gradient norm",
        "Tokens per second",
        "Peak memory so far",
        "Learning rate",
    ):
        assert f"<h2>{heading}</h2>" in page, heading
    assert "<h2>GPU utilisation</h2>" not in page
    # They may come from private rows, and the adapter's directory is published.
    assert not any("samples" in path.name for path in (tmp_path / "adapter").iterdir())

    tokenizer = AutoTokenizer.from_pretrained(str(tiny_model_dir))
    base = load_base(tiny_model_dir, dtype=torch.float32, device="cpu", quantized=True).eval()

    def answers(model) -> list[str]:
        found = []
        for row in answer_rows[2:5]:
            prompt = torch.tensor([row["input_ids"][: row["loss_mask"].index(1)]])
            ids = model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False)
            found.append(tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True))
        return [text.strip() for text in found]

    before = answers(base)
    after = answers(PeftModel.from_pretrained(base, tmp_path / "adapter").eval())
    assert before != after
    for text in before + after:
        assert f"<dd>{escape(text)}</dd>" in page


@pytest.mark.parametrize(
    ("method", "row", "prompt", "reference"),
    [
        ("sft", {"input_ids": [5, 6, 7, 8, 9], "loss_mask": [0, 0, 1, 1, 0]}, [5, 6], [7, 8]),
        ("cpt", {"input_ids": [5, 6, 7, 8], "loss_mask": [1, 1, 1, 1]}, [5, 6], [7, 8]),
        ("dpo", {"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7]}, [5], [6]),
    ],
)
def test_a_rows_prompt_and_first_answer(
    tiny_model_dir, dataset_dir, method, row, prompt, reference
):
    dataset = dataset_dir([row], method=method)
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_model_dir))
    manifest = DatasetManifest.read(dataset)
    assert prompts_of(None, tokenizer, dataset, manifest) == [(prompt, reference)]


def test_prompts_of_the_recipe_are_templated_as_rows_are(tiny_model_dir, dataset_dir):
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_model_dir))
    row = {"input_ids": [5, 6], "loss_mask": [0, 1]}
    for method, expected in (
        ("sft", "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"),
        ("cpt", "Why?"),
    ):
        dataset = dataset_dir([row], method=method, name=method)
        ((ids, reference),) = prompts_of(
            ("Why?",), tokenizer, dataset, DatasetManifest.read(dataset)
        )
        assert tokenizer.decode(ids).endswith(expected) and reference is None
