"""Turn the held-out rows of the recipe's dataset into lm-eval documents."""

import hashlib
from pathlib import Path
from typing import Any

from tuneline.artifacts import HELDOUT_FILE, DatasetManifest, read_jsonl
from tuneline.errors import TaskError
from tuneline.evaluate.encoding import encode_pair

TASKS = ("heldout_choice", "heldout_exact", "heldout_perplexity")
"""Names of the tasks that evaluate on held-out rows."""
TASKS_DIR = Path(__file__).parent / "tasks"


def read_rows(dataset_dir: str | Path, tasks: tuple[str, ...]) -> list[dict[str, Any]]:
    """Read the held-out rows of a dataset, and check that they have the fields that `tasks` need.

    Raises:
        TaskError: a task needs held-out rows, or rows with choices, but the dataset has none.
    """
    manifest = DatasetManifest.read(dataset_dir)
    rows = read_jsonl(Path(dataset_dir, HELDOUT_FILE)) if manifest.num_heldout_rows else []
    wanted = [task for task in tasks if task in TASKS]
    if wanted and not rows:
        raise TaskError(
            f"{wanted[0]} needs held-out rows, but the dataset from {manifest.source} has none: "
            "set prepare.heldout.max_rows, or name other tasks in evaluate.tasks"
        )
    if "heldout_choice" in wanted:
        missing = [number for number, row in enumerate(rows, start=1) if not row.get("choices")]
        if missing:
            raise TaskError(
                f"heldout_choice needs `choices` in every held-out row, but {len(missing)} of "
                f"{len(rows)} have none (the first is row {missing[0]}): add a column `choices` "
                "with the answer and wrong answers, or use heldout_exact or heldout_perplexity"
            )
    return rows


def documents(rows: list[dict[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    """Return held-out rows as lm-eval documents, with the fields that the task files use."""
    return [_document(number, row, tokenizer) for number, row in enumerate(rows)]


def _document(number: int, row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    # White space after the end-of-turn token belongs to the next turn, so no model generates it.
    end = row.get("end", "").rstrip()
    target = row["answer"] + end
    content = hashlib.sha256(f"{row['prompt']}\0{row['answer']}".encode()).hexdigest()
    return {
        "id": f"{number}-{content[:12]}",
        "prompt": row["prompt"],
        "target": target,
        "num_tokens": len(encode_pair(tokenizer, row["prompt"], target)[1]),
        # An empty list instead of None for rows without choices: Arrow needs one type per column.
        "endings": [choice + end for choice in row.get("choices") or []],
        "label": row.get("label", -1),
        "cluster": str(row.get("cluster", "")),
    }
