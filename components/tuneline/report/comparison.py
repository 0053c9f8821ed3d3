"""The card that compares the exports, and says which is for what."""

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
from tuneline.html.units import number, share, size
from tuneline.report.records import Line

NEAR_TOP1 = 0.95
NEAR_PERPLEXITY = 1.02
"""Times the merged model's: what counts as answering as the merged model does."""
USABLE_PERPLEXITY = 1.1
"""Times the merged model's: what counts as usable where memory is short."""

CLOSEST = "closest to the merged model"
EVERYDAY = "llama.cpp and Ollama"
LEAST = "least memory"
FASTEST = "fastest on a CPU"
ON_GPU = "vLLM and transformers on a GPU"

# A file may be exactly the merged model, and a logarithmic axis has no zero.
SMALLEST_KL = 1e-7


def card(line: Line) -> str:
    """Return the card, or "" where no export was measured."""
    measured = [export for export in line.exports if export.mean_kl is not None]
    if not measured:
        return ""
    uses = recommend(measured)
    chart = scatter_chart(
        [
            ScatterPoint(
                export.format, export.kind.upper(), export.num_bytes, max(_kl(export), SMALLEST_KL)
            )
            for export in measured
        ],
        x_label="size of the weights",
        y_label="mean KL from the merged model, nats a token",
        x_text=size,
    )
    scored = next((export for export in measured if export.benchmark), None)
    advice = [(use, export.format) for export in measured for use in uses[export.format]]
    rows = [
        [
            export.format,
            size(export.num_bytes),
            f"{export.bits_per_weight:.2f}",
            number(export.mean_kl, 3),
            "-" if export.top1_agreement is None else share(export.top1_agreement),
            number(export.perplexity),
            number(export.tokens_per_second, 3),
            *([_score(export)] if scored else []),
            _for(export, uses[export.format], measured),
        ]
        for export in measured
    ]
    first = measured[0]
    # Short: with a score the table has nine columns, and a narrow window has to show the last.
    headers = ["format", "size", "bits", "mean KL", "top-1", "perplexity", "tok/s"]
    headers += [*(["score"] if scored else []), "for"]
    right = f'<div><h3 class="flush">Take</h3>{facts(_grouped(advice))}</div>'
    return section(
        "Which export for what",
        f'<div class="pair">{chart}{right}</div>',
        table(headers, rows, numeric=range(1, len(headers) - 1)),
        paragraph(
            f"Against the merged model (perplexity {number(first.reference_perplexity)}) on "
            f"{first.num_prompts} rows that training did not see; bits are those a weight takes. "
            f"{EVERYDAY}: the smallest GGUF "
            f"file with the merged model's first choice at {share(NEAR_TOP1)} of positions and "
            f"perplexity within {share(NEAR_PERPLEXITY - 1)}, else the closest quantised one; "
            f"{LEAST}: the smallest within {share(USABLE_PERPLEXITY - 1)}.{_speed(measured)}"
            f"{_benchmark(scored)}",
            muted=True,
        ),
        note="lower left is better: smaller and closer",
    )


def recommend(exports: list[QuantizedModel]) -> dict[str, list[str]]:
    """Return what each format is recommended for, by format; exports without a KL have no place.

    Rules over what was measured, so that a format which fell back to wider types, or suffers more
    in this model than in most, is judged by itself and not by its name.
    """
    uses: dict[str, list[str]] = {export.format: [] for export in exports}
    measured = [export for export in exports if export.mean_kl is not None]
    if not measured:
        return uses
    closest = min(measured, key=_kl)
    uses[closest.format].append(CLOSEST)
    gguf = [export for export in measured if export.kind == "gguf"]
    quantised = [export for export in gguf if export.format not in ("f16", "bf16")]
    if quantised:
        near = [e for e in quantised if _is_near(e)]
        everyday = min(near, key=_bytes) if near else min(quantised, key=_kl)
        uses[everyday.format].append(EVERYDAY)
        usable = [e for e in quantised if _perplexity_ratio(e) <= USABLE_PERPLEXITY]
        if usable:
            uses[min(usable, key=_bytes).format].append(LEAST)
    timed = [export for export in gguf if export.tokens_per_second]
    if timed:
        fastest = max(timed, key=lambda export: export.tokens_per_second or 0.0)
        uses[fastest.format].append(FASTEST)
    gptq = [e for e in measured if e.kind == "gptq" and e.vllm_has_kernel is not False]
    if gptq:
        near = [e for e in gptq if _is_near(e)]
        uses[(min(near, key=_bytes) if near else min(gptq, key=_kl)).format].append(ON_GPU)
    return uses


def worse_than(export: QuantizedModel, others: list[QuantizedModel]) -> str:
    """Name an export of the same kind that is both smaller and closer, or return ""."""
    for other in others:
        better = _bytes(other) < _bytes(export) and _kl(other) < _kl(export)
        if other.kind == export.kind and better:
            return f"{other.format} is smaller and closer"
    return ""


def _for(export: QuantizedModel, uses: list[str], others: list[QuantizedModel]) -> Cell:
    # Badges: they do not wrap inside, which would make a narrow table's rows tall.
    beaten = worse_than(export, others)
    labels = [badge(use, "good") for use in uses]
    if beaten and not uses:
        labels = [badge(beaten, "warn")]
    return Cell(" ".join(labels) or "-")


def _speed(measured: list[QuantizedModel]) -> str:
    threads = max((export.num_threads or 0 for export in measured), default=0)
    if not threads:
        return ""
    on = f"{threads} CPU thread{'s' if threads != 1 else ''}"
    return f" Tok/s: tokens a second on {on}, one sequence."


def _score(export: QuantizedModel) -> str:
    if export.benchmark_score is None:
        return "-"
    low, high = wilson_interval(export.benchmark_score, export.num_benchmark_rows)
    return f"{share(export.benchmark_score)} ({100 * low:.0f}-{100 * high:.0f})"


def _benchmark(export: QuantizedModel | None) -> str:
    if export is None or export.reference_benchmark_score is None:
        return ""
    return (
        f" Score: {export.benchmark} on {export.num_benchmark_rows} held-out rows, with the 95 % "
        f"interval of so few; the merged model has {share(export.reference_benchmark_score)} on "
        "the same: it tells a format that broke, not which of two is better."
    )


def wilson_interval(score: float, num_rows: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share of right answers, which holds near 0 and 1 too."""
    z = 1.96
    spread = z * math.sqrt(score * (1 - score) / num_rows + (z / num_rows) ** 2 / 4)
    scale = 1 + z**2 / num_rows
    middle = score + z**2 / num_rows / 2
    return (middle - spread) / scale, (middle + spread) / scale


def _grouped(advice: list[tuple[str, str]]) -> list[tuple[str, str]]:
    order = [CLOSEST, EVERYDAY, LEAST, FASTEST, ON_GPU]
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
