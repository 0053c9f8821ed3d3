import json
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file

from tuneline.artifacts import QuantizedModel
from tuneline.errors import DataError
from tuneline.quantize import QuantizeConfig
from tuneline.quantize.run import run


def test_no_training_rows(merged_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="calibrates on training rows"):
        run(
            QuantizeConfig(),
            format="gptq-4bit",
            merged_dir=str(merged_dir),
            dataset_dir=str(tmp_path),
            quantized_dir=str(tmp_path / "out"),
        )


@pytest.mark.parametrize(
    ("bits", "group_size", "desc_act"),
    [
        (8, 64, False),
        pytest.param(4, 32, False, marks=pytest.mark.slow),
        pytest.param(4, 64, True, marks=pytest.mark.slow),
        pytest.param(3, 64, False, marks=pytest.mark.slow),
    ],
)
def test_round_trip(
    bits: int,
    group_size: int,
    desc_act: bool,
    merged_dir: Path,
    dataset_dir: Path,
    tmp_path: Path,
) -> None:
    target = tmp_path / "gptq"
    config = QuantizeConfig(
        num_calibration_rows=8,
        group_size=group_size,
        num_check_tokens=4,
        desc_act=desc_act,
        # Of a random model few bits leave little.
        min_top1_agreement={"gptq-4bit": 0, "gptq-3bit": 0},
    )
    record = run(
        config,
        format=f"gptq-{bits}bit",
        merged_dir=str(merged_dir),
        dataset_dir=str(dataset_dir),
        quantized_dir=str(target),
    )
    own, merged = (json.loads((path / "config.json").read_text()) for path in (target, merged_dir))
    settings = own.pop("quantization_config")
    assert own == merged, "the model's settings as the merged model has them"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (target / name).read_bytes() == (merged_dir / name).read_bytes()
    assert (settings["bits"], settings["group_size"]) == (bits, group_size)
    # What vLLM reads of it: the layout, and which kernels fit.
    assert (settings["quant_method"], settings["checkpoint_format"]) == ("gptq", "gptq")
    assert (settings["sym"], settings["desc_act"], settings["lm_head"]) == (True, desc_act, False)
    for path in target.glob("*.json"):
        assert str(tmp_path.parent) not in path.read_text()
        assert '"offload_to_disk_path"' not in path.read_text()
    assert record.group_size == group_size
    assert record.vllm_has_kernel == (bits != 3)
    assert ("vLLM has no kernel for 3 bits in groups of 64" in record.notes) == (bits == 3)
    assert QuantizedModel.read(target).reference
    assert record.tokens_per_second > 0 and record.num_threads >= 1
    if bits == 8:  # with fewer a random model's argmax is another token
        assert record.generated == record.reference
    assert_layout(merged_dir, target, bits, group_size, desc_act)


def assert_layout(
    merged_dir: Path, target: Path, bits: int, group_size: int, desc_act: bool
) -> None:
    """Hold the tensors against GPTQ's layout, as other readers of the format unpack it.

    q is packed along the inputs and z along the outputs, a stream of `bits` bits from the lowest
    on; W = s (q - z - 1), with s and z of the input's group.
    """
    original = load_file(merged_dir / "model.safetensors")
    found = {}
    for path in target.glob("*.safetensors"):
        found |= load_file(path)
    modules = [name.removesuffix(".qweight") for name in found if name.endswith(".qweight")]
    assert len(modules) == 14
    errors = []
    for module in modules:
        weight_OI = original[f"{module}.weight"].float().numpy()
        num_out, num_in = weight_OI.shape
        packed, zeros = found[f"{module}.qweight"], found[f"{module}.qzeros"]
        scales, groups = found[f"{module}.scales"], found[f"{module}.g_idx"]
        assert packed.shape == (num_in * bits // 32, num_out)
        assert zeros.shape == (num_in // group_size, num_out * bits // 32)
        assert scales.shape == (num_in // group_size, num_out) and groups.shape == (num_in,)
        assert (packed.dtype, zeros.dtype, groups.dtype) == (torch.int32,) * 3
        if not desc_act:
            assert groups.tolist() == [index // group_size for index in range(num_in)]
        q_IO = unpack(packed.numpy().T, bits).T
        z_GO = unpack(zeros.numpy(), bits) + 1
        s_GO, group = scales.float().numpy(), groups.numpy()
        unpacked_IO = s_GO[group] * (q_IO - z_GO[group])
        errors.append(numpy.linalg.norm(unpacked_IO.T - weight_OI) / numpy.linalg.norm(weight_OI))
    # Rounding to 2^bits values over some 6 standard deviations.
    assert max(errors) < {8: 0.015, 4: 0.25, 3: 0.5}[bits]


def unpack(words: numpy.ndarray, bits: int) -> numpy.ndarray:
    """Return the numbers in rows of 32-bit words."""
    stream = numpy.unpackbits(
        numpy.ascontiguousarray(words).view(numpy.uint8), axis=1, bitorder="little"
    )
    digits = stream.reshape(len(words), -1, bits).astype(numpy.int64)
    return (digits << numpy.arange(bits)).sum(-1)
