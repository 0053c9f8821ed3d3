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
) -> None:
    """Fail before a GPU is requested if the run cannot work as configured.

    Args:
        recipe: The recipe that the pipeline was compiled from, as JSON.
        base_model: Base model of this run.
        train_config: TrainConfig of this run, as JSON.
        prepare_config: PrepareConfig of this run, as JSON.
        quantize_config: QuantizeConfig of this run, as JSON.
        summary: Markdown page with all checks.
    """
    from tuneline.pipelines.plan.run import run
    from tuneline.runtime.parameter_text import decode_text
    from tuneline.runtime.step import step

    with step("plan"):
        run(
            recipe,
            base_model=decode_text(base_model),
            train=train_config,
            prepare=prepare_config,
            quantize=quantize_config,
            summary_path=summary.path,
            store=summary.uri,
        )
