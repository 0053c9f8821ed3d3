"""Score a loaded model on held-out rows as the evaluate step does, for a table of formats.

The rows' choices where they have them (the most likely one, end of turn included, is the answer),
else greedy answers, which have to be the reference to its end. Few rows on a CPU: it tells formats
that answer from formats that broke, and its noise is that of so many rows.

Legend: T positions, A those of an answer, V vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tuneline.artifacts import HELDOUT_FILE, read_jsonl

if TYPE_CHECKING:
    import torch

CHOICE, EXACT = "heldout_choice", "heldout_exact"


class Model(Protocol):
    """What is asked of a model; `LlamaFile` and `TransformersModel` have it."""

    def tokenise(self, text: str) -> list[int]: ...  # noqa: D102

    def answer_logits(self, prompt: list[int], answers: list[list[int]]) -> list[Any]: ...  # noqa: D102


@dataclass(frozen=True)
class Benchmark:
    """Held-out rows, and what the merged model scores on them."""

    task: str
    rows: list[dict[str, Any]]
    reference: float
    """Share of right answers of the merged model, 0 to 1."""
    num_context: int
    """Tokens that the longest of them takes."""

    def record(self, model: Model) -> dict[str, Any]:
        """Score a model; return the fields of its `QuantizedModel`."""
        return {
            "benchmark": self.task,
            "benchmark_score": score(model, self.rows, self.task),
            "reference_benchmark_score": self.reference,
            "num_benchmark_rows": len(self.rows),
        }


def prepare(model: Model, dataset_dir: Path, num_rows: int) -> Benchmark | None:
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
    # Two tokenisations of one border may differ by a token.
    return Benchmark(task, rows, score(model, rows, task), longest + 2)


def score(model: Model, rows: list[dict[str, Any]], task: str) -> float:
    """Return the share of rows that a model answers rightly."""
    right = _chooses_rightly if task == CHOICE else _answers_exactly
    return sum(right(model, row) for row in rows) / len(rows)


def _chooses_rightly(model: Model, row: dict[str, Any]) -> bool:
    likelihoods = [
        logits_AV.log_softmax(-1).gather(1, ids_A[:, None]).sum().item()
        for ids_A, logits_AV in _answers(model, row, row["choices"])
    ]
    return max(range(len(likelihoods)), key=likelihoods.__getitem__) == row["label"]


def _answers_exactly(model: Model, row: dict[str, Any]) -> bool:
    ((ids_A, logits_AV),) = _answers(model, row, [row["answer"]])
    return bool((logits_AV.argmax(-1) == ids_A).all())


def _answers(
    model: Model, row: dict[str, Any], texts: list[str]
) -> "list[tuple[torch.Tensor, torch.Tensor]]":
    """Return answers' tokens with their end of turn, and the logits that each is chosen from."""
    import torch

    prompt, answers = model.tokenise(row["prompt"]), []
    for text in texts:
        answer = text + row["end"].rstrip()
        both = model.tokenise(row["prompt"] + answer)
        # As the evaluate step: where the tokenizer joins across the border, each by itself.
        joined = both[: len(prompt)] != prompt
        answers.append(model.tokenise(answer) if joined else both[len(prompt) :])
    found = model.answer_logits(prompt, answers)
    return [
        (torch.tensor(ids), torch.as_tensor(logits_AV).float())
        for ids, logits_AV in zip(answers, found, strict=True)
    ]
