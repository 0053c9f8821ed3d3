"""Experts in NF4 of transformers' models, computed by the kernels, against plain torch."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from expert_models import FAMILIES, make_expert_model

from tuneline.models import experts_forward, nf4
from tuneline.models.experts_adapter import adapt_experts_in_nf4


def _loss_and_gradients(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach(), **gradients}


IN_EVERY_RUN = ("GptOss", "Qwen3Moe")
"""Families whose experts differ most; Triton's interpreter is slow."""


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=() if family in IN_EVERY_RUN else pytest.mark.slow)
        for family in FAMILIES
    ],
)
def test_kernels_compute_what_plain_torch_computes(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_expert_model(family, tmp_path / "model")
    model: Any = nf4.load_base(directory, dtype=torch.float32, device="cpu", quantized=True)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=4, target_modules=["o_proj"], target_parameters=targets)
    adapt_experts_in_nf4(config, model)
    model = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    ids = torch.randint(3, 250, (2, 12))
    calls = []

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(args)
        return experts_mlp(*args, **kwargs)

    experts_mlp = experts_forward.experts_mlp
    monkeypatch.setattr(experts_forward, "experts_mlp", counted)
    ours = _loss_and_gradients(model, ids)
    assert calls
    monkeypatch.setattr(experts_forward, "use_kernel", lambda x: False)
    count = len(calls)
    expected = _loss_and_gradients(model, ids)
    assert len(calls) == count
    for name, value in expected.items():
        scale = float(value.abs().max())
        assert scale > 0 and float((ours[name] - value).abs().max()) < 2e-3 * scale, name
