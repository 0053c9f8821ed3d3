"""Which export is recommended for what, by hand-written measurements."""

import re
import types
from typing import Any

import pytest

from tuneline.artifacts import Decision, ExportVerdict, QuantizedModel
from tuneline.html.charts import ScatterPoint, scatter_chart
from tuneline.html.frame import NARROW, WIDTH
from tuneline.html.point_labels import place_names
from tuneline.kinds import KINDS
from tuneline.report import comparison

LLAMA_CPP, VLLM = KINDS["gguf"].runs_with, KINDS["gptq"].runs_with


def export(format: str, megabytes: int, kl: float | None, **values) -> QuantizedModel:
    return QuantizedModel(
        format=format,
        kind="gptq" if format.startswith("gptq") else "gguf",
        file=".",
        num_bytes=megabytes * 10**6,
        bits_per_weight=8.0,
        prompt="p",
        generated="g",
        mean_kl=kl,
        reference_perplexity=10.0,
        **values,
    )


F16 = export("f16", 271, 1e-6, top1_agreement=1.0, perplexity=10.0, tokens_per_second=40.0)
Q8 = export("q8_0", 145, 0.007, top1_agreement=0.98, perplexity=10.1, tokens_per_second=60.0)
Q6 = export("q6_k", 120, 0.017, top1_agreement=0.96, perplexity=10.15, tokens_per_second=55.0)
Q4 = export("q4_k_m", 100, 0.07, top1_agreement=0.92, perplexity=10.9, tokens_per_second=80.0)
Q3 = export("q3_k_m", 90, 0.3, top1_agreement=0.78, perplexity=14.0, tokens_per_second=70.0)
Q5_1 = export("q5_1", 125, 0.12, top1_agreement=0.87, perplexity=11.5, tokens_per_second=65.0)
GPTQ = export("gptq-4bit", 115, 0.4, top1_agreement=0.8, perplexity=12.0)
GPTQ8 = export("gptq-8bit", 150, 0.006, top1_agreement=0.97, perplexity=10.1)


def test_each_use_has_the_format_that_the_numbers_say() -> None:
    uses = comparison.recommend([F16, Q8, Q6, Q4, Q3, Q5_1, GPTQ, GPTQ8])
    assert uses == {
        "f16": [comparison.CLOSEST],
        "q8_0": [],
        "q6_k": [LLAMA_CPP],
        "q4_k_m": [comparison.LEAST, comparison.FASTEST],
        "q3_k_m": [],
        "q5_1": [],
        "gptq-4bit": [],
        "gptq-8bit": [VLLM],
    }


def test_kinds_that_the_same_programs_run_compete() -> None:
    awq = export("awq", 114, 0.29, top1_agreement=0.85, perplexity=11.0).model_copy(
        update={"kind": "awq"}
    )
    fp8 = export("fp8", 163, 0.04, top1_agreement=0.96, perplexity=10.1).model_copy(
        update={"kind": "fp8"}
    )
    uses = comparison.recommend([GPTQ, awq, fp8])
    assert uses == {
        "gptq-4bit": [],
        "awq": [VLLM],
        "fp8": [comparison.CLOSEST, KINDS["fp8"].runs_with],
    }
    assert comparison.recommend([GPTQ8, awq])["gptq-8bit"] == [comparison.CLOSEST, VLLM]


def test_where_none_is_near_the_closest_is_taken() -> None:
    uses = comparison.recommend([Q3, Q5_1, GPTQ])
    assert uses["q5_1"] == [comparison.CLOSEST, LLAMA_CPP]
    assert uses["q3_k_m"] == [comparison.FASTEST]  # its perplexity is no use where memory is short
    assert uses["gptq-4bit"] == [VLLM]


def test_what_was_not_measured_is_not_recommended() -> None:
    unmeasured = export("q8_0", 145, None)
    assert comparison.recommend([unmeasured]) == {"q8_0": []}
    assert comparison.recommend([unmeasured, GPTQ])["q8_0"] == []


def test_an_export_that_another_beats_says_so() -> None:
    everything = [F16, Q8, Q6, Q4, Q5_1, GPTQ]
    assert comparison.worse_than(Q5_1, everything) == "q6_k is smaller and closer"
    assert comparison.worse_than(Q4, everything) == ""
    assert comparison.worse_than(GPTQ, everything) == ""  # GGUF files do not run where GPTQ does


