import os
import shutil
from pathlib import Path

import pytest

from tuneline.artifacts import MODELFILE, MergeProof, QuantizedModel
from tuneline.errors import (
    ModelError,
    OutputExistsError,
    ProofError,
    RecipeError,
    ToolError,
    WorldError,
)
from tuneline.models.likelihood import NEAR_TIE
from tuneline.quantize import QuantizeConfig, formats
from tuneline.quantize.gguf import converter, tensors
from tuneline.quantize.gguf.llama_model import LlamaFile
from tuneline.quantize.proof.generation import Generation
from tuneline.quantize.proof.quality import check_generation
from tuneline.quantize.proof.transformers_model import TransformersModel
from tuneline.quantize.run import run

# Weights of the tiny model: embeddings 49152 x 128, and two layers of seven matrices and two norms.
NUM_MATRIX_WEIGHTS = 49152 * 128 + 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 256 * 128)
NUM_VECTOR_WEIGHTS = 5 * 128


def export(
    format: str, merged: Path, dataset: Path, target: Path, *, gguf: Path | None = None, **settings
) -> QuantizedModel:
    """Run the step with the recipe's settings."""
    return run(
        QuantizeConfig(**settings),
        format=format,
        merged_dir=str(merged),
        dataset_dir=str(dataset),
        quantized_dir=str(target),
        gguf_dir=None if gguf is None else str(gguf),
    )


def test_f16_says_what_transformers_says(
    merged_dir: Path, f16_dir: Path, dataset_dir: Path, tmp_path: Path
) -> None:
    target = tmp_path / "f16"
    record = export("f16", merged_dir, dataset_dir, target, gguf=f16_dir, num_check_tokens=12)
    file = target / record.file
    assert record.prompt.startswith("<|im_start|>user")
    merged = TransformersModel(merged_dir)
    theirs = merged.generate(merged.tokenise(record.prompt), num_tokens=12)
    with LlamaFile(file, num_context=64) as loaded:
        assert loaded.tokenise(record.prompt) == theirs.prompt_ids
        ours = loaded.generate(theirs.prompt_ids, num_tokens=12)
    assert ours.ids == theirs.ids
    assert record.reference == theirs.text
    assert record.tensor_types == {"f16": 15, "f32": 5}
    assert record.bits_per_weight == pytest.approx(
        (16 * NUM_MATRIX_WEIGHTS + 32 * NUM_VECTOR_WEIGHTS)
        / (NUM_MATRIX_WEIGHTS + NUM_VECTOR_WEIGHTS),
        abs=1e-4,
    )
    assert file.stat().st_ino == (f16_dir / QuantizedModel.read(f16_dir).file).stat().st_ino
    kept = QuantizedModel.read(target)
    assert kept.notes == []
    assert kept.mean_kl is not None and kept.mean_kl < 1e-5
    assert kept.top1_agreement == 1.0
    assert kept.perplexity == pytest.approx(kept.reference_perplexity, rel=1e-3)
    assert kept.num_prompts == 8
    assert kept.num_tokenizer_texts is not None and kept.num_tokenizer_texts > 200
    assert kept.num_conversations == 7
    assert kept.stop_tokens == ["<|im_end|>"]
    assert kept.tokens_per_second is not None and kept.tokens_per_second > 0
    assert (target / MODELFILE).is_file()
    # The context of Ollama's files: the tiny model's.
    assert kept.num_context == 2048


def test_a_k_quant_tells_of_its_fallbacks(
    merged_dir: Path, f16_dir: Path, dataset_dir: Path, tmp_path: Path
) -> None:
    record = export(
        "q4_k_m", merged_dir, dataset_dir, tmp_path / "q4", gguf=f16_dir, num_check_tokens=4
    )
    # Only the down projections have rows of 256; everything else is 128 wide.
    assert sum(record.tensor_types.values()) == 20
    assert sum(n for name, n in record.tensor_types.items() if name.endswith("_K")) == 2
    assert record.notes[0].startswith("13 of 20 tensors fell back to ")
    assert record.notes[0].endswith("rows of 128 weights are not a multiple of 256")
    assert 4.5 < record.bits_per_weight < 9
    assert record.max_mean_kl == formats.FORMATS["q4_k_m"].bound.max_mean_kl
    assert record.mean_kl is not None and 0 < record.mean_kl < record.max_mean_kl


