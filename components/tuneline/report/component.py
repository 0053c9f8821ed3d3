# mypy: allow-untyped-decorators
"""The report step as a KFP component.

The inputs are records without the models that they describe, because KFP downloads every input in
full, and all models of a run do not fit into a small pod.

KFP has no list that holds the exports of several loops, so there is an input per kind of export.
The inputs have defaults, because a recipe may ask for no export of a kind.
"""

from typing import List

from kfp import dsl

from tuneline import images


@dsl.component(base_image=images.LIGHT, install_kfp_package=False)
def report(
    recipe: str,
    base_model: dsl.Input[dsl.Artifact],
    dataset: dsl.Input[dsl.Artifact],
    adapter: dsl.Input[dsl.Artifact],
    merged: dsl.Input[dsl.Artifact],
    base_scores: dsl.Input[dsl.Artifact],
    tuned_scores: dsl.Input[dsl.Artifact],
    decision: dsl.Input[dsl.Artifact],
    page: dsl.Output[dsl.HTML],
    summary: dsl.Output[dsl.Artifact],
    gguf: dsl.Input[List[dsl.Artifact]] = None,
    gptq: dsl.Input[List[dsl.Artifact]] = None,
    awq: dsl.Input[List[dsl.Artifact]] = None,
    fp8: dsl.Input[List[dsl.Artifact]] = None,
    target: str = "",
    publish_config: str = "",
    run_name: str = "",
    quantize_config: str = "",
) -> None:
    """Write the page and the summary of a run.

    Args:
        recipe: The whole recipe as JSON.
        base_model: Record of the base model.
        dataset: Record of the prepared dataset.
        adapter: Record of the LoRA adapter.
        merged: Record of the merged model.
        base_scores: Scores of the base model.
        tuned_scores: Scores of the tuned model.
        decision: The verdict of the gate.
        gguf: Records of the GGUF exports.
        gptq: Records of the GPTQ exports.
        awq: Records of the AWQ exports.
        fp8: Records of the FP8 exports.
        target: Where the run publishes. Default: `publish_to` of the recipe.
        publish_config: The `publish` section of the run as JSON. Default: that of the recipe.
        run_name: Name of the run. Default: that of the recipe.
        quantize_config: The `quantize` section of the run as JSON. Default: that of the recipe.

    Returns:
        page: The HTML page.
        summary: Verdict, comparisons and exports as JSON.
    """
    from tuneline.artifacts import RunHeader
    from tuneline.report.run import run
    from tuneline.runtime.parameter_text import decode_text
    from tuneline.runtime.step import step

    with step("report"):
        run(
            RunHeader.parse(recipe),
            run_name=run_name,
            target=decode_text(target) or None,
            publish_config=publish_config or None,
            quantize_config=quantize_config or None,
            base_model_dir=base_model.path,
            dataset_dir=dataset.path,
            adapter_dir=adapter.path,
            merged_dir=merged.path,
            base_scores_dir=base_scores.path,
            tuned_scores_dir=tuned_scores.path,
            decision_dir=decision.path,
            exports_dirs=[export.path for kind in (gguf, gptq, awq, fp8) for export in kind or []],
            page_path=page.path,
            summary_dir=summary.path,
        )
