"""The sections with the training and its data."""

from tuneline.html.page import facts, histogram, line_chart, section
from tuneline.html.units import count, number, percent
from tuneline.report.records import Line
from tuneline.runtime.redaction import redacted
from tuneline.training_figures import loss_unit, training_figures


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
        y_label=f"loss ({unit})" if (unit := loss_unit(summary)) else "loss",
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
