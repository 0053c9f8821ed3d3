"""Score a loaded model on held-out rows as the evaluate step does.

If every row has choices, the model's answer is the most likely choice with its end of turn.
Otherwise the model's greedy answer must equal the row's whole answer. Every export and the merged
model answer the same rows, and the gate compares them row by row. The scores of two exports are
too noisy to rank their formats.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tuneline.artifacts import HELDOUT_FILE, BenchmarkAnswers, read_jsonl
from tuneline.models.clusters import clusters_of
from tuneline.models.likelihood import Pair

CHOICE, EXACT = "heldout_choice", "heldout_exact"


class Model(Protocol):
    """A model that can be scored, such as `LlamaFile` and `TransformersModel`."""

    def tokenise(self, text: str) -> list[int]: ...  # noqa: D102

    def score_answers(self, pairs: list[Pair]) -> dict[Pair, tuple[float, bool]]: ...  # noqa: D102


class Merged(Model, Protocol):
    """The merged model; unlike other models, it also provides the token that begins a text."""

    @property
    def begin_id(self) -> int: ...  # noqa: D102


@dataclass(frozen=True)
class Benchmark:
    """Held-out rows, and the merged model's answers to these rows."""

    task: str
    """How answers are scored: `CHOICE` or `EXACT`."""
    rows: list[dict[str, Any]]
    reference: list[bool]
    """Whether the merged model answers each row correctly."""
    num_context: int
    """Context length that is needed: number of tokens of the longest prompt with its answer."""
    begin_id: int | None
    """Token that replaces an empty prompt, the same for all formats; None if no prompt is empty."""

    def record(self, model: Model) -> dict[str, Any]:
        """Score an export and return the scores as fields of the export's `QuantizedModel`."""
        answers = answer(model, self.rows, self.task, begin_id=self.begin_id)
        return {
            "benchmark": self.task,
            "benchmark_score": sum(answers) / len(answers),
            "reference_benchmark_score": sum(self.reference) / len(self.reference),
            "num_benchmark_rows": len(self.rows),
            "benchmark_answers": BenchmarkAnswers(
                export=answers, merged=self.reference, clusters=_clusters(self.rows)
            ),
        }


def prepare(model: Merged, dataset_dir: Path, num_rows: int) -> Benchmark | None:
    """Read held-out rows and score the merged model; None if no rows exist or `num_rows` is 0."""
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
    reference = answer(model, rows, task, begin_id=begin_id)
    # + 2: one for the token that begins a text, and one because a prompt and an answer that are
    # tokenised separately may have one more token than the joined text.
    return Benchmark(task, rows, reference, longest + 2, begin_id)


def answer(
    model: Model, rows: list[dict[str, Any]], task: str, *, begin_id: int | None
) -> list[bool]:
    """Return whether a model answers each row correctly.

    Args:
        model: the model to score.
        rows: held-out rows.
        task: how answers are scored: `CHOICE` or `EXACT`.
        begin_id: token that replaces an empty prompt (rows of raw text have empty prompts); None if
            no prompt is empty.
    """
    texts = [row["choices"] if task == CHOICE else [row["answer"]] for row in rows]
    pairs = [
        [_pair(model, row, text, begin_id) for text in answers]
        for row, answers in zip(rows, texts, strict=True)
    ]
    unique = dict.fromkeys(pair for row_pairs in pairs for pair in row_pairs)
    scores = model.score_answers(list(unique))
    correct = []
    for row, row_pairs in zip(rows, pairs, strict=True):
        if task == CHOICE:
            likelihoods = [scores[pair][0] for pair in row_pairs]
            most_likely = max(range(len(row_pairs)), key=likelihoods.__getitem__)
            correct.append(most_likely == row["label"])
        else:
            correct.append(scores[row_pairs[0]][1])
    return correct


def _clusters(rows: list[dict[str, Any]]) -> list[int]:
    """Return the number of each row's cluster; rows with the same question or passage share one."""
    documents = [
        {"prompt": row["prompt"], "endings": [], "cluster": row.get("cluster", "")} for row in rows
    ]
    names = [
        f"alone {number}" if name is None else name
        for number, name in enumerate(clusters_of(documents))
    ]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return [numbers[name] for name in names]


def _pair(model: Model, row: dict[str, Any], text: str, begin_id: int | None) -> Pair:
    """Return the tokens of a row's prompt, and the tokens of an answer with its end of turn."""
    prompt, answer = model.tokenise(row["prompt"]), text + row["end"].rstrip()
    both = model.tokenise(row["prompt"] + answer)
    if not prompt and begin_id is not None:
        # As in lm-eval: a model cannot predict the first token of its input, so `begin_id` goes
        # before the answer, unless the tokenizer has put it there already.
        return (begin_id,), tuple(both[1:] if both[:1] == [begin_id] else both)
    # As in the evaluate step: if a token spans the end of the prompt and the start of the answer,
    # the answer is tokenised separately.
    joined = both[: len(prompt)] != prompt
    return tuple(prompt), tuple(model.tokenise(answer) if joined else both[len(prompt) :])
