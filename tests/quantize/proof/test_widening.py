"""Weights of 16 bits, widened when they are used, against a model that was loaded in float32."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tuneline.quantize.proof import reference, widening
from tuneline.quantize.proof.transformers_model import TransformersModel

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 1000,
    "pad_token_id": 0,
}
TIED = {"tie_word_embeddings": True}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    # Biases, and one matrix for input and output.
    "Qwen2": TIED,
    "Qwen3": TIED,
    # Fused projections.
    "Phi3": {"num_key_value_heads": 4},
    # A factor of embeddings, 11.3137..., that bfloat16 rounds to 11.3125.
    "Gemma3": {"query_pre_attn_scalar": 32, "sliding_window": 16},
    # Experts in tensors of three dimensions.
    "Mixtral": {"num_local_experts": 4},
    # Weights that are not linear layers', and embeddings of positions.
    "GPT2": {},
    "OPT": {"ffn_dim": 256, "word_embed_proj_dim": 128, "max_position_embeddings": 64},
}


def save(path: Path, family: str, dtype: torch.dtype) -> None:
    import transformers

    kind = "Gemma3Text" if family == "Gemma3" else family
    name = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    config = getattr(transformers, f"{kind}Config")(**SIZES | FAMILIES[family])
    torch.manual_seed(0)
    model = getattr(transformers, name)(config)
    for parameter in model.parameters():
        # Norms and biases as well, of which many begin as ones and zeros.
        torch.nn.init.normal_(parameter, mean=0.1 * (parameter.ndim == 1), std=0.05)
    model.to(dtype).save_pretrained(path)


@pytest.fixture(autouse=True)
def as_of_large_models(monkeypatch: pytest.MonkeyPatch):
    """Let no matrix of a small model be small, and none fit one block."""
    monkeypatch.setattr(widening, "NUM_SMALL", 1000)
    monkeypatch.setattr(widening, "BLOCK_WEIGHTS", 10_000)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, torch.bfloat16) for family in FAMILIES), ("Llama", torch.float16)],
)
def test_it_computes_what_a_model_in_float32_does(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    save(tmp_path, family, dtype)
    assert widening.narrow_dtype(tmp_path) == dtype
    wide, narrow = (
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=each)
        for each in (torch.float32, dtype)
    )
    tested = widening.load(tmp_path, dtype)
    ids = (torch.arange(40) * 7 + 3)[None] % 1000
    with torch.inference_mode():
        # Twice: the first forward leaves everything as it was.
        tested(input_ids=ids)
        logits, expected, rounded = (
            model(input_ids=ids).logits.float() for model in (tested, wide, narrow)
        )
        answers = [
            model.generate(ids[:, :8], do_sample=False, max_new_tokens=12, pad_token_id=0)
            for model in (tested, wide)
        ]
    scale = expected.abs().max()
    assert (logits - expected).abs().max() < 2e-6 * scale
    # Anything that was computed in 16 bits would be seen.
    assert (rounded - expected).abs().max() > 2e-4 * scale
    assert torch.equal(*answers)
    large = {name: weight for name, weight in tested.named_parameters() if weight.numel() >= 1000}
    assert {weight.dtype for weight in large.values()} == {dtype}
    # transformers joins a file's experts, which are a tensor each there.
    joined = {name for name in large if "experts" in name}
    assert mapped_names(tested, tmp_path) == set(large) - joined


def mapped_names(model: torch.nn.Module, path: Path) -> set[str]:
    """Return the parameters that lie in a mapping of the model's file, and nowhere else."""
    maps = re.findall(
        r"^(\w+)-(\w+) .* (\S+)$", Path("/proc/self/maps").read_text(), flags=re.MULTILINE
    )
    ranges = [
        (int(first, 16), int(last, 16))
        for first, last, file in maps
        if file == str((path / "model.safetensors").resolve())
    ]
    return {
        name
        for name, weight in model.named_parameters()
        if any(first <= weight.data_ptr() < last for first, last in ranges)
    }


def test_weights_of_several_types_are_not_narrow(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    one, other = torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2)
    save_file({"one": one}, tmp_path / "a.safetensors")
    assert widening.narrow_dtype(tmp_path) == torch.bfloat16
    save_file({"other": other}, tmp_path / "b.safetensors")
    assert widening.narrow_dtype(tmp_path) is None
    save_file({"other": other}, tmp_path / "a.safetensors")
    assert widening.narrow_dtype(tmp_path) is None, "nothing to widen"


def test_the_reference_is_that_of_float32(
    merged_dir: Path, dataset_dir: Path, tmp_path: Path
) -> None:
    """A merged model in bfloat16 is measured as the same weights in float32 are."""
    from transformers import AutoModelForCausalLM

    narrow, wide = tmp_path / "narrow", tmp_path / "wide"
    shutil.copytree(merged_dir, narrow)
    model = AutoModelForCausalLM.from_pretrained(merged_dir, dtype=torch.bfloat16)
    model.save_pretrained(narrow)
    shutil.copytree(narrow, wide)
    model.float().save_pretrained(wide)
    ours, theirs = (
        reference.measure(path, dataset_dir=dataset_dir, num_rows=4, num_tokens=12)
        for path in (narrow, wide)
    )
    assert ours.rows == theirs.rows
    assert ours.generation.ids == theirs.generation.ids
    for one, other in zip(ours.logits, theirs.logits, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0, atol=2e-6)
    with pytest.raises(AssertionError):
        rounded = TransformersModel(narrow, dtype="auto").logits(ours.rows[0].ids)
        torch.testing.assert_close(rounded, theirs.logits[0], rtol=0, atol=2e-6)
