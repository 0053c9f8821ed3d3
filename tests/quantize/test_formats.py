"""A format or a kind of export that is entered in one place only is found here."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from tuneline import images
from tuneline.artifacts import QuantizedModel
from tuneline.kinds import EXPORT_KINDS
from tuneline.quantize import QuantizeConfig, component, formats
from tuneline.quantize.run import EXPORTERS
from tuneline.steps import STEPS

ROOM = Path(formats.__file__).parent
REPOSITORY = Path(__file__).parents[2]


def test_every_kind_of_export_is_everywhere() -> None:
    kinds = set(EXPORT_KINDS)
    assert {format.kind for format in formats.FORMATS.values()} == kinds
    assert set(EXPORTERS) == kinds
    assert set(get_args(QuantizedModel.model_fields["kind"].annotation)) == kinds
    assert {path.parent.name for path in ROOM.glob("*/export.py")} == kinds
    named = {name.removeprefix("quantize_") for name in vars(component) if "quantize_" in name}
    assert named == kinds
    for kind in kinds:
        image_set = STEPS[f"quantize-{kind}"].image
        assert images.of_set(image_set) in vars(images).values()
        assert (REPOSITORY / "images" / image_set).is_dir()
        default = QuantizeConfig.model_fields[kind].default
        assert set(default) <= set(formats.names(kind))
        assert bool(default) == (kind in ("gguf", "gptq"))


@pytest.mark.parametrize("name", formats.FORMATS)
def test_every_format_has_what_its_kind_needs(name: str) -> None:
    format = formats.FORMATS[name]
    assert 0 < format.bound.max_mean_kl and 0 < format.bound.min_top1_agreement < 1
    assert (format.bits is not None) == (format.kind != "gguf")
    assert 1 < format.bits_per_weight <= 16
    if format.bits is not None:
        assert format.bits < format.bits_per_weight
        assert not format.repacked
        assert name == (f"gptq-{format.bits}bit" if format.kind == "gptq" else format.kind)
        assert format.importance == "unused"
    # A recipe can name it, and its editor completes it.
    schema = QuantizeConfig.model_json_schema()["properties"][format.kind]
    assert name in schema["items"]["enum"]
    settings = {"gguf": [], "gptq": [], "num_importance_rows": 1, format.kind: [name]}
    assert getattr(QuantizeConfig.parse(settings), format.kind) == (name,)
    assert QuantizeConfig.parse({"max_mean_kl": {name: 1.0}}).max_mean_kl == {name: 1.0}


def test_an_entry_cannot_leave_out_its_size_or_its_memory() -> None:
    fields = {field.name: field for field in dataclasses.fields(formats.Format)}
    for name in ("bits_per_weight", "repacked"):
        assert fields[name].default is dataclasses.MISSING
    repacked = {name for name, format in formats.FORMATS.items() if format.repacked}
    assert repacked == {"q4_k_m", "q4_k_s", "q4_1", "q4_0", "iq4_nl", "q2_k", "q2_k_s"}


def test_formats_that_need_a_matrix() -> None:
    needing = {name for name, format in formats.FORMATS.items() if format.importance == "required"}
    assert needing == {name for name in formats.FORMATS if name[:3] in ("iq1", "iq2", "iq3")} | {
        "q2_k_s"
    }
    unused = {
        name for name in formats.names("gguf") if formats.FORMATS[name].importance == "unused"
    }
    assert unused == {"f16", "bf16", "q8_0"}


def test_a_parent_that_only_waits_does_without_torch() -> None:
    program = (
        "import sys; import tuneline.quantize.run, tuneline.quantize.gguf.importance\n"
        "print(sorted({'torch', 'transformers', 'llama_cpp', 'gptqmodel'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
