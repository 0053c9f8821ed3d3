"""The section that compares the exports and recommends an export for each use."""

import math

from tuneline.artifacts import QuantizedModel
from tuneline.html.page import (
    Cell,
    ScatterPoint,
    badge,
    facts,
    paragraph,
    scatter_chart,
    section,
    table,
)
from tuneline.html.units import number, percent, size
from tuneline.kinds import EXPORT_KINDS, KINDS
from tuneline.report.records import Line

NEAR_TOP1 = 0.95
NEAR_PERPLEXITY = 1.02
"""An export counts as near to the merged model if its top-1 agreement is at least NEAR_TOP1 and its
perplexity is at most NEAR_PERPLEXITY times the merged model's."""
USABLE_PERPLEXITY = 1.1
"""Multiple of the merged model's perplexity up to which an export is usable if memory is short."""

CLOSEST = "closest to the merged model"
LEAST = "least memory"
FASTEST = "fastest on a CPU"

_PROGRAMS = tuple(dict.fromkeys(KINDS[kind].runs_with for kind in EXPORT_KINDS))
"""Programs that run exports. Kinds that the same programs run compete for a recommendation."""

UNQUANTISED = ("f16", "bf16")

# Smallest KL divergence drawn: an export may equal the merged model (KL 0), but a logarithmic axis
# has no zero.
SMALLEST_KL = 1e-7


def card(line: Line) -> str:
    """Return the section, or "" if no export was measured."""
    measured = [export for export in line.exports if export.mean_kl is not None]
    if not measured:
        return ""
    kept = line.decision.kept(measured)
    uses = recommend(kept)
    chart = scatter_chart(
        [
            ScatterPoint(
                export.format, export.kind.upper(), export.num_bytes, max(_kl(export), SMALLEST_KL)
            )
            for export in measured
        ],
        x_label="size of the weights",
        y_label="mean KL from the merged model (nats per token)",
        x_text=size,
    )
    scored = next((export for export in measured if export.benchmark), None)
    advice = [(use, format) for format, for_it in uses.items() for use in for_it]
    rows = [
        [
            export.format,
            size(export.num_bytes),
            f"{export.bits_per_weight:.2f}",
            number(export.mean_kl, 3),
            "-" if export.top1_agreement is None else percent(export.top1_agreement),
            number(export.perplexity),
            number(export.tokens_per_second, 3),
            *([_score(export)] if scored else []),
            _for(export, uses[export.format], kept)
            if export.format in uses
            else badge("held", "warn"),
        ]
        for export in measured
    ]
    first = measured[0]
    # Headers are short because there can be nine columns, all of which have to fit into a narrow
    # window.
    headers = ["format", "size", "bits", "mean KL", "top-1", "perplexity", "tok/s"]
    headers += [*(["score"] if scored else []), "best for"]
    right = f'<div><h3 class="flush">Recommended</h3>{facts(_grouped(advice))}</div>'
    return section(
        "Which export to use",
        f'<div class="pair">{chart}{right}</div>',
        table(headers, rows, numeric=range(1, len(headers) - 1)),
        paragraph(
            "Every export is compared with the merged model (perplexity "
            f"{number(first.reference_perplexity)}) on {first.num_prompts} rows that were not used "
            "for training. Bits: bits per weight. Top-1: fraction of positions with the same most "
            f"likely token.{_speed(measured)}{_benchmark(scored)}",
            muted=True,
        ),
        paragraph(
            "How the recommendations are made: for each program, the smallest export with a top-1 "
            f"of at least {percent(NEAR_TOP1)} and a perplexity at most "
            f"{percent(NEAR_PERPLEXITY - 1)} above the merged model's; if there is none, the one "
            "with the lowest mean KL. For the least memory, the smallest with a perplexity at most "
            f"{percent(USABLE_PERPLEXITY - 1)} above. Exports that the gate holds are not "
            "recommended.",
            muted=True,
        ),
        note="Lower left is better: smaller, and closer to the merged model.",
    )


