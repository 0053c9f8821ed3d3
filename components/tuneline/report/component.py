"""The KFP component of the step.

The lists have defaults, so they stand last: a recipe without such exports leaves them out.
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
):
    """Write the run's page and summary; `recipe` is a Recipe as JSON."""
    from tuneline.recipe import Recipe
    from tuneline.report.run import run
    from tuneline.runtime.step import step

    with step("report"):
        run(
            Recipe.parse(recipe),
            base_model_dir=base_model.path,
            dataset_dir=dataset.path,
            adapter_dir=adapter.path,
            merged_dir=merged.path,
            base_scores_dir=base_scores.path,
            tuned_scores_dir=tuned_scores.path,
            decision_dir=decision.path,
            page_path=page.path,
            summary_dir=summary.path,
            gguf_dirs=[model.path for model in gguf or []],
            gptq_dirs=[model.path for model in gptq or []],
        )
