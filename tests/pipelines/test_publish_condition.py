"""publish runs on the verdict of the gate, and gets every export: with KFP's local runner.

The same shape, with constant formats, ran on KFP 2.17.0 with one and with three exports, for both
verdicts and from the cache: publish got all of them, and was not started on hold.
"""

from pathlib import Path
from typing import NamedTuple

import pytest
from kfp import dsl, local

from tuneline.pipelines.finetune import publish_only_if_promoted


@dsl.component(base_image="python:3.12", install_kfp_package=False)
def quantize(format: str, quantized: dsl.Output[dsl.Model]) -> None:
    from pathlib import Path

    Path(quantized.path).write_text(format)


@dsl.component(base_image="python:3.12", install_kfp_package=False)
def gate(verdict: str) -> str:
    return verdict


@dsl.component(base_image="python:3.12", install_kfp_package=False)
def publish(out: str, gguf: dsl.Input[list[dsl.Model]]) -> None:
    from pathlib import Path

    Path(out).write_text(" ".join(Path(export.path).read_text() for export in gguf))


@dsl.component(base_image="python:3.12", install_kfp_package=False)
def diagnose(status: dsl.PipelineTaskFinalStatus) -> None:
    assert status.state == "SUCCEEDED"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("verdict", ["promote", "hold"])
@pytest.mark.parametrize("formats", [["f16", "q8_0", "q4_k_m"], ["f16"]])
def test_publish_waits_for_promote_and_gets_all(
    verdict: str, formats: list[str], tmp_path: Path
) -> None:
    class Exports(NamedTuple):
        exports: list[dsl.Model]

    @dsl.pipeline(name="export-gguf")
    def export_gguf(formats: list[str]) -> Exports:
        with dsl.ParallelFor(formats) as item:
            made = quantize(format=item)
        return Exports(exports=dsl.Collected(made.outputs["quantized"]))

    @dsl.pipeline(name="line")
    def line(verdict: str, out: str, gguf_formats: list[str]) -> None:
        with dsl.ExitHandler(diagnose(), name="line"):
            exported = export_gguf(formats=gguf_formats)
            gated = gate(verdict=verdict)
            publish(out=out, gguf=exported.outputs["exports"]).after(gated)

    publish_only_if_promoted(line)
    local.init(
        local.SubprocessRunner(use_venv=False),
        pipeline_root=str(tmp_path / "root"),
        raise_on_error=True,
    )
    out = tmp_path / "published"
    line(verdict=verdict, out=str(out), gguf_formats=formats)
    assert out.is_file() == (verdict == "promote")
    if verdict == "promote":
        assert out.read_text().split() == formats
