"""Properties of every split, and the parts that groups get."""

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuneline.prepare import PrepareConfig
from tuneline.prepare.rows.groups import Groups
from tuneline.prepare.rows.mixture import Origin
from tuneline.prepare.rows.split import Part, Split, split
from tuneline.prepare.rows.weights import Weighted


def divide(
    texts: list[int],
    *,
    origins: list[int] | None = None,
    usable: list[bool] | None = None,
    **config,
) -> tuple[Split, numpy.ndarray]:
    """Split rows, of which those with an equal number have an equal text; return the groups too."""
    keys = numpy.array(texts, numpy.uint64) + numpy.uint64(1)
    groups = Groups(
        numpy.arange(len(keys)).astype(numpy.uint64), numpy.arange(len(keys)), keys, keys
    )
    where = numpy.array(origins or [Origin.OWN] * len(texts), numpy.uint8)
    parts = split(
        where,
        numpy.array(usable or [True] * len(texts)),
        groups,
        PrepareConfig.parse(config),
        holds_out_own=not (where == Origin.HELDOUT).any(),
        priorities=numpy.arange(len(texts)),
        weigh=lambda train: Weighted(numpy.ones(len(train), numpy.int64), [], []),
    )
    return parts, groups.numbers()


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 40), st.sampled_from([0, 0, 0, 1, 2]), st.booleans()), min_size=1
    ),
    eval_share=st.sampled_from([0, 0.05, 0.5]),
    max_rows=st.integers(0, 20),
)
def test_no_group_is_in_two_parts_and_every_row_is_counted(rows, eval_share, max_rows) -> None:
    texts, origins, usable = map(list, zip(*rows, strict=True))
    config = {"eval_share": eval_share, "heldout": {"max_rows": max_rows}}
    general = {"source": "x", "share": 0.5} if Origin.GENERAL in origins else None
    done, numbers = divide(texts, origins=origins, usable=usable, general=general, **config)
    again, _ = divide(texts, origins=origins, usable=usable, general=general, **config)
    assert done.parts.tolist() == again.parts.tolist()
    parts_of: dict[int, set[int]] = {}
    for number, part in zip(numbers.tolist(), done.parts.tolist(), strict=True):
        if part != Part.LEFT_OUT:
            parts_of.setdefault(number, set()).add(part)
    assert all(len(parts) == 1 for parts in parts_of.values())
    heldout = numbers[done.rows(Part.HELDOUT)]
    assert len(set(heldout.tolist())) == len(heldout)

    where, can_be_used = numpy.array(origins), numpy.array(usable)
    own = int(((where == Origin.OWN) & can_be_used).sum())
    used = int(((where == Origin.OWN) & (done.parts != Part.LEFT_OUT)).sum())
    general_left = int(((where == Origin.GENERAL) & can_be_used).sum()) - done.num_general
    leaking = sum(done.left_out.values())
    assert own - used <= leaking <= own - used + general_left
    separate = int((where == Origin.HELDOUT).sum())
    assert separate == done.num_repeated + int(
        ((where == Origin.HELDOUT) & (done.parts == Part.HELDOUT)).sum()
    )
    assert not (done.parts[(where == Origin.OWN) & ~can_be_used] != Part.LEFT_OUT).any()


def test_different_rows_are_divided_in_order() -> None:
    done, _ = divide(list(range(200)), eval_share=0.1, heldout={"max_rows": 20})
    assert done.rows(Part.HELDOUT).tolist() == list(range(20))
    assert done.rows(Part.EVAL).tolist() == list(range(20, 38))
    assert done.rows(Part.TRAIN).tolist() == list(range(38, 200))
    assert done.left_out == {}


def test_rows_that_stand_twice() -> None:
    twice = [*range(100), *range(100)]
    done, numbers = divide(twice, eval_share=0.1, heldout={"max_rows": 20})
    assert [len(done.rows(part)) for part in (Part.TRAIN, Part.EVAL, Part.HELDOUT)] == [144, 16, 20]
    assert done.left_out == {"equal": 20}


def test_held_out_groups_take_a_fifth_of_the_rows_at_most() -> None:
    fives = [number // 5 for number in range(1000)]
    done, _ = divide(fives, eval_share=0, heldout={"max_rows": 200})
    assert len(done.rows(Part.HELDOUT)) == 40
    assert done.left_out == {"equal": 160}


def test_a_large_group_is_trained_on() -> None:
    texts = [0] * 500 + list(range(1, 501))
    done, _ = divide(texts, eval_share=0.1, heldout={"max_rows": 50})
    assert set(done.parts[:500].tolist()) == {Part.TRAIN}
    assert done.num_in_large_groups == 500
    assert (len(done.rows(Part.HELDOUT)), len(done.rows(Part.EVAL))) == (50, 95)
    only, _ = divide([0] * 60, eval_share=0.1, heldout={"max_rows": 50})
    assert set(only.parts.tolist()) == {Part.TRAIN}


def test_general_rows_never_repeat_a_row_that_is_evaluated() -> None:
    own, general = [Origin.OWN] * 100, [Origin.GENERAL] * 150
    done, _ = divide(
        [*range(100), *range(50), *range(1000, 1100)],
        origins=[*own, *general],
        eval_share=0.1,
        heldout={"max_rows": 10},
        general={"source": "x", "share": 0.5},
    )
    # 10 rows are held out and 9 evaluated; the general dataset has a copy of each of them.
    assert done.left_out == {"equal": 19}
    assert set(done.parts[100:119].tolist()) == {Part.LEFT_OUT}
    assert done.num_general == done.num_general_wanted == 81


@pytest.mark.parametrize("eval_share", [0, 0.5])
def test_a_single_row_is_trained_on(eval_share: float) -> None:
    done, _ = divide([0], eval_share=eval_share)
    assert done.parts.tolist() == [Part.TRAIN]


def test_overlong_rows_take_no_place_in_a_part() -> None:
    usable = [number % 2 == 1 for number in range(100)]
    done, _ = divide(list(range(100)), usable=usable, eval_share=0.2, heldout={"max_rows": 5})
    assert done.rows(Part.HELDOUT).tolist() == [1, 3, 5, 7, 9]
    assert len(done.rows(Part.EVAL)) == 9
    assert len(done.rows(Part.TRAIN)) == 36