def test_q8_is_eight_and_a_half_bits(
    merged_dir: Path, f16_dir: Path, dataset_dir: Path, tmp_path: Path
) -> None:
    record = export(
        "q8_0", merged_dir, dataset_dir, tmp_path / "q8", gguf=f16_dir, num_check_tokens=4
    )
    # A block is 32 weights in 8 bits and a scale in 16.
    assert record.bits_per_weight == pytest.approx(8.5, abs=0.01)
    assert record.tensor_types == {"q8_0": 15, "f32": 5}


def test_a_recipe_tightens_a_bound(
    merged_dir: Path, f16_dir: Path, dataset_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        ProofError,
        match=r"export q4_0 has a mean KL divergence of [\d.e-]+ nats per token from the merged "
        r"model \(at most 1e-09\) .* over \d+ positions of 8 rows; perplexity [\d.e+]+ "
        r"against [\d.e+]+: "
        r"use a format with more bits",
    ):
        export(
            "q4_0",
            merged_dir,
            dataset_dir,
            tmp_path / "q4",
            gguf=f16_dir,
            num_check_tokens=4,
            max_mean_kl={"q4_0": 1e-9},
        )
    assert list(tmp_path.iterdir()) == []


def generation(ids: list[int], logits: list[list[float]]) -> Generation:
    import numpy

    return Generation(prompt_ids=[1], ids=ids, text=str(ids), logits=numpy.array(logits))


def test_a_near_tie_is_a_note_and_a_real_difference_fails() -> None:
    reference = generation([0, 1], [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0 - NEAR_TIE / 2]])
    assert check_generation(generation([0, 1], []), reference) is None
    assert "near tie" in str(check_generation(generation([0, 2], []), reference))
    with pytest.raises(ProofError, match="differ at token 0"):
        check_generation(generation([2, 1], []), reference)
    # A reference that is not greedy is no reference.
    with pytest.raises(ProofError, match=r"differ at token 0 of a greedy answer by -1\.000 logits"):
        check_generation(generation([0, 1], []), generation([2, 1], [[1.0, 0.0, 0.0]] * 2))


def test_missing_converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(converter.VARIABLE, str(tmp_path))
    with pytest.raises(ToolError, match=r"there is no convert_hf_to_gguf\.py in it"):
        converter.find()


def test_a_wheel_without_the_converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(converter.VARIABLE, raising=False)
    stock = tmp_path / "llama_cpp" / "__init__.py"
    stock.parent.mkdir()
    stock.touch()
    spec = converter.importlib.util.spec_from_file_location("llama_cpp", stock)
    monkeypatch.setattr(converter.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ToolError, match="without llama.cpp.s converter script"):
        converter.find()
    monkeypatch.setattr(converter.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ToolError, match="not installed"):
        converter.find()


