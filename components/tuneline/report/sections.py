"""The sections of a run's page."""

import os
from html import escape

import yaml

from tuneline.artifacts import PREFERENCE_METHODS, MergeProof, QuantizedModel, TaskComparison
from tuneline.html.flow import Status
from tuneline.html.page import (
    Cell,
    IntervalRow,
    badge,
    banner,
    bar_chart,
    details,
    facts,
    histogram,
    interval_chart,
    line_chart,
    line_diagram,
    paragraph,
    section,
    table,
    tiles,
)
from tuneline.html.units import count, duration, number, parameters, percent, signed, size
from tuneline.report.line import stages
from tuneline.report.records import Line
from tuneline.runtime.redaction import redacted
from tuneline.training_figures import training_figures

TRAINED_WITH = ("torch", "transformers", "peft", "trl")
OUTCOME_TONES = {"better": "good", "worse": "bad", "undecided": "plain"}


def verdict(line: Line) -> str:
    """Return the banner with the verdict."""
    decision = line.decision
    if decision.verdict == "promote":
        after = f"It will be published to {line.target}."
        return banner("Promote", decision.reason, "good", small=after)
    after = f"Nothing is published to {line.target}."
    return banner("Hold", decision.reason, "warn", small=after)


def other_values(line: Line) -> str:
    """Return the banner of a run with other values than its recipe's; empty for other runs."""
    if not line.recipe.differences:
        return ""
    return banner("Other values than the recipe's", line.recipe.remark, "warn")


def headline(line: Line) -> str:
    """Return the row of tiles with the most important figures."""
    shown: list[tuple[str, str, str]] = []
    comparisons = line.decision.comparisons
    first = next(
        (c for c in comparisons if c.role == "target"), comparisons[0] if comparisons else None
    )
    if first:
        shown.append(
            (
                f"{first.task}, {first.metric}",
                f"{number(first.base, 3)} \u2192 {number(first.tuned, 3)}",
                f"{signed(first.difference, 3)} {_interval(first)}",
            )
        )
    training = line.training
    if training.final_eval_loss is not None:
        before = number(training.first_eval_loss, 3)
        shown.append(
            (
                "Evaluation loss",
                f"{before} \u2192 {number(training.final_eval_loss, 3)}",
                f"{count(training.num_steps)} steps, {count(training.num_tokens)} tokens",
            )
        )
    else:
        shown.append(("Training loss", number(training.final_loss, 3), "last logged"))
    if line.exports:
        smallest = min(line.exports, key=lambda export: export.num_bytes)
        plural = "s" if len(line.exports) > 1 else ""
        shown.append(
            (
                f"Smallest of {len(line.exports)} export{plural}",
                size(smallest.num_bytes),
                f"{smallest.format}; merged model {size(line.merge.num_bytes)}",
            )
        )
    times = _times(line)
    longest = max(times, key=lambda name: times[name])
    shown.append(
        (
            "Time of all steps",
            duration(sum(times.values())),
            f"longest: {longest}, {duration(times[longest])}",
        )
    )
    return tiles(shown)


def picture(line: Line) -> str:
    """Return the diagram of the steps."""
    training, promoted = line.training, line.decision.verdict == "promote"
    details = {
        "fetch": parameters(line.origin.num_parameters),
        "prepare": f"{count(line.dataset.num_train_rows)} rows",
        "train": f"{count(training.num_steps)} steps",
        "merge": f"{count(line.merge.num_merged_modules)} modules",
        "evaluate base": _tasks(len(line.base_scores.tasks)),
        "evaluate tuned": _tasks(len(line.tuned_scores.tasks)),
        "gate": line.decision.verdict,
        "quantize": f"{len(line.exports)} export{'s' if len(line.exports) > 1 else ''}",
    }
    known: dict[str, tuple[Status, float | None, str]] = {
        name: ("finished", seconds, details[name]) for name, seconds in _times(line).items()
    }
    known["publish"] = ("next", None, "") if promoted else ("skipped", None, "on hold")
    if not line.exports:
        known["quantize"] = ("skipped", None, "no exports")
    return section(
        "Steps of the run",
        line_diagram(stages(known)),
        note="A step whose result came from the cache shows the time of the run that made it.",
    )


