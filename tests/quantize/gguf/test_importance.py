"""The importance matrix: measured as the reference says, in llama.cpp's file, and used."""

import ctypes
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from gguf import GGUFWriter

from tuneline.artifacts import DatasetManifest, ImportanceMatrix, MergeProof
from tuneline.errors import DataError, ModelError, RecipeError, ToolError, WorldError
from tuneline.quantize import QuantizeConfig, child_process
from tuneline.quantize.calibration import read_rows
from tuneline.quantize.gguf import importance_file
from tuneline.quantize.gguf.ggml import Tensor, library
from tuneline.quantize.gguf.importance import FILE, collect, measure_importance
from tuneline.quantize.run import run
from tuneline.record import sha256_of_file

NUM_ROWS = 6
# The names of a Llama's layers in GGUF files.
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture(scope="module")
def prepared_dir(
    dataset_dir: Path,
    new_dataset: Callable[..., DatasetManifest],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    path = tmp_path_factory.mktemp("importance") / "dataset"
    shutil.copytree(dataset_dir, path)
    new_dataset(num_heldout_rows=1, sha256="7" * 64).write(path)
    return path


@pytest.fixture(scope="module")
def importance_dir(
    f16_dir: Path, prepared_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("importance") / "matrix"
    measure_importance(
        QuantizeConfig(num_importance_rows=NUM_ROWS),
        gguf_dir=str(f16_dir),
        dataset_dir=str(prepared_dir),
        importance_dir=str(path),
    )
    return path


def test_sums_are_those_of_transformers(
    merged_dir: Path, prepared_dir: Path, importance_dir: Path
) -> None:
    """The reference: hooks on every linear layer, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(merged_dir, dtype=torch.float32)
    wanted: dict[str, torch.Tensor] = {}

    def watch(name: str):
        def add(_, inputs: tuple[torch.Tensor]) -> None:
            wanted[name] = wanted.get(name, 0) + inputs[0][0].double().square().sum(0)

        return add

    for path, module in model.named_modules():
        if ".layers." in path and isinstance(module, torch.nn.Linear):
            _, _, layer, kind = path.split(".", 3)
            name = f"blk.{layer}.{NAMES[kind]}.weight"
            module.register_forward_pre_hook(watch(name))
    rows = read_rows(prepared_dir, NUM_ROWS, setting="num_rows", purpose="this test is made")
    with torch.inference_mode():
        for row in rows:
            model(input_ids=torch.tensor([row]))

    record = ImportanceMatrix.read(importance_dir)
    num_tokens = sum(map(len, rows))
    assert (record.num_rows, record.num_tokens) == (NUM_ROWS, num_tokens)
    assert record.made_from["dataset"].sha256 == "7" * 64
    found = importance_file.read(importance_dir / FILE)
    assert set(found) == set(wanted) and len(found) == record.num_tensors == 14
    for name, entry in found.items():
        assert entry.count == num_tokens
        # llama.cpp rounds each product's inputs to f16.
        numpy.testing.assert_allclose(entry.sums, wanted[name].numpy(), rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("format", [pytest.param("q4_k_m", marks=pytest.mark.slow), "iq2_xs"])
def test_it_changes_the_rounding_of_a_format(
    format: str, merged_dir: Path, f16_dir: Path, prepared_dir: Path, importance_dir: Path, tmp_path
) -> None:
    def export(name: str, **importance: str):
        return run(
            QuantizeConfig(num_check_tokens=2, num_proof_prompts=2),
            format=format,
            merged_dir=str(merged_dir),
            gguf_dir=str(f16_dir),
            dataset_dir=str(prepared_dir),
            quantized_dir=str(tmp_path / name),
            **importance,
        )

    weighed = export("weighed", importance_dir=str(importance_dir))
    assert weighed.num_importance_rows == NUM_ROWS
    assert weighed.notes[-1].startswith(f"importance matrix from {NUM_ROWS} training rows, ")
    if format == "iq2_xs":
        with pytest.raises(RecipeError, match="'iq2_xs' needs an importance matrix"):
            export("plain")
        return
    plain = export("plain")
    assert plain.num_importance_rows == 0
    assert plain.tensor_types == weighed.tensor_types
    assert plain.files[plain.file] if plain.files else True
    bytes_of = [(tmp_path / name / plain.file).read_bytes() for name in ("plain", "weighed")]
    assert bytes_of[0] != bytes_of[1]


def test_without_a_matrix_at_hand_it_is_measured(
    merged_dir: Path, f16_dir: Path, prepared_dir: Path, importance_dir: Path, tmp_path: Path
) -> None:
    files = []
    for name, given in (("given", str(importance_dir)), ("measured", None)):
        record = run(
            QuantizeConfig(num_check_tokens=2, num_importance_rows=NUM_ROWS),
            format="q4_0",
            merged_dir=str(merged_dir),
            gguf_dir=str(f16_dir),
            dataset_dir=str(prepared_dir),
            quantized_dir=str(tmp_path / name),
            importance_dir=given,
        )
        assert record.num_importance_rows == NUM_ROWS
        files.append((tmp_path / name / record.file).read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("format", ["q4_0", "q8_0"])
def test_a_matrix_of_another_model_is_refused(
    format: str,
    recorded: bool,
    merged_dir: Path,
    other_dir: Path,
    prepared_dir: Path,
    importance_dir: Path,
    tmp_path: Path,
) -> None:
    """It would round by another model's inputs, and the file be as good as any by its bounds.

    Where the format has no use for it as well: the pipeline names one matrix for all of them.
    """
    matrix = Path(shutil.copytree(importance_dir, tmp_path / "matrix"))
    if recorded:
        found = f"the merged model {MergeProof.read(merged_dir).content_sha256()[:12]}"
    else:
        ImportanceMatrix.read(matrix).write(matrix)
        found = "no merged model"
    expected = MergeProof.read(other_dir).content_sha256()[:12]
    with pytest.raises(
        ModelError,
        match=rf"matrix was made from {found}, .*other is {expected}: measure the importance m",
    ):
        run(
            QuantizeConfig(num_check_tokens=2, num_importance_rows=NUM_ROWS),
            format=format,
            merged_dir=str(other_dir),
            dataset_dir=str(prepared_dir),
            quantized_dir=str(tmp_path / "out"),
            importance_dir=str(matrix),
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", [True, False])
def test_the_f16_file_is_hashed_once(
    given: bool,
    merged_dir: Path,
    f16_dir: Path,
    prepared_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """16 GB for 8B, read from a disk each time."""
    hashed = []

    def watched(path: Path) -> str:
        hashed.append(path.name)
        return sha256_of_file(path)

    monkeypatch.setattr("tuneline.record.sha256_of_file", watched)
    # In this process, to be watched.
    monkeypatch.setattr(
        child_process, "call", lambda function, *args, **named: function(*args, **named)
    )
    run(
        QuantizeConfig(num_check_tokens=2, num_importance_rows=NUM_ROWS),
        format="q4_0",
        merged_dir=str(merged_dir),
        gguf_dir=str(f16_dir) if given else None,
        dataset_dir=str(prepared_dir),
        quantized_dir=str(tmp_path / "out"),
    )
    assert hashed.count("model-F16.gguf") == 1
    assert hashed.count("model.safetensors") == 1, "the merged model's"


def test_eight_bits_are_not_weighed(
    merged_dir: Path, f16_dir: Path, prepared_dir: Path, importance_dir: Path, tmp_path: Path
) -> None:
    record = run(
        QuantizeConfig(num_check_tokens=2, num_importance_rows=NUM_ROWS),
        format="q8_0",
        merged_dir=str(merged_dir),
        gguf_dir=str(f16_dir),
        dataset_dir=str(prepared_dir),
        quantized_dir=str(tmp_path / "q8"),
        importance_dir=str(importance_dir),
    )
    assert record.num_importance_rows == 0


def test_a_file_survives_the_round_trip(tmp_path: Path) -> None:
    found = {
        "blk.0.ffn_up.weight": importance_file.Importance(numpy.arange(5.0), count=7),
        "blk.10.ffn_up.weight": importance_file.Importance(numpy.full(3, 0.5), count=1),
    }
    importance_file.write(tmp_path / FILE, found, source="rows", num_rows=2)
    again = importance_file.read(tmp_path / FILE)
    assert list(again) == list(found)
    for name, entry in found.items():
        assert again[name].count == entry.count
        numpy.testing.assert_array_equal(again[name].sums, entry.sums)
        numpy.testing.assert_allclose(again[name].mean, entry.sums / entry.count)


def test_what_is_no_matrix(f16_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="contains no importance matrix"):
        importance_file.read(f16_dir / "model-F16.gguf")
    (tmp_path / FILE).write_bytes(b"no")
    with pytest.raises(ToolError, match="not a GGUF file"):
        importance_file.read(tmp_path / FILE)
    with pytest.raises(ToolError, match="llama.cpp cannot load"):
        collect(tmp_path / FILE, [[1]])


@pytest.mark.parametrize(
    "types", [{"in_sum2": "float16", "counts": "float32"}, {"in_sum2": "float32"}]
)
def test_sums_of_another_type_and_sums_without_counts_are_no_matrix(
    types: dict[str, str], tmp_path: Path
) -> None:
    writer = GGUFWriter(tmp_path / FILE, "imatrix")
    for name, dtype in types.items():
        writer.add_tensor(f"blk.0.ffn_up.weight.{name}", numpy.ones((1, 4), dtype=dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ToolError, match="contains no importance matrix"):
        importance_file.read(tmp_path / FILE)


def test_it_needs_rows(f16_dir: Path, prepared_dir: Path, tmp_path: Path) -> None:
    def measure(num_rows: int, dataset: Path) -> None:
        measure_importance(
            QuantizeConfig(num_importance_rows=num_rows),
            gguf_dir=str(f16_dir),
            dataset_dir=str(dataset),
            importance_dir=str(tmp_path / "out"),
        )

    with pytest.raises(RecipeError, match="num_importance_rows is 0"):
        measure(0, prepared_dir)
    with pytest.raises(DataError, match="importance matrix is measured on training rows"):
        measure(4, tmp_path)
    assert not (tmp_path / "out").exists()


def test_it_is_not_measured_with_a_file_that_was_cut(
    f16_dir: Path, prepared_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(f16_dir, tmp_path / "gguf")
    file = tmp_path / "gguf" / "model-F16.gguf"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(WorldError, match=r"model-F16\.gguf was changed after it was made"):
        measure_importance(
            QuantizeConfig(num_importance_rows=NUM_ROWS),
            gguf_dir=str(tmp_path / "gguf"),
            dataset_dir=str(prepared_dir),
            importance_dir=str(tmp_path / "out"),
        )
    assert not (tmp_path / "out").exists()


def test_the_layout_of_a_tensor_is_that_of_this_ggml() -> None:
    # The library's own size of a tensor with its object, which is 32 bytes, and of what we leave
    # out at the end: a pointer and padding.
    assert library().ggml_tensor_overhead() == 32 + ctypes.sizeof(Tensor) + 16
