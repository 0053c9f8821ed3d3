# mypy: allow-untyped-decorators
"""The KFP components of the step.

KFP has no list that holds the exports of several loops, so there is an input per kind of export.
The inputs have defaults, because a recipe may ask for no export of a kind.
"""

from typing import List

from kfp import dsl

from tuneline import images


@dsl.component(base_image=images.PUBLISH, install_kfp_package=False)
def look_up_published(
    target: str, config: str, recipe: str, earlier: dsl.Output[dsl.Artifact]
) -> None:
    """Look up the model published last and earlier runs, with which the gate compares.

    Args:
        target: Where the run publishes; several targets are a JSON list.
        config: The `publish` section of the recipe as JSON.
        recipe: The whole recipe as JSON.

    Returns:
        earlier: What earlier runs measured, as JSON.
    """
    from tuneline.artifacts import RunHeader
    from tuneline.publish import PublishConfig
    from tuneline.publish.earlier import look_up
    from tuneline.runtime.parameter_text import decode_text
    from tuneline.runtime.step import step

    with step("look-up-published"):
        look_up(
            PublishConfig.parse(config),
            target=decode_text(target),
            name=RunHeader.parse(recipe).name,
            earlier_path=earlier.path,
        )


@dsl.component(base_image=images.PUBLISH, install_kfp_package=False)
def publish(
    target: str,
    config: str,
    recipe: str,
    base_model: dsl.Input[dsl.Artifact],
    dataset: dsl.Input[dsl.Artifact],
    adapter: dsl.Input[dsl.Model],
    merged: dsl.Input[dsl.Model],
    decision: dsl.Input[dsl.Artifact],
    published: dsl.Output[dsl.Artifact],
    gguf: dsl.Input[List[dsl.Model]] = None,
    gptq: dsl.Input[List[dsl.Model]] = None,
    awq: dsl.Input[List[dsl.Model]] = None,
    fp8: dsl.Input[List[dsl.Model]] = None,
    run_id: str = "",
    quantize_config: str = "",
) -> None:
    """Publish a model that the gate promoted to its targets.

    Args:
        target: Where the run publishes; several targets are a JSON list.
        config: The `publish` section of the recipe as JSON.
        recipe: The whole recipe as JSON, for the model cards.
        base_model: Record of the base model.
        dataset: Record of the prepared dataset.
        adapter: The LoRA adapter.
        merged: The merged model.
        decision: The verdict of the gate.
        gguf: The GGUF exports.
        gptq: The GPTQ exports.
        awq: The AWQ exports.
        fp8: The FP8 exports.
        run_id: ID of the run, for tuneline.json and the model cards.
        quantize_config: The `quantize` section of the run as JSON. Default: that of the recipe.

    Returns:
        published: Record of the repositories, with their URLs and commits.
    """
    from tuneline.publish import PublishConfig
    from tuneline.publish.run import run
    from tuneline.runtime.parameter_text import decode_text
    from tuneline.runtime.step import set_metadata, step

    with step("publish"):
        record = run(
            PublishConfig.parse(config),
            target=decode_text(target),
            recipe=recipe,
            run_id=run_id,
            quantize_config=quantize_config,
            base_model_dir=base_model.path,
            dataset_dir=dataset.path,
            adapter_dir=adapter.path,
            merged_dir=merged.path,
            exports_dirs=[export.path for kind in (gguf, gptq, awq, fp8) for export in kind or []],
            decision_dir=decision.path,
            published_dir=published.path,
        )
        set_metadata(published, **record.metadata())