def scores(line: Line) -> str:
    """Return the comparison of base and tuned model, with one chart per metric."""
    comparisons = line.decision.comparisons
    by_metric: dict[str, list[TaskComparison]] = {}
    for comparison in comparisons:
        by_metric.setdefault(comparison.metric, []).append(comparison)
    charts = [
        interval_chart(
            [
                IntervalRow(c.task, c.base, c.tuned, *c.interval, difference=c.difference)
                for c in group
            ],
            x_label=metric if group[0].higher_is_better else f"{metric} (lower is better)",
        )
        for metric, group in by_metric.items()
    ]
    rows = [
        [
            Cell(f"{escape(c.task)} {badge(c.role)}"),
            c.metric,
            number(c.base),
            number(c.tuned),
            signed(c.difference),
            _interval(c),
            _samples(c),
            badge(c.outcome, OUTCOME_TONES[c.outcome]),
        ]
        for c in comparisons
    ]
    headers = ["task", "metric", "base", "tuned"]
    headers += ["improvement", "95 % interval", "samples", "outcome"]
    return section(
        "Scores before and after training",
        f'<div class="pair">{"".join(charts)}</div>' if len(charts) > 1 else "".join(charts),
        table(headers, rows, numeric=range(2, 7)),
        paragraph(
            "Both models answered the same held-out samples. A positive improvement is better in "
            "every metric. A target has to improve: its whole interval has to lie above "
            "gate.min_gain. Guards must not get worse: the loss that gate.max_regression names has "
            "to be excluded with a confidence of 95 %. The tasks of a group are its members, which "
            "decide nothing by themselves. A control shows whether the tuned model still reads its "
            "prompts. Samples with the same question or passage count as one.",
            muted=True,
        ),
    )


def generations(line: Line) -> str:
    """Return the answers of base and tuned model next to the reference answers."""
    tuned = {row["prompt"]: row["text"] for row in line.tuned_generations}
    rows = []
    exact = [0, 0]
    for row in line.base_generations:
        if row["prompt"] not in tuned:
            continue
        answer, pair = row["answer"], (row["text"], tuned[row["prompt"]])
        cells = []
        for index, text in enumerate(pair):
            same = text.strip() == answer.strip()
            exact[index] += same
            mark = f"\n{badge('equals the reference', 'good')}" if same else ""
            shown = escape(text.strip()) or '<span class="muted">(empty)</span>'
            cells.append(Cell(f"{shown}{mark}"))
        rows.append([row.get("question") or row["prompt"], answer, *cells])
    if not rows:
        return ""
    return section(
        "Answers before and after training",
        table(["question", "reference", "base", "tuned"], rows, prose=True),
        note=f"Greedy generation. Equal to the reference: base {exact[0]} of {len(rows)}, "
        f"tuned {exact[1]} of {len(rows)}.",
    )


def training(line: Line) -> str:
    """Return the loss curve and the figures of the training."""
    summary = line.training
    series: dict[str, list[tuple[float, float]]] = {
        "training": [(p.step, p.loss) for p in summary.history if p.loss is not None],
        "evaluation": [(p.step, p.eval_loss) for p in summary.history if p.eval_loss is not None],
    }
    pairs = [(figure.label, figure.text) for figure in training_figures(summary)]
    chart = line_chart(
        {name: points for name, points in series.items() if points},
        x_label="step",
        y_label="loss" if summary.method in PREFERENCE_METHODS else "loss (nats per token)",
    )
    return section("Training", f'<div class="pair">{chart}{facts(pairs)}</div>')


def data(line: Line) -> str:
    """Return the figures of the dataset."""
    dataset = line.dataset
    lengths = dataset.lengths
    num_rows = sum(
        (
            dataset.num_train_rows,
            dataset.num_eval_rows,
            dataset.num_heldout_rows,
            dataset.num_rejected_rows,
            dataset.num_overlong_rows,
        )
    )
    rejected = dataset.num_rejected_rows
    pairs = [
        ("Source", redacted(dataset.source)),
        ("Format and template", f"{dataset.format}, {dataset.template}"),
        (
            "Rows: training, evaluation, held-out",
            f"{count(dataset.num_train_rows)}, {count(dataset.num_eval_rows)}, "
            f"{count(dataset.num_heldout_rows)}",
        ),
        ("Rejected rows", f"{count(rejected)} ({percent(rejected / num_rows if num_rows else 0)})"),
        ("Rows left out as too long", count(dataset.num_overlong_rows)),
        ("Rows left out as like one held out or evaluated", count(dataset.num_leaking_rows)),
        *(
            (
                f"Questions of {name} in the training rows",
                f"{count(found.num_found)} of {count(found.num_questions)}",
            )
            for name, found in dataset.contamination.items()
        ),
        ("Tokens", count(dataset.num_tokens)),
        (
            "Tokens that count in the loss",
            f"{count(dataset.num_loss_tokens)} ({dataset.loss_on})",
        ),
        (
            "Row length: mean, median, p95, p99",
            ", ".join(
                number(value, 3)
                for value in (lengths.mean, lengths.median, lengths.p95, lengths.p99)
            ),
        ),
        (
            "max_seq_length",
            f"{count(dataset.max_seq_length)} "
            f"(recommended {count(dataset.recommended_max_seq_length)})",
        ),
        ("Tokens removed by truncation", percent(dataset.truncated_token_share)),
    ]
    chart = histogram(
        lengths.histogram,
        x_label="tokens per row",
        y_label="rows",
        markers={
            "median": lengths.median,
            "p99": lengths.p99,
            "max_seq_length": dataset.max_seq_length,
        },
    )
    return section("Data", f'<div class="pair">{chart}{facts(pairs)}</div>')


