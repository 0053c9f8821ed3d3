"""LoftQ brings base plus adapter nearer to the full-precision weights, and where it cannot go."""

import math

import peft
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tuneline.errors import RecipeError
from tuneline.models.nf4 import load_base
from tuneline.train import TrainConfig
from tuneline.train.config import LoraConfig
from tuneline.train.model.loftq import low_rank, start_from_error
from tuneline.train.model.targets import lora_config
from tuneline.train.run import run


@pytest.mark.parametrize(("rows", "columns", "rank"), [(7, 19, 4), (19, 7, 4), (5, 9, 8)])
def test_low_rank_is_the_truncated_singular_value_decomposition(rows, columns, rank):
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    down, up = low_rank(matrix, rank)
    assert (down.shape, up.shape) == ((rank, columns), (rows, rank))
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    s[rank:] = 0
    torch.testing.assert_close(up @ down, u @ torch.diag(s) @ v, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_base_plus_adapter_is_nearer_to_the_full_weights(tiny_model_dir, use_rslora):
    lora = LoraConfig(r=16, lora_alpha=24, use_rslora=use_rslora, init_lora_weights="loftq")
    full = load_file(tiny_model_dir / "model.safetensors")
    base = load_base(tiny_model_dir, dtype=torch.float32, device="cpu", quantized=True)
    plain = {}
    for name, module in base.named_modules():
        if name.endswith("_proj"):
            plain[name] = module(torch.eye(module.in_features)).T
    model = peft.get_peft_model(base, lora_config(lora, base)).eval()
    start_from_error(model, tiny_model_dir)
    for name, module in model.get_base_model().named_modules():
        if name not in plain:
            continue
        weight = full[f"{name}.weight"].float()
        found = module(torch.eye(weight.shape[1])).detach().T
        rest = weight - plain[name]
        singular = torch.linalg.svdvals(rest)
        # Eckart and Young: no matrix of rank 16 is nearer.
        best = math.sqrt(float(singular[16:].square().sum()))
        assert float((weight - found).norm()) == pytest.approx(best, rel=1e-3)
        assert best < 0.9 * float(rest.norm())


def test_a_run_starts_there_and_its_adapter_loads_in_plain_peft(
    tmp_path, tiny_model_dir, dataset_dir, answer_rows
):
    dataset = dataset_dir(answer_rows)
    found = []
    for init in ("default", "loftq"):
        summary = run(
            TrainConfig.parse(
                {
                    "dtype": "float32",
                    "max_steps": 3,
                    "eval_steps": 3,
                    "lora": {"init_lora_weights": init},
                }
            ),
            base_model_dir=tiny_model_dir,
            dataset_dir=dataset,
            adapter_dir=tmp_path / init,
            curves_path=tmp_path / "curves.html",
        )
        base = load_base(tiny_model_dir, dtype=torch.float32, device="cpu", quantized=True)
        tuned = PeftModel.from_pretrained(base, str(tmp_path / init)).eval()
        rows = [row["input_ids"] for row in answer_rows]
        with torch.no_grad():
            found.append((summary, [tuned(input_ids=torch.tensor([ids])).logits for ids in rows]))
    (plain, _), (loftq, logits) = found
    assert loftq.first_eval_loss != pytest.approx(plain.first_eval_loss, abs=1e-7)
    total = count = 0.0
    for row, values in zip(answer_rows, logits, strict=True):
        mask = torch.tensor(row["loss_mask"][1:], dtype=torch.bool)
        targets = torch.tensor(row["input_ids"][1:])
        losses = torch.nn.functional.cross_entropy(values[0, :-1], targets, reduction="none")
        total, count = total + float(losses[mask].sum()), count + int(mask.sum())
    assert total / count == pytest.approx(loftq.final_eval_loss, rel=1e-4)


def test_where_it_cannot_go(tmp_path, tiny_model_dir, dataset_dir):
    settings = {"lora": {"init_lora_weights": "loftq"}}
    with pytest.raises(RecipeError, match="loftq.*load_in_4bit"):
        TrainConfig.parse({**settings, "load_in_4bit": False})
    rows = [{"prompt_ids": [100, 101], "chosen_ids": [200], "rejected_ids": [210]}]
    with pytest.raises(RecipeError, match="loftq cannot start method dpo"):
        run(
            TrainConfig.parse(settings),
            base_model_dir=tiny_model_dir,
            dataset_dir=dataset_dir(rows, method="dpo"),
            adapter_dir=tmp_path / "adapter",
            curves_path=tmp_path / "curves.html",
        )
