"""Weights of datasets: how often each row is used, and that the split still holds."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuneline.artifacts import write_jsonl
from tuneline.errors import DataError, RecipeError
from tuneline.prepare import PrepareConfig
from tuneline.prepare.datasets import describe, parse, to_text
from tuneline.prepare.rows.weights import Weighted, apply_weights

RANGES = [range(0, 100), range(100, 140)]
TRAIN = [*range(0, 100, 2), *range(139, 99, -1)]


def counts(weights: list[float], **config: Any) -> tuple[Counter[int], Any]:
    train = numpy.array(TRAIN)
    weighted = apply_weights(train, RANGES, weights, config=PrepareConfig.parse(config))
    return used_rows(train, weighted), weighted


def used_rows(train: Any, weighted: Weighted) -> Counter[int]:
    return Counter(dict(zip(train.tolist(), weighted.uses.tolist(), strict=True)))


def test_weight_one_changes_nothing() -> None:
    _, weighted = counts([1, 1])
    assert weighted.uses.tolist() == [1] * len(TRAIN)
    assert (weighted.num_distinct, weighted.num_used) == ([50, 40], [50, 40])


def test_whole_and_partial_repetitions() -> None:
    used, weighted = counts([2, 0.25])
    assert all(used[row] == 2 for row in range(0, 100, 2))
    assert sum(used[row] for row in RANGES[1]) == 10
    assert max(used[row] for row in RANGES[1]) == 1
    assert (weighted.num_distinct, weighted.num_used) == ([50, 10], [100, 10])
    used, weighted = counts([1.5, 1])
    assert sorted(Counter(used[row] for row in range(0, 100, 2)).items()) == [(1, 25), (2, 25)]
    assert counts([1.5, 1])[0] == used and counts([1.5, 1], seed=1)[0] != used


def test_temperature_makes_shares_alike() -> None:
    # Numbers of rows 50 and 40; to the power of 1/2 they are 7.07 and 6.32.
    _, weighted = counts([1, 1], mixing="temperature")
    assert weighted.num_used == [round(90 * 50**0.5 / (50**0.5 + 40**0.5)), 42]
    assert counts([1, 1], mixing="temperature", mixing_temperature=1)[1].num_used == [50, 40]
    hot = counts([1, 1], mixing="temperature", mixing_temperature=1000)[1]
    assert hot.num_used == [45, 45]
    # At temperature 1, the weight is a factor of the share.
    assert counts([1, 5], mixing="temperature", mixing_temperature=1)[1].num_used == [18, 72]


def test_rows_of_no_dataset_are_kept_once() -> None:
    weighted = apply_weights(numpy.array([5, 200, 6]), RANGES, [2, 1], config=PrepareConfig())
    assert weighted.uses.tolist() == [2, 1, 2]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=5),
    st.lists(st.floats(0.01, 5), min_size=5, max_size=5),
    st.sampled_from(["epochs", "temperature"]),
)
def test_every_row_is_counted(sizes: list[int], weights: list[float], mixing: Any) -> None:
    ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
    ranges = [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    config = PrepareConfig(mixing=mixing)
    train = numpy.arange(ends[-1])
    weighted = apply_weights(train, ranges, weights[: len(sizes)], config=config)
    used = used_rows(train, weighted)
    assert sum(weighted.num_used) == weighted.uses.sum()
    for indices, distinct, number in zip(
        ranges, weighted.num_distinct, weighted.num_used, strict=True
    ):
        assert sum(used[row] for row in indices) == number
        assert sum(used[row] > 0 for row in indices) == distinct
        # No row is used twice before every row of its dataset is used once.
        times = {used[row] for row in indices}
        assert not times or max(times) - min(times) <= 1


def test_datasets_travel_as_text() -> None:
    config = PrepareConfig.parse({"split": "all", "columns": {"prompt": "q"}, "format": "alpaca"})
    (one,) = parse("org/rows", config)
    assert (one.source, one.split, one.columns, one.weight) == (
        "org/rows",
        "all",
        {"prompt": "q"},
        1,
    )
    text = '[{"source": "a.jsonl"}, {"source": "b", "weight": 2, "columns": {}, "split": "x"}]'
    first, second = parse(text, config)
    assert (first.split, first.columns, first.format) == ("all", {"prompt": "q"}, "alpaca")
    assert (second.split, second.columns, second.weight) == ("x", {}, 2)
    assert parse(to_text([first, second]), config) == [first, second]
    assert describe([first, second]) == "a.jsonl and b (weight 2)"
    assert describe([first, first, second]) == "a.jsonl, a.jsonl and b (weight 2)"
    # A glob may begin with a bracket too.
    assert parse("[ab].jsonl", config)[0].source == "[ab].jsonl"
    with pytest.raises(
        RecipeError, match=r"datasets\[0\]: .*sorce: unknown key; did you mean 'sour"
    ):
        parse('[{"sorce": "a"}]', config)
    with pytest.raises(RecipeError, match="datasets is an empty list"):
        parse("[]", config)


def rows(name: str, count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{name} {number}?", "completion": f"{number}"} for number in range(count)]


def test_several_datasets_are_prepared(prepare: Callable[..., Any], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", rows("first", 40))
    write_jsonl(
        tmp_path / "b.jsonl",
        [{"q": row["prompt"], "a": row["completion"]} for row in rows("second", 20)],
    )
    (tmp_path / "c.jsonl").write_text('{"instruction": "third", "output": "3"}\nnot JSON\n')
    text = (
        f'[{{"source": "{tmp_path}/a.jsonl", "licence": "mit"}}, '
        f'{{"source": "{tmp_path}/b.jsonl", "weight": 3, "licence": "cc-by-4.0", '
        '"columns": {"prompt": "q", "completion": "a"}}, '
        f'{{"source": "{tmp_path}/c.jsonl"}}]'
    )
    prepared = prepare(text, eval_share=0.1, max_rejected_share=0.5)
    manifest = prepared.manifest
    first, second, third = manifest.sources
    assert [entry.format for entry in manifest.sources] == [
        "prompt-completion",
        "prompt-completion",
        "alpaca",
    ]
    assert (first.num_rows, second.num_rows, third.num_rows) == (40, 20, 2)
    assert (third.num_rejected_rows, manifest.num_rejected_rows) == (1, 1)
    assert second.num_repeated_rows == 2 * second.num_train_rows
    assert (first.num_repeated_rows, first.weight, second.weight) == (0, 1, 3)
    distinct = sum(entry.num_train_rows for entry in manifest.sources)
    assert distinct + manifest.num_eval_rows == 61
    assert manifest.num_train_rows == distinct + second.num_repeated_rows
    assert (
        manifest.source == f"{tmp_path}/a.jsonl, {tmp_path}/b.jsonl (weight 3) and {third.source}"
    )
    assert manifest.licence == "mit, cc-by-4.0"
    trained = {tuple(row["input_ids"]) for row in prepared.rows()}
    assert not trained & {tuple(row["input_ids"]) for row in prepared.rows("eval.parquet")}
    assert "Sources<" in prepared.page and "cc-by-4.0" in prepared.page
    with pytest.raises(DataError, match="names .*a.jsonl twice: set its weight to 2"):
        prepare(f'[{{"source": "{tmp_path}/a.jsonl"}}, {{"source": "{tmp_path}/a.jsonl"}}]')


def test_a_dataset_that_cannot_be_used_is_named(
    prepare: Callable[..., Any], tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "a.jsonl", rows("first", 40))
    (tmp_path / "b.jsonl").write_text("")
    text = f'[{{"source": "{tmp_path}/a.jsonl"}}, {{"source": "{tmp_path}/b.jsonl"}}]'
    with pytest.raises(DataError, match="b.jsonl has no rows"):
        prepare(text)
