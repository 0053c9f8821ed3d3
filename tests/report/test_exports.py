"""Exports that are held, or far from the merged model compared with the distance of the tuning."""

from pathlib import Path

from small_records import new_comparison, new_export, new_merge

from tuneline.artifacts import (
    Decision,
    ExportVerdict,
    MergeProof,
    QuantizedModel,
    RunHeader,
    RunSummary,
)
from tuneline.recipe import Recipe
from tuneline.report.run import run


def test_the_distance_is_compared_with_that_of_the_tuning() -> None:
    export = new_export(format="q4_0", mean_kl=1.27)
    assert export.loss_of_tuning(new_merge(tuning_kl=2.0)).startswith(
        "q4_0 is 1.3 nats per token from the merged model, and the tuning moved the base model by 2"
    )
    assert export.loss_of_tuning(new_merge(tuning_kl=3.0)) == ""
    # What was not measured says nothing.
    assert export.loss_of_tuning(new_merge()) == ""
    assert new_export(mean_kl=None).loss_of_tuning(new_merge(tuning_kl=2.0)) == ""


def test_the_page_says_so(recipe: Recipe, run_dirs: dict) -> None:
    merged = Path(run_dirs["merged_dir"])
    MergeProof.read(merged).model_copy(update={"tuning_kl": 0.1}).write(merged)
    assert QuantizedModel.read(run_dirs["exports_dirs"][2]).mean_kl == 0.096
    run(RunHeader.parse(recipe.model_dump_json()), **run_dirs)
    page = Path(run_dirs["page_path"]).read_text()
    assert "q5_k_m is 0.096 nats per token from the merged model" in page
    assert "q8_0 is" not in page


def test_the_page_says_which_export_is_held_and_why(recipe: Recipe, run_dirs: dict) -> None:
    path = Path(run_dirs["decision_dir"])
    verdicts = [
        ExportVerdict(
            format="q8_0",
            verdict="promote",
            reason="lost nothing",
            comparison=new_comparison(role="export"),
            sealed="",
        ),
        ExportVerdict(format="q4_k_m", verdict="hold", reason="it lost <much>", sealed=""),
        ExportVerdict(format="gptq-4bit", verdict="promote", reason="not compared", sealed=""),
    ]
    Decision.read(path).model_copy(update={"exports": verdicts}).write(path)
    run(RunHeader.parse(recipe.model_dump_json()), **run_dirs)
    page = Path(run_dirs["page_path"]).read_text()
    assert "without the exports that are held: q4_k_m." in page
    advice = page.split("Which export to take")[1].split("</dd>")[0]
    assert "q8_0" in advice and "q4_k_m" not in advice
    section = page.split("Merge and exports")[1].split("Which export to use")[0]
    assert "held: not published" in section and "it lost &lt;much&gt;" in section
    assert ">not scored<" in section
    # q4_k_m is the smallest export, but it is held.
    assert "Smallest of 4 exports" in page and "q5_k_m; merged model" in page
    assert RunSummary.read(run_dirs["summary_dir"]).export_verdicts == verdicts
