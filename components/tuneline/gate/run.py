"""Compare the scores of two models sample by sample, and decide whether to publish."""

import logging
import time
from pathlib import Path

from tuneline.artifacts import Decision, MergeProof, new_directory
from tuneline.gate.compare import compare
from tuneline.gate.config import GateConfig
from tuneline.gate.earlier import evaluated, read_earlier, remarks
from tuneline.gate.exports import read_exports, verdict_on
from tuneline.gate.reading import read
from tuneline.html.markdown import escape_markdown
from tuneline.records.earlier import EVALUATED_FILE
from tuneline.runtime.termination import Ending, leave
from tuneline.seals import seal_page
from tuneline.verdict import decide

logger = logging.getLogger(__name__)


def run(
    config: GateConfig,
    *,
    base_scores_dir: str | Path,
    tuned_scores_dir: str | Path,
    decision_dir: str | Path,
    merged_dir: str | Path | None = None,
    exports_dirs: list[str] = [],  # noqa: B006, never changed
    earlier_path: str | Path | None = None,
    summary_path: str | Path | None = None,
) -> Decision:
    """Decide whether the tuned model may be published, by the rule of `tuneline.verdict`.

    Args:
        config: the `gate` section of the recipe.
        base_scores_dir: directory of the `scores` artifact of the base model.
        tuned_scores_dir: directory of the `scores` artifact of the tuned model, on the same tasks
            and samples.
        decision_dir: new directory for decision.json.
        merged_dir: directory of the `merged` artifact, or a copy of its record, for a remark on its
            loss. Default: no remark.
        exports_dirs: directories of the `quantized` artifacts, or copies of their records, one per
            format. Default: there are no exports.
        earlier_path: what earlier runs measured, from the step look-up-published. Default: nothing
            is known of earlier runs.
        summary_path: Markdown file with the decision, for KFP's UI. Default: none.

    Raises:
        TaskError: the models were not evaluated on the same tasks and samples, scores are
            incomplete, or an export was made from another model.
        WorldError: a file of the scores was changed after it was made.
    """
    started = time.monotonic()
    base, tuned = read(base_scores_dir, tuned_scores_dir)
    exports = read_exports(exports_dirs, tuned)
    of_merge = MergeProof.read(merged_dir).unexplained_loss() if merged_dir is not None else ""
    earlier = read_earlier(earlier_path)
    with new_directory(decision_dir) as directory:
        compared = compare(base, tuned, earlier, config)
        measured = evaluated(compared.targets, earlier, model=tuned.record.content_sha256())
        Path(directory, EVALUATED_FILE).write_text(measured.model_dump_json(), encoding="utf-8")
        verdict, reason = decide(compared.comparisons, config)
        decision = Decision(
            verdict=verdict,
            reason=reason,
            remarks=[
                *([of_merge] if of_merge else []),
                *remarks(compared.comparisons, earlier, measured.attempts),
            ],
            comparisons=compared.comparisons,
            exports=[verdict_on(export, config) for export in exports],
            seconds=round(time.monotonic() - started, 3),
        )
        decision.write(directory, config, parents=(base.record, tuned.record))
        if summary_path is not None:
            Path(summary_path).write_text(seal_page(_markdown(decision)), encoding="utf-8")
    logger.info("%s: %s", verdict, reason)
    for remark in decision.remarks:
        logger.warning("%s", remark)
    held = decision.held_exports()
    for format, why in held.items():
        logger.warning("the export %s is held: %s", format, why)
    without = f"; held exports: {', '.join(held)}" if held else ""
    leave(Ending(step="gate", result=verdict, text=f"{reason}{without}"))
    return decision


def _markdown(decision: Decision) -> str:
    rows = [
        f"| {escape_markdown(item.title)} | {item.role} | {escape_markdown(item.metric)} | "
        f"{item.base:.4f} | {item.tuned:.4f} | {item.difference:+.4f} | "
        f"[{item.interval[0]:+.4f}, {item.interval[1]:+.4f}] | "
        f"{item.lower:+.4f} | {item.num_samples} | {item.outcome} |"
        for item in decision.comparisons
    ]
    exports = [
        f"| {item.format} | {item.verdict} | {escape_markdown(item.reason)} |"
        for item in decision.exports
    ]
    if exports:
        exports[:0] = ["", "| export | verdict | reason |", "|---|---|---|"]
    return "\n".join(
        [
            f"**{decision.verdict}**: {escape_markdown(decision.reason)}",
            "",
            *(line for remark in decision.remarks for line in (escape_markdown(remark), "")),
            "| task | role | metric | base | tuned | improvement | 95 % interval "
            "| above, with 95 % confidence | samples | outcome |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *rows,
            *exports,
            "",
        ]
    )