def exports(line: Line) -> str:
    """Return the checks of the merged model, and the sizes and checks of its exports."""
    merge = line.merge
    proof = facts(
        [
            ("Adapter added to", f"{merge.base} base weights, saved in {merge.dtype}"),
            *([("Held-out loss by base weights", _losses(merge))] if merge.base_losses else []),
            (
                "Mean KL per token",
                f"{number(merge.mean_kl)} nats (at most {number(merge.max_mean_kl)})",
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
            "; ".join(export.notes) or "-",
        ]
        for export in line.exports
    ]
    headers = ["format", "size", "bits per weight", "check", "tensor types", "time"]
    return section(
        "Merge and exports",
        pair,
        table(headers, rows, numeric=[1, 2, 5]),
        details(
            "Answers of the exports, and notes",
            table(
                ["format", "answer of the export", "answer of the merged model", "notes"],
                answers,
                prose=True,
            ),
        ),
    )


def provenance(line: Line) -> str:
    """Return the hashes, the versions and the recipe."""
    origin, dataset, adapter = line.origin, line.dataset, line.training
    rows = [
        [
            "base model",
            redacted(origin.source),
            _code(origin.sha256),
            origin.licence or "not stated",
        ],
        [
            "dataset",
            redacted(dataset.source),
            _code(dataset.sha256),
            dataset.licence or "not stated",
        ],
        [
            "adapter",
            "trained on the two above",
            Cell(
                f"{_same('base model', adapter.base_sha256, origin.sha256)} "
                f"{_same('dataset', adapter.dataset_sha256, dataset.sha256)}"
            ),
            "",
        ],
    ]
    tuneline = sorted({record.tuneline for record in (origin, dataset, adapter, line.decision)})
    left = [
        ("Architecture of the base model", origin.architecture),
        ("Revision of the base model", origin.revision or "none: a local source"),
        ("Weights of the base model", origin.stored_as or "not quantised"),
        ("Base model fetched", origin.created_at),
    ]
    versions = [f"{name} {adapter.environment.get(name, '-')}" for name in TRAINED_WITH]
    right = [
        ("tuneline", ", ".join(tuneline)),
        ("Trained with", ", ".join(versions)),
        ("Kernels", adapter.environment.get("kernels", "-")),
        ("Seed of the training", str(adapter.settings.get("seed", "-"))),
        ("Evaluated with", line.tuned_scores.harness),
        ("Time of the decision", line.decision.created_at),
    ]
    text = yaml.safe_dump(line.recipe.values, sort_keys=False, allow_unicode=True, width=100)
    return section(
        "Provenance",
        table(["", "source", "SHA-256", "licence"], rows),
        f'<div class="pair">{facts(left)}{facts(right)}</div>',
        details("The recipe, with all defaults", f"<pre>{escape(text)}</pre>"),
    )


def _times(line: Line) -> dict[str, float]:
    times = {
        "fetch": line.origin.seconds,
        "prepare": line.dataset.seconds,
        "evaluate base": line.base_scores.seconds,
        "train": line.training.seconds,
        "merge": line.merge.seconds,
        "evaluate tuned": line.tuned_scores.seconds,
        "gate": line.decision.seconds,
    }
    if line.exports:
        times["quantize"] = sum(export.seconds for export in line.exports)
    return times


def _losses(merge: MergeProof) -> str:
    losses = [f"{name} {number(loss)}" for name, loss in merge.base_losses.items()]
    return ", ".join([*losses, f"merged {number(merge.merged_loss)}"])


def _samples(comparison: TaskComparison) -> str:
    if comparison.num_clusters == comparison.num_samples:
        return count(comparison.num_samples)
    return f"{count(comparison.num_samples)} ({count(comparison.num_clusters)} questions)"


def _interval(comparison: TaskComparison) -> str:
    low, high = comparison.interval
    return f"[{signed(low, 3)}, {signed(high, 3)}]"


def _tasks(num_tasks: int) -> str:
    return "1 task" if num_tasks == 1 else f"{num_tasks} tasks"


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


def _code(text: str) -> Cell:
    return Cell(f'<code title="{escape(text)}">{escape(text[:16])}</code>')


def _same(name: str, recorded: str, actual: str) -> Cell:
    if recorded == actual:
        return badge(f"{name}: same hash", "good")
    return badge(f"{name}: another hash, {recorded[:12]}", "bad")
