"""An export that is far from the merged model, compared with the distance of the tuning."""

from pathlib import Path

from small_records import new_export, new_merge

from tuneline.artifacts import MergeProof, QuantizedModel, RunHeader
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
