# mypy: allow-untyped-decorators
"""The diagnose step as a KFP component: the exit handler."""

from kfp import dsl

from tuneline import images


@dsl.component(base_image=images.LIGHT, install_kfp_package=False)
def diagnose(status: dsl.PipelineTaskFinalStatus, summary: dsl.Output[dsl.Markdown]) -> None:
    """Explain why a run failed and what to change, or list what it did.

    Args:
        status: Final status of the run; KFP fills it in.
        summary: The explanation as Markdown.
    """
    from tuneline.diagnose.run import run
    from tuneline.runtime.step import step

    with step("diagnose"):
        run(
            state=status.state,
            task=status.pipeline_task_name,
            message=status.error_message,
            summary_path=summary.path,
        )
