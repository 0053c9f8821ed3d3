"""The publish step as a KFP component."""

from typing import List

from kfp import dsl

from tuneline import images


@dsl.component(base_image=images.PUBLISH, install_kfp_package=False)
def publish(
    target: str,
    config: str,
    recipe: str,
    base_model: dsl.Input[dsl.Model],
    dataset: dsl.Input[dsl.Dataset],
    adapter: dsl.Input[dsl.Model],
    merged: dsl.Input[dsl.Model],
    decision: dsl.Input[dsl.Artifact],
    published: dsl.Output[dsl.Artifact],
    gguf: dsl.Input[List[dsl.Model]] = None,
    gptq: dsl.Input[List[dsl.Model]] = None,
):
    """Publish what the gate promoted to the Hub, or to a directory (`dir:PATH`)."""
    from tuneline.publish import PublishConfig
    from tuneline.publish.run import run
    from tuneline.runtime.step import step

    with step("publish"):
        record = run(
            PublishConfig.parse(config),
            target=target,
            recipe=recipe,
            base_model_dir=base_model.path,
            dataset_dir=dataset.path,
            adapter_dir=adapter.path,
            merged_dir=merged.path,
            gguf_dirs=[item.path for item in gguf or []],
            gptq_dirs=[item.path for item in gptq or []],
            decision_dir=decision.path,
            published_dir=published.path,
        )
        published.metadata.update(record.metadata())
