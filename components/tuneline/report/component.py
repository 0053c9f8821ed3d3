# mypy: allow-untyped-decorators
"""The report step as a KFP component.

KFP has no list that holds the exports of several loops, so there is an input per kind of export.
The inputs have defaults, because a recipe may ask for no export of a kind.
"""

from typing import List

from kfp import dsl

from tuneline import images


@dsl.component(base_image=images.LIGHT, install_kfp_package=False)
def report(
    recipe: str,
    base_model: dsl.Input[dsl.Model],
    dataset: dsl.Input[dsl.Dataset],
    adapter: dsl.Input[dsl.Model],
    merged: dsl.Input[dsl.Model],
    base_scores: dsl.Input[dsl.Artifact],
    tuned_scores: dsl.Input[dsl.Artifact],
    decision: dsl.Input[dsl.Artifact],
    page: dsl.Output[dsl.HTML],
    summary: dsl.Output[dsl.Artifact],
    gguf: dsl.Input[List[dsl.Model]] = None,
    gptq: dsl.Input[List[dsl.Model]] = None,
) -> None:
    """Write the page and the summary of a run.

    Args:
        recipe: The whole recipe as JSON.
        base_model: The base model.
        dataset: The prepared dataset.
        adapter: The LoRA adapter.
        merged: The merged model.
        base_scores: Scores of the base model.
        tuned_scores: Scores of the tuned model.
        decision: The verdict of the gate.
        page: The HTML page.
        summary: Verdict, comparisons and exports as JSON.
        gguf: The GGUF exports.
        gptq: The GPTQ exports.
    """
    from tuneline.artifacts import RunHeader
    from tuneline.report.run import run
    from tuneline.runtime.step import step

    with step("report"):
        run(
            RunHeader.parse(recipe),
            base_model_dir=base_model.path,
            dataset_dir=dataset.path,
            adapter_dir=adapter.path,
            merged_dir=merged.path,
            base_scores_dir=base_scores.path,
            tuned_scores_dir=tuned_scores.path,
            decision_dir=decision.path,
            exports_dirs=[export.path for export in [*(gguf or []), *(gptq or [])]],
            page_path=page.path,
            summary_dir=summary.path,
        )
