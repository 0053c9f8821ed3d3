"""The fused loss around the stock forwards of families outside the table of fused layers."""

import pytest
import torch
import transformers

from tuneline.kernels.patching import patch, unpatch

SIZES = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "Cohere": {"logit_scale": 0.25},
    "Cohere2": {"logit_scale": 0.25},
    "Olmo3": {},
    "Glm4": {"head_dim": 16},
    "GptOss": {"num_local_experts": 4, "head_dim": 16},
    "Helium": {"head_dim": 16},
}


@pytest.fixture(autouse=True)
def no_interpreter(references):
    """Run the references: the kernel of the loss has its own tests."""


def make(family):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | FAMILIES[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().train()
    model.lm_head.weight.requires_grad_(False)
    return model


def step(model):
    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(1))
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    names = "layers.0.mlp.down_proj.weight", "layers.0.mlp.experts.down_proj"
    down = next(p for n, p in model.named_parameters() if n.endswith(names))
    return loss.detach(), down.grad.clone()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_fused(family):
    model = make(family)
    stock_loss, stock_gradient = step(model)
    report = patch(model)
    assert report.loss == "fused", report
    assert not report.fused and report.family is None
    loss, gradient = step(model)
    torch.testing.assert_close(loss, stock_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, stock_gradient, rtol=1e-4, atol=1e-7)
    with torch.no_grad():
        ids = torch.randint(3, 300, (1, 5))
        assert model.eval()(input_ids=ids, labels=ids).logits.shape == (1, 5, 300)
    unpatch(model)
    assert type(model).forward is getattr(transformers, f"{family}ForCausalLM").forward


def test_a_forward_that_caps_its_logits_keeps_the_stock_loss():
    class Capped(transformers.Olmo3ForCausalLM):
        def forward(self, labels=None, **kwargs):
            output = super().forward(**kwargs)
            output.logits = 20 * torch.tanh(output.logits / 20)
            if labels is not None:
                output.loss = self.loss_function(output.logits, labels, self.vocab_size)
            return output

    model = make("Olmo3")
    model.__class__ = Capped
    stock = step(model)
    report = patch(model)
    assert "changes its logits before the loss" in report.loss
    torch.testing.assert_close(step(model), stock)


def test_a_trained_head_keeps_the_stock_loss():
    model = make("Olmo3")
    model.lm_head.weight.requires_grad_(True)
    assert patch(model).loss == "lm_head is trained"
