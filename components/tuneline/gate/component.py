# mypy: allow-untyped-decorators
"""The gate step as a KFP component.

KFP has no list that holds the exports of several loops, so there is an input per kind of export.
The inputs have defaults, because a recipe may ask for no export of a kind. They are the exports'
records, because KFP downloads every input in full.
"""

from typing import List

from kfp import dsl

from tuneline import images


@dsl.component(base_image=images.LIGHT, install_kfp_package=False)
def gate(
    config: str,
    base_scores: dsl.Input[dsl.Artifact],
    tuned_scores: dsl.Input[dsl.Artifact],
    merged: dsl.Input[dsl.Artifact],
    earlier: dsl.Input[dsl.Artifact],
    decision: dsl.Output[dsl.Artifact],
    summary: dsl.Output[dsl.Markdown],
    gguf: dsl.Input[List[dsl.Artifact]] = None,
    gptq: dsl.Input[List[dsl.Artifact]] = None,
    awq: dsl.Input[List[dsl.Artifact]] = None,
    fp8: dsl.Input[List[dsl.Artifact]] = None,
) -> str:
    """Compare the tuned with the base model, and each export with the tuned model.

    Args:
        config: The `gate` section of the recipe as JSON.
        base_scores: Scores of the base model.
        tuned_scores: Scores of the tuned model.
        merged: Record of the merged model.
        earlier: What earlier runs measured.
        gguf: Records of the GGUF exports.
        gptq: Records of the GPTQ exports.
        awq: Records of the AWQ exports.
        fp8: Records of the FP8 exports.

    Returns:
        decision: The verdicts on the model and on each export, with reasons and comparisons.
        summary: The same as Markdown.
        Output: "promote" or "hold".
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
            merged_dir=merged.path,
            exports_dirs=[export.path for kind in (gguf, gptq, awq, fp8) for export in kind or []],
            earlier_path=earlier.path,
            summary_path=summary.path,
        )
        held = ", ".join(record.held_exports())
        set_metadata(
            decision, verdict=record.verdict, reason=record.reason, held_exports=held or "none"
        )
    return record.verdict
