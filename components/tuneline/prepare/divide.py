"""Divide the tokenised rows into parts, and check what is left of them."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from tuneline.artifacts import Contamination
from tuneline.errors import DataError
from tuneline.prepare.config import PrepareConfig
from tuneline.prepare.cut import Remains
from tuneline.prepare.encode import Encoded
from tuneline.prepare.rows.collect import Collected
from tuneline.prepare.rows.contamination import Question, find
from tuneline.prepare.rows.groups import Groups
from tuneline.prepare.rows.mixture import Order, Origin, arrange, num_wanted
from tuneline.prepare.rows.split import Part, Split, num_eval_of, num_heldout_of, split
from tuneline.prepare.rows.weights import apply_weights
from tuneline.prepare.tokens.truncation import same_answers, too_long

logger = logging.getLogger(__name__)

HELDOUT = "heldout"
"""Name of the held-out rows among the benchmarks."""


def order_of(collected: Collected, config: PrepareConfig) -> Order:
    """Return the order in which the collected rows are written."""
    num_rows = min(len(collected.own), config.max_rows or len(collected.own))
    num_heldout = num_heldout_of(num_rows, config) if collected.heldout is None else 0
    num_first = num_heldout + num_eval_of(num_rows - num_heldout, config)
    return arrange(collected.own, collected.heldout, collected.general, config, num_first=num_first)


def sizes_of(order: Order, encoded: Encoded, config: PrepareConfig) -> NDArray[numpy.int64]:
    """Return the lengths of the examples of the dataset, and of the general rows mixed into it."""
    is_own = order.origins == Origin.OWN
    counted = is_own
    if config.general is not None:
        most = num_wanted(config.general, int(is_own.sum()))
        counted = is_own | ((order.origins == Origin.GENERAL) & (order.priorities < most))
    sizes: NDArray[numpy.int64] = numpy.array(encoded.sizes, numpy.int64)[counted[encoded.owners]]
    return sizes


def check_remains(
    source: str, order: Order, encoded: Encoded, remains: Remains, max_seq_length: int
) -> None:
    """Check that truncation leaves something to learn of the dataset's own rows.

    Args:
        source: name of the dataset.
        order: the rows.
        encoded: the examples of the rows.
        remains: what truncation leaves of the examples.
        max_seq_length: the maximum length.

    Raises:
        DataError: nothing is left.
    """
    own = order.origins[encoded.owners] == Origin.OWN
    if (remains.kept & own).any():
        return
    pairs = remains.has_same_answers & own
    if pairs.any():
        raise same_answers(source, numpy.array(encoded.apart)[pairs], max_seq_length)
    needed, sizes = numpy.array(encoded.needed)[own], numpy.array(encoded.sizes)[own]
    raise too_long(source, sizes, needed, max_seq_length)


def divide(
    source: str,
    collected: Collected,
    order: Order,
    encoded: Encoded,
    remains: Remains,
    config: PrepareConfig,
    work: Path,
) -> Split:
    """Group the rows, and divide them into training, evaluation and held-out rows.

    Args:
        source: name of the dataset.
        collected: the datasets, with their weights.
        order: the rows.
        encoded: texts, prompts and words of the rows.
        remains: what truncation leaves of the examples.
        config: the `prepare` section of the recipe.
        work: directory for temporary files.

    Raises:
        DataError: no training row is left.
    """
    groups = Groups(
        remains.hashes,
        remains.owners,
        numpy.array(encoded.texts, numpy.uint64),
        numpy.array(encoded.prompts, numpy.uint64),
    )
    groups.link_prompts(always=config.method not in ("sft", "cpt"))
    num_beginnings = numpy.array(encoded.num_beginnings)
    groups.link_beginnings(
        numpy.array(encoded.beginnings, numpy.uint64),
        numpy.repeat(numpy.arange(len(num_beginnings)), num_beginnings),
    )
    # Without another part, no group can be in two parts.
    if config.heldout.max_rows or (config.eval_share and config.max_eval_rows):
        groups.link_near(encoded.words, work)
    parts = split(
        order.origins,
        remains.rows(len(order.rows)),
        groups,
        config,
        holds_out_own=not (order.origins == Origin.HELDOUT).any() and config.heldout.source is None,
        priorities=order.priorities,
        weigh=lambda train: apply_weights(
            numpy.array(order.rows, numpy.int64)[train],
            [dataset.indices for dataset in collected.sources],
            [dataset.dataset.weight for dataset in collected.sources],
            config=config,
        ),
    )
    if not (parts.parts == Part.TRAIN).any():
        raise DataError(
            f"{source}: all {sum(parts.left_out.values())} rows are the same as held-out rows, so "
            "none is left to train on: name another prepare.heldout.source"
        )
    if parts.num_general < parts.num_general_wanted:
        assert config.general is not None
        num_train = int(parts.uses[parts.rows(Part.TRAIN)].sum())
        logger.warning(
            "prepare.general asks for %d rows of %s, but only %d are usable: they are %.1f %% of "
            "the training rows instead of %.1f %%",
            parts.num_general_wanted,
            config.general.source,
            parts.num_general,
            100 * parts.num_general / num_train,
            100 * config.general.share,
        )
    return parts


def read_questions(path: str | None) -> list[Question]:
    """Return the questions of a file that the evaluate step wrote; None: no questions."""
    if path is None:
        return []
    with open(path, encoding="utf-8") as lines:
        return [Question(**json.loads(line)) for line in lines]


def check_contamination(
    config: PrepareConfig,
    source: str,
    heldout: Sequence[dict[str, Any]],
    questions: Sequence[Question],
    encoded: Encoded,
    parts: Split,
) -> dict[str, Contamination]:
    """Return how many questions of each benchmark are in the training rows.

    Rows that were split off the dataset resemble its training rows, so their share is reported
    only; equal and nearly equal rows are left out anyway.

    Args:
        config: the `prepare` section of the recipe.
        source: name of the dataset.
        heldout: the held-out rows.
        questions: the questions of the other benchmarks.
        encoded: words and last questions of the rows.
        parts: the part of each row.

    Raises:
        DataError: more questions are in the training rows than the config allows.
    """
    own = [Question(HELDOUT, row.get("question", ""), row["answer"]) for row in heldout]
    found = find(
        [*own, *questions],
        encoded.words,
        parts.parts == Part.TRAIN,
        numpy.array(encoded.questions, numpy.uint64),
    )
    for name, counts in found.items():
        if not counts.num_found:
            continue
        message = (
            f"{counts.num_found} of {counts.num_questions} questions of the benchmark {name} "
            f"({counts.share:.1%}) are in the training rows of {source}, e.g. "
            f"'{counts.examples[0]}'"
        )
        is_checked = name != HELDOUT or config.heldout.source is not None
        most = config.max_contaminated_share
        if is_checked and most is not None and counts.share > most:
            raise DataError(
                f"{message}, but prepare.max_contaminated_share allows {most:.1%}: a score on "
                "questions that were learnt says nothing. Remove these rows, name other tasks in "
                "evaluate.tasks, or set prepare.max_contaminated_share to null to only report it"
            )
        logger.warning("%s", message)
    return found
