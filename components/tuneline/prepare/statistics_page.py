"""The HTML page of a prepared dataset: counts, lengths, samples and rejected rows."""

import itertools
from html import escape
from typing import Any

from tuneline.artifacts import DatasetManifest
from tuneline.html import page, units
from tuneline.prepare.left_out import sentences
from tuneline.prepare.tokens.tokenise import TokenRow

_NUM_REJECTED_SHOWN = 50
_NUM_UNUSED_NAMED = 20
_NUM_SAMPLE_TOKENS = 600
_WRAPPED = "white-space: pre-wrap; overflow-wrap: anywhere"
# The background is translucent, so that the text is readable on light and on dark pages.
_MARK = '<mark style="background: rgba(64, 160, 96, 0.3); color: inherit">'


def render(
    manifest: DatasetManifest,
    tokenizer: Any,
    samples: list[TokenRow],
    rejected: list[dict[str, Any]],
) -> str:
    """Return the page as HTML.

    Args:
        manifest: the dataset's record.
        tokenizer: tokenizer that decodes the samples.
        samples: a few examples of train.parquet.
        rejected: the rows of rejected.jsonl.
    """
    return page.render_page(
        "Dataset",
        [
            _lengths(manifest),
            *([_contamination(manifest)] if manifest.contamination else []),
            _samples(manifest, tokenizer, samples),
            *_sources(manifest),
            *_unused(manifest),
            _rejected(manifest, rejected),
        ],
        subtitle=f"{manifest.source} - {manifest.format}, method {manifest.method}, "
        f"template {manifest.template}",
        lead=page.tiles(_counts(manifest)),
    )


def _counts(manifest: DatasetManifest) -> list[tuple[str, str, str]]:
    learnt = manifest.num_loss_tokens / max(1, manifest.num_tokens)
    return [
        (
            "training",
            units.count(manifest.num_train_rows),
            f"rows, plus {units.count(manifest.num_eval_rows)} for the evaluation loss",
        ),
        *_labels(manifest),
        ("held out", units.count(manifest.num_heldout_rows), "rows for the benchmark"),
        ("rejected", units.count(manifest.num_rejected_rows), "rows that cannot be used"),
        (
            "tokens",
            units.count(manifest.num_tokens),
            f"the loss counts {learnt:.0%}",
        ),
        ("max_seq_length", units.count(manifest.max_seq_length), _lost(manifest)),
    ]


def _labels(manifest: DatasetManifest) -> list[tuple[str, str, str]]:
    if manifest.num_desirable_rows is None:
        return []
    num_others = units.count(manifest.num_train_rows - manifest.num_desirable_rows)
    return [
        (
            "desirable",
            units.count(manifest.num_desirable_rows),
            f"training answers, and {num_others} undesirable",
        )
    ]


def _lost(manifest: DatasetManifest) -> str:
    return f"truncation loses {manifest.truncated_token_share:.2%} of the tokens"


def _lengths(manifest: DatasetManifest) -> str:
    lengths = manifest.lengths
    chart = page.histogram(
        lengths.histogram,
        x_label="tokens",
        y_label="rows",
        markers={
            "p95": lengths.p95,
            "p99": lengths.p99,
            "max_seq_length": manifest.max_seq_length,
        },
    )
    table = page.table(
        ["mean", "median", "p95", "p99", "longest", "recommended max_seq_length"],
        [
            [
                f"{lengths.mean:,.1f}",
                f"{lengths.median:,.1f}",
                f"{lengths.p95:,.1f}",
                f"{lengths.p99:,.1f}",
                units.count(lengths.max),
                units.count(manifest.recommended_max_seq_length),
            ]
        ],
        numeric=range(6),
    )
    notes = []
    if manifest.num_general_rows:
        notes.append(f"{manifest.num_general_rows} training rows come from the general dataset.")
    if manifest.num_unfolded_conversations:
        notes.append(
            f"{manifest.num_unfolded_conversations} conversations became "
            f"{manifest.num_unfolded_rows} rows, because the chat template writes their earlier "
            "answers differently from the last one."
        )
    if manifest.template_date:
        notes.append(f"The chat template shows the date {manifest.template_date}.")
    notes += sentences(manifest)
    return page.section(
        "Row lengths", chart, table, *map(page.paragraph, notes), note="before truncation"
    )


