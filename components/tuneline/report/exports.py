"""The section with the checks of the merged model and of its exports."""

import os

from tuneline.artifacts import ExportVerdict, MergeProof, QuantizedModel
from tuneline.html.page import Cell, badge, bar_chart, details, facts, paragraph, section, table
from tuneline.html.units import count, duration, number, percent, size
from tuneline.report.records import Line


def exports(line: Line) -> str:
    """Return the checks of the merged model, and the sizes and checks of its exports."""
    merge = line.merge
    proof = facts(
        [
            ("Adapter added to", f"{merge.base} base weights, saved in {merge.dtype}"),
            *([("Held-out loss by base weights", _losses(merge))] if merge.base_losses else []),
            *([("Loss on evaluation rows", _eval_losses(merge))] if merge.eval_loss else []),
            (
                "Mean KL per token",
                f"{number(merge.mean_kl)} nats (at most {number(merge.max_mean_kl)})",
            ),
            *(
                [("Mean KL of the base model", f"{number(merge.tuning_kl)} nats")]
                if merge.tuning_kl is not None
                else []
            ),
            ("Largest logit difference", number(merge.max_logit_difference)),
            ("Same most likely token", percent(merge.top1_agreement)),
            ("Prompts compared", count(merge.num_prompts)),
            ("Modules merged", count(merge.num_merged_modules)),
            ("Weight files", f"{count(merge.num_shards)}, {size(merge.num_bytes)}"),
        ]
    )
    sizes = [(f"merged, {merge.dtype}", float(merge.num_bytes))]
    sizes += [(export.format, float(export.num_bytes)) for export in line.exports]
    chart = bar_chart(
        sizes, x_label="Size of the weights", text=size, muted=[f"merged, {merge.dtype}"]
    )
    proven = f'<div><h3 class="flush">Merged model and adapter compared</h3>{proof}</div>'
    pair = f'<div class="pair">{chart}{proven}</div>'
    if not line.exports:
        return section("Merge and exports", pair, paragraph("The recipe asks for no exports."))
    rows = [
        [
            export.format,
            size(export.num_bytes),
            f"{export.bits_per_weight:.2f}",
            _check(export),
            _types(export),
            duration(export.seconds),
        ]
        for export in line.exports
    ]
    answers = [
        [
            export.format,
            export.generated,
            "-" if export.reference is None else export.reference,
            "; ".join(filter(None, [*export.notes, export.loss_of_tuning(merge)])) or "-",
        ]
        for export in line.exports
    ]
    lost = [text for export in line.exports if (text := export.loss_of_tuning(merge))]
    headers = ["format", "size", "bits per weight", "check", "tensor types", "time"]
    decided = [[item.format, _verdict(item), item.reason] for item in line.decision.exports]
    return section(
        "Merge and exports",
        pair,
        *([paragraph(". ".join(lost) + ".")] if lost else []),
        table(headers, rows, numeric=[1, 2, 5]),
        *(
            [table(["format", "verdict", "answers compared with the merged model"], decided)]
            if decided
            else []
        ),
        details(
            "Answers of the exports, and notes",
            table(
                ["format", "answer of the export", "answer of the merged model", "notes"],
                answers,
                prose=True,
            ),
        ),
    )


def _verdict(item: ExportVerdict) -> Cell:
    if item.is_held:
        return badge("held: not published", "warn")
    return badge("not scored", "plain") if item.comparison is None else badge("promote", "good")


def _losses(merge: MergeProof) -> str:
    losses = [f"{name} {number(loss)}" for name, loss in merge.base_losses.items()]
    return ", ".join([*losses, f"merged {number(merge.merged_loss)}"])


def _eval_losses(merge: MergeProof) -> str:
    return f"trained {number(merge.trained_eval_loss)}, merged {number(merge.eval_loss)}"


def _check(export: QuantizedModel) -> Cell:
    if not export.generated.strip():
        return badge("loads, but the answer is empty", "bad")
    if export.reference is None:
        return badge("loads and answers", "good")
    if export.generated == export.reference:
        return badge("same answer as the merged model", "good")
    common = os.path.commonprefix([export.generated, export.reference])
    return badge(f"differs from the merged model after {len(common)} characters", "plain")


def _types(export: QuantizedModel) -> str:
    if export.group_size is not None:
        return f"groups of {export.group_size}"
    ordered = sorted(export.tensor_types.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {num}" for name, num in ordered)
