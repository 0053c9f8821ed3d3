# mypy: allow-untyped-decorators
"""The KFP component of the step: the exit handler."""

from kfp import dsl

from tuneline import images


@dsl.component(base_image=images.LIGHT, install_kfp_package=False)
def diagnose(status: dsl.PipelineTaskFinalStatus, summary: dsl.Output[dsl.Markdown]) -> None:
    """Say what failed and what to change, or what was done."""
    from tuneline.diagnose.run import run
    from tuneline.runtime.step import step

    with step("diagnose"):
        run(
            state=status.state,
            task=status.pipeline_task_name,
            message=status.error_message,
            summary_path=summary.path,
        )
