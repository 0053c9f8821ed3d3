"""How many optimizer steps a run will have, as far as that is known before the data are read."""

import math
from collections.abc import Iterator
from pathlib import Path

from tuneline.html.units import count
from tuneline.pipelines.plan.check import Check
from tuneline.pipelines.plan.estimate import ASSUMED_LENGTH
from tuneline.prepare.datasets import parse
from tuneline.recipe import Recipe
from tuneline.train.batch_size import (
    FEW_STEPS,
    batch_size,
    more_steps_advice,
    num_total_steps,
)

BYTES_PER_TOKEN = 4
"""Bytes of text per token, assumed for a local file; the usual ratio for English."""
_TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt")


def check_optimizer_steps(recipe: Recipe) -> Iterator[Check]:
    """Yield the number of optimizer steps, or how it follows from the number of tokens."""
    train = recipe.train
    size = batch_size(train, recipe.num_ranks).global_batch_size
    if train.max_steps is not None:
        yield Check("steps", "ok", f"{count(train.max_steps)} optimizer steps (train.max_steps)")
        return
    if not train.packs(recipe.prepare.method):
        words = f"one optimizer step per {size} rows"
        yield Check("steps", "ok", f"{words}, {train.num_train_epochs:g} times over the rows")
        return
    length = recipe.prepare.max_seq_length
    length = ASSUMED_LENGTH if length == "auto" else length
    words = (
        f"one optimizer step per {size} packs of {length} tokens ({count(size * length)} tokens)"
    )
    num_bytes = _num_bytes(recipe)
    if num_bytes is None:
        yield Check("steps", "ok", words)
        return
    num_packs = math.ceil(num_bytes / BYTES_PER_TOKEN / length)
    num_steps = num_total_steps(train, num_packs, size)
    words += f": about {count(num_steps)} for the {count(num_bytes)} bytes of {recipe.data_names}"
    if num_steps >= FEW_STEPS:
        yield Check("steps", "ok", words)
        return
    advice = more_steps_advice(train, size, packing=True)
    yield Check("steps", "warn", f"{words}, in which an adapter learns little", advice)


def _num_bytes(recipe: Recipe) -> int | None:
    """Return the size of the local files of text, times their weights; None if it is not known."""
    total = 0.0
    for entry in parse(recipe.data, recipe.prepare):
        path = Path(entry.source)
        if path.suffix not in _TEXT_SUFFIXES or not path.is_file():
            return None
        total += entry.weight * path.stat().st_size
    return round(total)