def recommend(exports: list[QuantizedModel]) -> dict[str, list[str]]:
    """Return the uses for which each format is recommended, by format.

    Exports without a measured KL divergence are not recommended. The rules use only values measured
    on this run's exports, so they hold for an export that fell back to wider types, and for a model
    that loses more than others in a format.
    """
    uses: dict[str, list[str]] = {export.format: [] for export in exports}
    measured = [export for export in exports if export.mean_kl is not None]
    if not measured:
        return uses
    closest = min(measured, key=_kl)
    uses[closest.format].append(CLOSEST)
    quantised = [
        export
        for export in measured
        if export.format not in UNQUANTISED and export.vllm_has_kernel is not False
    ]
    for programs in _PROGRAMS:
        fitting = [export for export in quantised if KINDS[export.kind].runs_with == programs]
        if fitting:
            near = [export for export in fitting if _is_near(export)]
            best = min(near, key=_bytes) if near else min(fitting, key=_kl)
            uses[best.format].append(programs)
    usable = [
        export
        for export in quantised
        if KINDS[export.kind].runs_on_cpu and _perplexity_ratio(export) <= USABLE_PERPLEXITY
    ]
    if usable:
        uses[min(usable, key=_bytes).format].append(LEAST)
    timed = [
        export for export in measured if KINDS[export.kind].runs_on_cpu and export.tokens_per_second
    ]
    if timed:
        fastest = max(timed, key=lambda export: export.tokens_per_second or 0.0)
        uses[fastest.format].append(FASTEST)
    return uses


def worse_than(export: QuantizedModel, others: list[QuantizedModel]) -> str:
    """Return a phrase naming an export of the same kind that is better in both respects, or "".

    Better means a smaller size and a lower mean KL divergence from the merged model.
    """
    for other in others:
        better = _bytes(other) < _bytes(export) and _kl(other) < _kl(export)
        if other.kind == export.kind and better:
            return f"{other.format} is smaller and closer"
    return ""


def _for(export: QuantizedModel, uses: list[str], others: list[QuantizedModel]) -> Cell:
    # Badges do not wrap, so the rows of a narrow table stay low.
    better = worse_than(export, others)
    labels = [badge(use, "good") for use in uses]
    if better and not uses:
        labels = [badge(better, "warn")]
    return Cell(" ".join(labels) or "-")


def _speed(measured: list[QuantizedModel]) -> str:
    threads = max((export.num_threads or 0 for export in measured), default=0)
    if not threads:
        return ""
    plural = "s" if threads != 1 else ""
    return f" Tok/s: tokens per second of one sequence on {threads} CPU thread{plural}."


def _score(export: QuantizedModel) -> str:
    if export.benchmark_score is None:
        return "-"
    low, high = wilson_interval(export.benchmark_score, export.num_benchmark_rows)
    return f"{percent(export.benchmark_score)} ({100 * low:.0f}-{100 * high:.0f})"


def _benchmark(export: QuantizedModel | None) -> str:
    if export is None or export.reference_benchmark_score is None:
        return ""
    return (
        f" Score: {export.benchmark} on {export.num_benchmark_rows} held-out rows, with its 95 % "
        f"interval; the merged model has {percent(export.reference_benchmark_score)} on the same "
        "rows. The gate holds an export that lost too much. The scores do not show which of two "
        "formats is better."
    )


def wilson_interval(score: float, num_rows: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a fraction of correct answers; it holds near 0 and 1 too."""
    z = 1.96
    spread = z * math.sqrt(score * (1 - score) / num_rows + (z / num_rows) ** 2 / 4)
    scale = 1 + z**2 / num_rows
    middle = score + z**2 / num_rows / 2
    return (middle - spread) / scale, (middle + spread) / scale


def _grouped(advice: list[tuple[str, str]]) -> list[tuple[str, str]]:
    order = [CLOSEST, *_PROGRAMS, LEAST, FASTEST]
    return sorted(advice, key=lambda pair: order.index(pair[0]))


def _is_near(export: QuantizedModel) -> bool:
    same = (export.top1_agreement or 0.0) >= NEAR_TOP1
    return same and _perplexity_ratio(export) <= NEAR_PERPLEXITY


def _perplexity_ratio(export: QuantizedModel) -> float:
    if not export.perplexity or not export.reference_perplexity:
        return float("inf")
    return export.perplexity / export.reference_perplexity


def _kl(export: QuantizedModel) -> float:
    assert export.mean_kl is not None
    return export.mean_kl


def _bytes(export: QuantizedModel) -> int:
    return export.num_bytes
