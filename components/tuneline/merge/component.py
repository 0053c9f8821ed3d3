# mypy: allow-untyped-decorators
"""The KFP component of the step."""

from kfp import dsl

from tuneline import images


@dsl.component(base_image=images.TRAIN, install_kfp_package=False)
def merge(
    config: str,
    base_model: dsl.Input[dsl.Model],
    adapter: dsl.Input[dsl.Model],
    dataset: dsl.Input[dsl.Dataset],
    merged: dsl.Output[dsl.Model],
    record: dsl.Output[dsl.Artifact],
) -> None:
    """Merge the adapter into the base model, and prove the result.

    Args:
        config: The `merge` section of the recipe as JSON.
        base_model: The base model that the adapter was trained on.
        adapter: The adapter.
        dataset: The prepared dataset; its held-out rows are the proof's prompts.

    Returns:
        merged: The merged model.
        record: Copy of the record of merged.
    """
    from tuneline.merge import MergeConfig
    from tuneline.merge.run import run
    from tuneline.runtime.step import set_metadata, step

    with step("merge"):
        proof = run(
            MergeConfig.parse(config),
            base_model_dir=base_model.path,
            adapter_dir=adapter.path,
            dataset_dir=dataset.path,
            merged_dir=merged.path,
        )
        proof.copy_to(record.path, directory=merged.path)
        set_metadata(
            merged,
            base=proof.base,
            merged_loss=proof.merged_loss,
            dtype=proof.dtype,
            num_bytes=proof.num_bytes,
            mean_kl=proof.mean_kl,
            top1_agreement=proof.top1_agreement,
            max_logit_difference=proof.max_logit_difference,
        )
