# mypy: allow-untyped-decorators
"""The diagnose step as a KFP component: the exit handler."""

from kfp import dsl

from tuneline import images


@dsl.component(base_image=images.LIGHT, install_kfp_package=False)
def diagnose(
    status: dsl.PipelineTaskFinalStatus,
    summary: dsl.Output[dsl.Markdown],
    notify: str = "[]",
    run_name: str = "",
    recipe_name: str = "",
    target: str = "",
) -> None:
    """Explain why a run failed and what to change, or list what it did, and tell the webhooks.

    Args:
        status: Final status of the run; KFP fills it in.
        notify: The `notify` section of the recipe as JSON.
        run_name: Name of the run, for messages.
        recipe_name: Name of the recipe, for messages.
        target: Where the run publishes, for messages.

    Returns:
        summary: The explanation as Markdown.
    """
    import json

    from tuneline.diagnose.notification import About
    from tuneline.diagnose.run import run
    from tuneline.notify import NotifyConfig
    from tuneline.runtime.parameter_text import decode_text
    from tuneline.runtime.step import step

    with step("diagnose"):
        run(
            state=status.state,
            task=status.pipeline_task_name,
            message=status.error_message,
            summary_path=summary.path,
            about=About(
                webhooks=[NotifyConfig.model_validate(each) for each in json.loads(notify)],
                run_name=run_name,
                recipe_name=recipe_name,
                target=decode_text(target),
            ),
        )
