"""Rows are packed only if the model keeps them apart."""

import logging

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from tuneline.artifacts import DatasetManifest
from tuneline.train import TrainConfig
from tuneline.train.build import packs_rows
from tuneline.train.model.packing import _second_rows as second_rows
from tuneline.train.model.packing import reason_not_to_pack
from tuneline.train.run import run

SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GATED_DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2} | {
    "moe_intermediate_size": 32
}
MAMBA = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False}
APART = {
    "Llama": {},
    "Mistral": {"sliding_window": 8},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Gemma2": {"head_dim": 16},
    "Gemma3": {"head_dim": 16},
    "Phi3": {},
    "Mixtral": {"num_local_experts": 4},
    "SmolLM3": {},
    "Granite": {},
    "Ministral3": {},
    "GPT2": {},
}
MIXED = {
    "Qwen3_5": GATED_DELTA,
    "Qwen3Next": GATED_DELTA | EXPERTS,
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "RecurrentGemma": {"head_dim": 16, "lru_width": 32, "num_hidden_layers": 3},
    "Jamba": MAMBA | {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
    "FalconH1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    "NemotronH": {"layers_block_type": ["mamba", "attention"], "mamba_num_heads": 4}
    | {"mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1},
    "Mamba": {"state_size": 8},
    "MiniMax": {"layer_types": ["linear_attention", "full_attention"], "head_dim": 16} | EXPERTS,
    "GptOss": {"head_dim": 16, "num_local_experts": 4},
    "OPT": {"word_embed_proj_dim": 32},
    "Bloom": {"n_head": 2, "n_layer": 2},
}


def model_of(family, settings):
    config = getattr(transformers, f"{family}TextConfig", None) or getattr(
        transformers, f"{family}Config"
    )
    kind = getattr(transformers, f"{family}ForCausalLM", None) or getattr(
        transformers, f"{family}LMHeadModel"
    )
    torch.manual_seed(0)
    return kind(config(**(SMALL | settings))).eval()


@pytest.mark.parametrize("family", APART)
def test_models_that_keep_rows_apart(family):
    model = model_of(family, APART[family])
    assert reason_not_to_pack(model) == ""
    # The families that are not asked answer the same.
    first, second = second_rows(model)
    assert torch.allclose(first, second, atol=1e-5 * float(first.std()))
    # Packed and single rows have the same loss.
    rows = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(9).repeat(2)[None]
    with torch.no_grad():
        packed = model(input_ids=rows.reshape(1, -1), position_ids=positions, use_cache=False)
        single = model(input_ids=rows, use_cache=False)
    losses = [
        cross_entropy(logits.reshape(2, 9, -1)[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
        for logits in (packed.logits, single.logits)
    ]
    assert losses[0] == pytest.approx(losses[1].item(), rel=1e-5)


@pytest.mark.parametrize("family", MIXED)
def test_models_in_which_a_row_sees_the_rows_before_it_are_not_packed(family):
    assert reason_not_to_pack(model_of(family, MIXED[family]))


def test_a_recipe_that_asks_in_vain_is_told(caplog, new_dataset):
    model = model_of("Qwen3_5", GATED_DELTA)
    sft: DatasetManifest = new_dataset()
    with caplog.at_level(logging.WARNING):
        assert not packs_rows(TrainConfig(packing=False), sft, model)
        assert not packs_rows(TrainConfig(), new_dataset(method="kto"), model)
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING):
        assert not packs_rows(TrainConfig(), sft, model)
    assert "train.packing is off, and rows are padded instead: in Qwen3_5ForCausalLM" in caplog.text
    assert packs_rows(TrainConfig(), sft, model_of("Llama", {}))


def test_a_hybrid_model_trains_with_default_packing(
    tmp_path, tiny_model_dir, dataset_dir, answer_rows, hybrid_model_dir
):
    quick = {"dtype": "float32", "max_steps": 3, "global_batch_size": 4, "sample_tokens": 0}
    found = []
    for packing in (True, False):
        summary = run(
            TrainConfig(**quick, learning_rate=1e-2, packing=packing),
            base_model_dir=hybrid_model_dir,
            dataset_dir=dataset_dir(answer_rows, name=f"data{packing}"),
            adapter_dir=tmp_path / f"adapter{packing}",
            curves_path=tmp_path / "curves.html",
        )
        found.append([(point.step, point.loss) for point in summary.history])
    assert found[0] == found[1] and found[0][-1][1] < found[0][1][1]
