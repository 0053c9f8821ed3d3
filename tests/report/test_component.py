"""The component in a pipeline, with lists of exports, with one, and with none."""

import warnings
from pathlib import Path

import pytest
from kfp import dsl

from tuneline.quantize.config import QuantizeConfig
from tuneline.report.component import report


@pytest.fixture(scope="module")
def spec():
    return report.component_spec


def test_lists_may_be_left_out(spec) -> None:
    for name in ("gguf", "gptq"):
        declared = spec.inputs[name]
        assert declared.is_artifact_list and declared.optional
    assert not spec.inputs["merged"].optional


def test_it_runs_in_a_pipeline_without_gptq(run_dirs: dict, recipe, tmp_path: Path) -> None:
    from kfp import local

    gguf_only = recipe.model_copy(update={"quantize": QuantizeConfig(gptq=())})

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")

        @dsl.component(install_kfp_package=False)
        def pick(path: str, made: dsl.Output[dsl.Artifact]):
            import shutil

            shutil.copyfile(f"{path}/quantized.json", made.path)

    def imported(name: str):
        uri = run_dirs[name]
        return dsl.importer(artifact_uri=uri, artifact_class=dsl.Artifact, reimport=False).output

    @dsl.pipeline(name="exports")
    def exports() -> list[dsl.Artifact]:
        with dsl.ParallelFor(run_dirs["exports_dirs"][:4]) as path:
            picked = pick(path=path)
        return dsl.Collected(picked.outputs["made"])

    @dsl.pipeline(name="reported")
    def reported():
        report(
            recipe=gguf_only.model_dump_json(),
            base_model=imported("base_model_dir"),
            dataset=imported("dataset_dir"),
            adapter=imported("adapter_dir"),
            merged=imported("merged_dir"),
            base_scores=imported("base_scores_dir"),
            tuned_scores=imported("tuned_scores_dir"),
            decision=imported("decision_dir"),
            gguf=exports().output,
        )

    local.init(
        local.SubprocessRunner(use_venv=False),
        pipeline_root=str(tmp_path / "root"),
        raise_on_error=True,
    )
    reported()
    (page,) = (tmp_path / "root").glob("*/report/page")
    text = page.read_text(encoding="utf-8")
    assert "Smallest of 4 exports" in text and "gptq-4bit" not in text.split("<pre>")[0]
