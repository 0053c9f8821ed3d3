"""Score a loaded model on held-out rows as the evaluate step does, for the table of formats.

If every row has choices, the most likely choice, end of turn included, is the answer. Otherwise the
greedy answer has to equal the whole reference. The benchmark runs on few rows on a CPU: it tells
formats that still answer from broken ones, and is too noisy to rank them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tuneline.artifacts import HELDOUT_FILE, read_jsonl
from tuneline.models.likelihood import Pair

CHOICE, EXACT = "heldout_choice", "heldout_exact"


class Model(Protocol):
    """A model that can be scored, such as `LlamaFile` and `TransformersModel`."""

    def tokenise(self, text: str) -> list[int]: ...  # noqa: D102

    def score_answers(self, pairs: list[Pair]) -> dict[Pair, tuple[float, bool]]: ...  # noqa: D102


class Merged(Model, Protocol):
    """The merged model, whose tokenizer also has the token that begins a text."""

    @property
    def begin_id(self) -> int: ...  # noqa: D102


@dataclass(frozen=True)
class Benchmark:
    """Held-out rows with the merged model's score on them."""

    task: str
    """CHOICE or EXACT."""
    rows: list[dict[str, Any]]
    reference: float
    """Fraction of rows that the merged model answers correctly, 0 to 1."""
    num_context: int
    """Tokens of the longest prompt with its answer."""
    begin_id: int | None
    """Token that stands for an empty prompt, the same in every format; None if no row has one."""

    def record(self, model: Model) -> dict[str, Any]:
        """Score a model and return the fields of its `QuantizedModel`."""
        return {
            "benchmark": self.task,
            "benchmark_score": score(model, self.rows, self.task, begin_id=self.begin_id),
            "reference_benchmark_score": self.reference,
            "num_benchmark_rows": len(self.rows),
        }


def prepare(model: Merged, dataset_dir: Path, num_rows: int) -> Benchmark | None:
    """Read held-out rows and score the merged model; None if there are no rows or none wanted."""
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
    # + 2: one for the token that begins a text, and one because the border between prompt and
    # answer may be tokenised in two ways.
    return Benchmark(task, rows, reference, longest + 2, begin_id)


def score(model: Model, rows: list[dict[str, Any]], task: str, *, begin_id: int | None) -> float:
    """Return the fraction of rows that a model answers correctly, 0 to 1.

    Args:
        model: the model to score.
        rows: held-out rows.
        task: CHOICE or EXACT.
        begin_id: token that stands for an empty prompt, which rows of raw text have; None if no
            row has one.
    """
    texts = [row["choices"] if task == CHOICE else [row["answer"]] for row in rows]
    pairs = [
        [_pair(model, row, text, begin_id) for text in answers]
        for row, answers in zip(rows, texts, strict=True)
    ]
    unique = dict.fromkeys(pair for row_pairs in pairs for pair in row_pairs)
    scores = model.score_answers(list(unique))
    correct = 0
    for row, row_pairs in zip(rows, pairs, strict=True):
        if task == CHOICE:
            likelihoods = [scores[pair][0] for pair in row_pairs]
            correct += max(range(len(row_pairs)), key=likelihoods.__getitem__) == row["label"]
        else:
            correct += scores[row_pairs[0]][1]
    return correct / len(rows)


def _pair(model: Model, row: dict[str, Any], text: str, begin_id: int | None) -> Pair:
    """Return the tokens of a row's prompt, and the tokens of an answer with its end of turn."""
    prompt, answer = model.tokenise(row["prompt"]), text + row["end"].rstrip()
    both = model.tokenise(row["prompt"] + answer)
    if not prompt and begin_id is not None:
        # As in lm-eval: a model predicts nothing before the first token, which is this one. The
        # tokenizer may have put it before the answer already.
        return (begin_id,), tuple(both[1:] if both[:1] == [begin_id] else both)
    # As in the evaluate step: if a token crosses the border, prompt and answer are tokenised apart.
    joined = both[: len(prompt)] != prompt
    return tuple(prompt), tuple(model.tokenise(answer) if joined else both[len(prompt) :])
