"""The component in a pipeline, with lists of exports, with one, and with none."""

import warnings
from pathlib import Path

import pytest
from kfp import dsl

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

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")

        @dsl.component(install_kfp_package=False)
        def pick(path: str, made: dsl.Output[dsl.Model]):
            import shutil

            shutil.copytree(path, made.path)

    def imported(name: str, kind: type):
        return dsl.importer(artifact_uri=run_dirs[name], artifact_class=kind, reimport=False).output

    @dsl.pipeline(name="exports")
    def exports() -> list[dsl.Model]:
        with dsl.ParallelFor(run_dirs["exports_dirs"][:4]) as path:
            picked = pick(path=path)
        return dsl.Collected(picked.outputs["made"])

    @dsl.pipeline(name="reported")
    def reported():
        report(
            recipe=recipe.model_dump_json(),
            base_model=imported("base_model_dir", dsl.Model),
            dataset=imported("dataset_dir", dsl.Dataset),
            adapter=imported("adapter_dir", dsl.Model),
            merged=imported("merged_dir", dsl.Model),
            base_scores=imported("base_scores_dir", dsl.Artifact),
            tuned_scores=imported("tuned_scores_dir", dsl.Artifact),
            decision=imported("decision_dir", dsl.Artifact),
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
