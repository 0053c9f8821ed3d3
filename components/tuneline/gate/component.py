# mypy: allow-untyped-decorators
"""The gate step as a KFP component."""

from kfp import dsl

from tuneline import images


@dsl.component(base_image=images.LIGHT, install_kfp_package=False)
def gate(
    config: str,
    base_scores: dsl.Input[dsl.Artifact],
    tuned_scores: dsl.Input[dsl.Artifact],
    earlier: dsl.Input[dsl.Artifact],
    decision: dsl.Output[dsl.Artifact],
    summary: dsl.Output[dsl.Markdown],
) -> str:
    """Compare the tuned with the base model on the same samples.

    Args:
        config: The `gate` section of the recipe as JSON.
        base_scores: Scores of the base model.
        tuned_scores: Scores of the tuned model.
        earlier: What earlier runs measured.
        decision: The verdict, its reason and the comparisons.
        summary: The same as Markdown.

    Returns:
        "promote" or "hold".
    """
    from tuneline.gate import GateConfig
    from tuneline.gate.run import run
    from tuneline.runtime.step import set_metadata, step

    with step("gate"):
        record = run(
            GateConfig.parse(config),
            base_scores_dir=base_scores.path,
            tuned_scores_dir=tuned_scores.path,
            decision_dir=decision.path,
            earlier_path=earlier.path,
            summary_path=summary.path,
        )
        set_metadata(decision, verdict=record.verdict, reason=record.reason)
    return record.verdict
