"""Score a loaded model on held-out rows as the evaluate step does, for a table of formats.

The rows' choices where they have them (the most likely one, end of turn included, is the answer),
else greedy answers, which have to be the reference to its end. Few rows on a CPU: it tells formats
that answer from formats that broke, and its noise is that of so many rows.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tuneline.artifacts import HELDOUT_FILE, read_jsonl
from tuneline.models.likelihood import Pair

CHOICE, EXACT = "heldout_choice", "heldout_exact"


class Model(Protocol):
    """What is asked of a model; `LlamaFile` and `TransformersModel` have it."""

    def tokenise(self, text: str) -> list[int]: ...  # noqa: D102

    def score_answers(self, pairs: list[Pair]) -> dict[Pair, tuple[float, bool]]: ...  # noqa: D102


class Merged(Model, Protocol):
    """The merged model, whose own tokenizer says how a text begins."""

    @property
    def begin_id(self) -> int: ...  # noqa: D102


@dataclass(frozen=True)
class Benchmark:
    """Held-out rows, and what the merged model scores on them."""

    task: str
    rows: list[dict[str, Any]]
    reference: float
    """Share of right answers of the merged model, 0 to 1."""
    num_context: int
    """Tokens that the longest of them takes."""
    begin_id: int | None
    """What an empty prompt's answer is scored after, the same in every format."""

    def record(self, model: Model) -> dict[str, Any]:
        """Score a model; return the fields of its `QuantizedModel`."""
        return {
            "benchmark": self.task,
            "benchmark_score": score(model, self.rows, self.task, begin_id=self.begin_id),
            "reference_benchmark_score": self.reference,
            "num_benchmark_rows": len(self.rows),
        }


def prepare(model: Merged, dataset_dir: Path, num_rows: int) -> Benchmark | None:
    """Read held-out rows and score the merged model; None where there are none, or none wanted."""
    path = dataset_dir / HELDOUT_FILE
    rows = read_jsonl(path)[:num_rows] if num_rows and path.is_file() else []
    if not rows:
        return None
    task = CHOICE if all(row.get("choices") for row in rows) else EXACT
    longest = max(
        len(model.tokenise(row["prompt"] + text + row["end"]))
        for row in rows
        for text in (row["answer"], *(row.get("choices") or ()))
    )
    begin_id = None if all(model.tokenise(row["prompt"]) for row in rows) else model.begin_id
    reference = score(model, rows, task, begin_id=begin_id)
    # Two tokenisations of one border may differ by a token; the token that begins a text is there.
    return Benchmark(task, rows, reference, longest + 2, begin_id)


def score(model: Model, rows: list[dict[str, Any]], task: str, *, begin_id: int | None) -> float:
    """Return the share of rows that a model answers rightly.

    Args:
        model: scores them.
        rows: held-out rows.
        task: CHOICE or EXACT.
        begin_id: the token that stands for an empty prompt, which rows of raw text have; None
            where no row has one.
    """
    texts = [row["choices"] if task == CHOICE else [row["answer"]] for row in rows]
    pairs = [
        [_pair(model, row, text, begin_id) for text in each]
        for row, each in zip(rows, texts, strict=True)
    ]
    scores = model.score_answers(list(dict.fromkeys(pair for each in pairs for pair in each)))
    right = 0
    for row, each in zip(rows, pairs, strict=True):
        if task == CHOICE:
            likelihoods = [scores[pair][0] for pair in each]
            right += max(range(len(each)), key=likelihoods.__getitem__) == row["label"]
        else:
            right += scores[each[0]][1]
    return right / len(rows)


def _pair(model: Model, row: dict[str, Any], text: str, begin_id: int | None) -> Pair:
    """Return the tokens of a row's prompt, and those of an answer with its end of turn."""
    prompt, answer = model.tokenise(row["prompt"]), text + row["end"].rstrip()
    both = model.tokenise(row["prompt"] + answer)
    if not prompt and begin_id is not None:
        # As lm-eval: a model predicts nothing before its first token, and an answer may begin so.
        return (begin_id,), tuple(both[1:] if both[:1] == [begin_id] else both)
    # As the evaluate step: where the tokenizer joins across the border, each by itself.
    joined = both[: len(prompt)] != prompt
    return tuple(prompt), tuple(model.tokenise(answer) if joined else both[len(prompt) :])