def line(*exports: QuantizedModel, held: tuple[str, ...] = ()) -> Any:
    verdicts = [
        ExportVerdict(format=format, verdict="hold", reason="worse", sealed="") for format in held
    ]
    decision = Decision(verdict="promote", reason="better", comparisons=[], exports=verdicts)
    return types.SimpleNamespace(exports=list(exports), decision=decision)


def test_an_export_that_is_held_is_not_recommended() -> None:
    free, held = comparison.card(line(Q8, Q4)), comparison.card(line(Q8, Q4, held=("q4_k_m",)))
    rows = {
        page: [row for row in page.split("<tr>") if "q4_k_m" in row][-1] for page in (free, held)
    }
    assert comparison.FASTEST in rows[free] and "held" not in rows[free]
    assert comparison.FASTEST not in rows[held] and ">held<" in rows[held]


def test_a_benchmark_has_a_column_where_it_was_measured() -> None:
    scored = {"benchmark": "heldout_choice", "reference_benchmark_score": 0.875}
    q8 = Q8.model_copy(update={**scored, "benchmark_score": 0.75, "num_benchmark_rows": 16})
    page = comparison.card(line(q8, Q4))
    assert "score</th>" in page and "75.0 % (51-90)" in page
    assert "on 16 held-out rows, with its 95 % interval" in page
    assert "the merged model has 87.5 % on the same" in page
    assert "heldout_choice" not in comparison.card(line(Q8, Q4))


@pytest.mark.parametrize(
    ("right", "rows", "interval"),
    # Brown, Cai and DasGupta's formula by hand; for none of ten it is [0, z^2 / (10 + z^2)].
    [(12, 16, (0.5050, 0.8982)), (0, 10, (0.0, 0.2775)), (10, 10, (0.7225, 1.0))],
)
def test_an_interval_of_few_rows(right: int, rows: int, interval: tuple[float, float]) -> None:
    assert comparison.wilson_interval(right / rows, rows) == pytest.approx(interval, abs=5e-5)


def test_names_lie_neither_on_points_nor_on_each_other() -> None:
    # Formats of one model crowd: the same size and nearly the same distance.
    points = [(100.0 + 4 * n, 100.0 + 3 * (n % 3)) for n in range(8)] + [(300.0, 240.0)]
    widths = [60.0] * len(points)
    places = place_names(points, widths, area=(54, 16, 400, 248))
    lefts = [
        place.x if place.x > x else place.x - 60
        for place, (x, _) in zip(places, points, strict=True)
    ]
    boxes = [
        (left, place.y - 10, left + 60, place.y + 3)
        for place, left in zip(places, lefts, strict=True)
    ]
    dots = [(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    for number, (left, top, right, bottom) in enumerate(boxes):
        assert left >= 54 and top >= 16 and right <= 400 and bottom <= 248
        for a, b, c, d in boxes[:number] + dots:
            assert left >= c or a >= right or top >= d or b >= bottom
    assert places[-1] == (309.0, 244.0, None), "alone: beside its point, without a line"
    assert any(place.line for place in places)


def test_the_picture_has_every_point_where_it_belongs() -> None:
    points = [
        ScatterPoint("a<b", "GGUF", 100.0, 1e-4),
        ScatterPoint("c", "GGUF", 200.0, 1e-2),
        ScatterPoint("d", "GPTQ", 200.0, 1e-2),
    ]
    chart = scatter_chart(points, x_label="size", y_label="KL")
    assert "a&lt;b" in chart and "a<b" not in chart
    drawings = re.findall(r"<svg.*?</svg>", chart, re.S)
    assert [int(re.search(r"0 0 (\d+)", each)[1]) for each in drawings] == [WIDTH, NARROW]
    for drawing in drawings:
        dots = re.findall(r'<circle class="dot s(\d)" cx="([\d.]+)" cy="([\d.]+)"', drawing)
        # Drawn from the top; the axes go from 0 to 200 and from 1e-4 to 1e-2.
        assert [(group, float(y)) for group, _, y in dots] == [("1", 248), ("1", 28), ("2", 28)]
        across = [float(x) - 54 for _, x, _ in dots]
        assert across[1] == across[2] == 2 * across[0]
    assert "no values" in scatter_chart([], x_label="x", y_label="y")


def test_what_vllm_does_not_serve_is_not_recommended_for_it() -> None:
    three = export("gptq-3bit", 90, 0.9, vllm_has_kernel=False)
    assert comparison.recommend([F16, three])["gptq-3bit"] == []
    assert VLLM in comparison.recommend([three, GPTQ])["gptq-4bit"]