def _contamination(manifest: DatasetManifest) -> str:
    table = page.table(
        ["benchmark", "questions", "long enough to search for", "in the training rows", "share"],
        [
            [
                name,
                units.count(counts.num_questions),
                units.count(counts.num_checked),
                units.count(counts.num_found),
                f"{counts.share:.1%}",
            ]
            for name, counts in manifest.contamination.items()
        ],
        numeric=range(1, 5),
    )
    found = [
        page.paragraph(f"{name}: {example}")
        for name, counts in manifest.contamination.items()
        for example in counts.examples
    ]
    return page.section(
        "Benchmark questions in the training rows",
        table,
        *found,
        note="at least half of a question's 13-grams of words",
    )


def _samples(manifest: DatasetManifest, tokenizer: Any, samples: list[TokenRow]) -> str:
    shown = [f'<pre style="{_WRAPPED}">{_marked(tokenizer, row)}</pre>' for row in samples]
    return page.section(
        "Samples", *shown, note="exactly as the model reads them; the loss counts the marked text"
    )


def _marked(tokenizer: Any, row: TokenRow) -> str:
    if row.answers is not None:
        prompt, *answers = (
            escape(tokenizer.decode(ids[:_NUM_SAMPLE_TOKENS]))
            for ids in (row.input_ids, *row.answers)
        )
        names = ["chosen", "rejected"]
        if row.is_desirable is not None:
            names = ["desirable answer" if row.is_desirable else "undesirable answer"]
        return prompt + "".join(
            f"\n\n<b>{name}</b>\n{_MARK}{answer}</mark>"
            for name, answer in zip(names, answers, strict=True)
        )
    parts = []
    tokens = list(zip(row.input_ids, row.loss_mask, strict=True))[:_NUM_SAMPLE_TOKENS]
    for is_learnt, run in itertools.groupby(tokens, key=lambda token: token[1]):
        text = escape(tokenizer.decode([token for token, _ in run]))
        parts.append(f"{_MARK}{text}</mark>" if is_learnt else text)
    more = len(row.input_ids) - len(tokens)
    return "".join(parts) + (f" ... and {more} more tokens" if more else "")


def describe_unused(unused: dict[str, int]) -> str:
    """Return the unused columns and keys with their numbers of rows, in words."""
    named = [
        f"{name} in {units.count(num_rows)} {'row' if num_rows == 1 else 'rows'}"
        for name, num_rows in list(unused.items())[:_NUM_UNUSED_NAMED]
    ]
    more = len(unused) - len(named)
    return ", ".join(named) + (f", and {more} more" if more else "")


def _unused(manifest: DatasetManifest) -> list[str]:
    if not manifest.unused:
        return []
    cells = [[name, units.count(num_rows)] for name, num_rows in manifest.unused.items()]
    table = page.table(["column or key", "rows with a value"], cells, numeric=[1])
    return [page.section("Columns and keys that are not used", table)]


def _sources(manifest: DatasetManifest) -> list[str]:
    remarks = [page.paragraph(remark) for entry in manifest.sources for remark in entry.remarks]
    if len(manifest.sources) <= 1:
        return [page.section("How the source was read", *remarks)] if remarks else []
    table = page.table(
        ["source", "format", "weight", "rows", "rejected", "in training", "repeated", "licence"],
        [
            [
                entry.source,
                entry.format,
                f"{entry.weight:g}",
                units.count(entry.num_rows),
                units.count(entry.num_rejected_rows),
                units.count(entry.num_train_rows),
                units.count(entry.num_repeated_rows),
                entry.licence or "not stated",
            ]
            for entry in manifest.sources
        ],
        numeric=range(2, 7),
    )
    return [page.section("Sources", table, *remarks)]


def _rejected(manifest: DatasetManifest, rejected: list[dict[str, Any]]) -> str:
    if not rejected:
        return page.section("Rejected rows", page.paragraph("None: every row is usable."))
    table = page.table(
        ["file", "line", "reason", "row"],
        [
            [entry["source"], str(entry["line"]), entry["reason"], entry["row"][:120]]
            for entry in rejected[:_NUM_REJECTED_SHOWN]
        ],
        numeric=[1],
    )
    more = len(rejected) - _NUM_REJECTED_SHOWN
    note = f"the first {_NUM_REJECTED_SHOWN} of {len(rejected)}" if more > 0 else ""
    return page.section("Rejected rows", table, note=note)
