"""The KFP component of the plan."""

from kfp import dsl

from tuneline import images


@dsl.component(base_image=images.LIGHT, install_kfp_package=False)
def plan(
    recipe: str,
    base_model: str,
    train_config: str,
    prepare_config: str,
    quantize_config: str,
    summary: dsl.Output[dsl.Markdown],
):
    """Say no before a GPU is asked for, where the run cannot work as it stands."""
    from tuneline.pipelines.plan.run import run
    from tuneline.runtime.step import step

    with step("plan"):
        run(
            recipe,
            base_model=base_model,
            train=train_config,
            prepare=prepare_config,
            quantize=quantize_config,
            summary_path=summary.path,
        )