def test_not_a_gguf_file(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF is not what follows")
    with pytest.raises(ToolError, match="not a GGUF file"):
        tensors.read(file)
    with pytest.raises(ProofError, match="cannot load"):
        LlamaFile(file, num_context=1)


@pytest.mark.parametrize(
    ("format", "message"),
    [
        ("gptq", r"'gptq' is unknown; did you mean 'gptq-.bit'\? Choose one of f16"),
        ("Q4_K_M", r"did you mean 'q4_k_m'\?"),
        ("q3-k-m", r"did you mean 'q3_k_m'\?"),
        ("q4km", r"did you mean 'q4_k_m'\?"),
        ("zzz", "'zzz' is unknown; choose one of f16, bf16, q8_0"),
        ("iq2_xs", "needs an importance matrix.* q3_k_m"),
        ("TQ1_0", "for models trained in so few values"),
    ],
)
def test_unknown_format(format: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        export(format, tmp_path, tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gguf": ["q4km"]}, r"gguf\[0\]: .*did you mean 'q4_k_m'\?"),
        ({"gguf": ["iq3_m"]}, "'iq3_m' needs an importance matrix: set quantize.num_importance_r"),
        ({"gguf": ["gptq-4bit"]}, r"gguf\[0\]: the export format 'gptq-4bit' is unknown"),
        ({"gptq": ["gptq-5bit"]}, r"gptq\[0\]: .*did you mean 'gptq-.bit'\?"),
        ({"gguf": ["f16", "q8_0", "f16"]}, "f16 is named more than once"),
        ({"max_mean_kl": {"q8": 0.1}}, r"max_mean_kl.*did you mean 'q8_0'\?"),
        ({"min_top1_agreement": {"q8_0": 1.5}}, "a number at least 0 and at most 1"),
    ],
)
def test_a_recipe_names_formats(settings: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        QuantizeConfig.parse(settings)


def test_every_type_that_llama_cpp_names_is_made_or_refused_with_a_reason() -> None:
    import llama_cpp

    prefix = "LLAMA_FTYPE_MOSTLY_"
    named = {name.removeprefix(prefix).lower() for name in vars(llama_cpp) if prefix in name}
    assert {*formats.names("gguf"), *formats.NOT_MADE} == named
    assert not set(formats.FORMATS) & set(formats.NOT_MADE)


def test_not_a_merged_model(tmp_path: Path) -> None:
    with pytest.raises(WorldError, match=r"has no merge\.json"):
        export("f16", tmp_path, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_is_not_overwritten(merged_dir: Path, dataset_dir: Path) -> None:
    with pytest.raises(OutputExistsError):
        export("f16", merged_dir, dataset_dir, dataset_dir)


@pytest.mark.parametrize("cut", ["merged/model.safetensors", "gguf/model-F16.gguf"])
def test_a_file_that_was_cut_is_named_before_it_is_read(
    cut: str, merged_dir: Path, f16_dir: Path, dataset_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(merged_dir, tmp_path / "merged")
    shutil.copytree(f16_dir, tmp_path / "gguf")
    os.truncate(tmp_path / cut, 100_000)
    with pytest.raises(WorldError, match=rf"{cut} was changed after it was made: its SHA-256"):
        export("q8_0", tmp_path / "merged", dataset_dir, tmp_path / "out", gguf=tmp_path / "gguf")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recorded", [True, False])
def test_a_file_of_another_model_is_refused(
    recorded: bool,
    merged_dir: Path,
    other_dir: Path,
    f16_dir: Path,
    dataset_dir: Path,
    tmp_path: Path,
) -> None:
    gguf = Path(shutil.copytree(f16_dir, tmp_path / "gguf"))
    if recorded:
        found = f"the merged model {MergeProof.read(merged_dir).content_sha256()[:12]}"
    else:
        QuantizedModel.read(gguf).write(gguf)
        found = "no merged model"
    expected = MergeProof.read(other_dir).content_sha256()[:12]
    with pytest.raises(ModelError, match=rf"made from {found}, .*other is {expected}: convert"):
        export("q8_0", other_dir, dataset_dir, tmp_path / "out", gguf=gguf)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["f16", "q8_0"])
def test_a_full_disk_is_said_so(
    format: str, merged_dir: Path, f16_dir: Path, dataset_dir: Path, small_disk: Path
) -> None:
    """llama.cpp only says that a stream broke, and its converter how many bytes it wrote."""
    gguf = None if format == "f16" else f16_dir
    with pytest.raises(OSError, match=r"No space left on device: .*\.gguf"):
        export(format, merged_dir, dataset_dir, small_disk / "out", gguf=gguf)
    assert list(small_disk.iterdir()) == []
