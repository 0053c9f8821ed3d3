"""Collect the questions of the recipe's benchmarks, for the check that no training row has them."""

import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from tuneline.artifacts import write_jsonl
from tuneline.evaluate import heldout
from tuneline.evaluate.config import EvaluateConfig
from tuneline.evaluate.tasks_by_name import TaskFinder
from tuneline.runtime.scratch import scratch_directory

logger = logging.getLogger(__name__)


def collect(config: EvaluateConfig, *, questions_path: str) -> dict[str, int]:
    """Write the questions of all tasks except those over held-out rows, as JSON Lines.

    Each line has the keys benchmark (the task's name), text (the question) and answer (the right
    answer). With `evaluate.limit`, only the questions that are evaluated are written.

    Args:
        config: the `evaluate` section of the recipe.
        questions_path: path of the file to write.

    Returns:
        The number of questions by task.

    Raises:
        TaskError: a task is unknown or broken.
        HubError: the data of a task are not in the local cache and could not be downloaded.
    """
    names = tuple(name for name in config.tasks if name not in heldout.TASKS)
    finder = TaskFinder(names, config.task_dir)
    lines: list[dict[str, str]] = []
    counts = {}
    with scratch_directory() as scratch:
        for name in names:
            for task_name, task in finder.load(name, scratch, scratch).items():
                asked = list(_questions(task, config.limit))
                lines += [{"benchmark": task_name, **question} for question in asked]
                counts[task_name] = len(asked)
                logger.info("%s has %d questions", task_name, len(asked))
    path = Path(questions_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(path, lines)
    return counts


def _questions(task: Any, limit: int | None) -> Iterator[dict[str, str]]:
    """Yield question and answer of each document that a task evaluates."""
    for doc in islice(task.eval_docs, limit):
        answer = _answer(task, doc)
        text = task.doc_to_decontamination_query(doc) if task.should_decontaminate() else ""
        text = text or task.doc_to_text(doc)
        if isinstance(text, int):
            # Each choice is the beginning of a sentence, which the target completes.
            text, answer = task.doc_to_choice(doc)[text], task.doc_to_target(doc)
        # Tasks over whole documents have no question.
        yield {"text": str(text), "answer": answer} if text else {"text": answer, "answer": ""}


def _answer(task: Any, doc: Any) -> str:
    target = task.doc_to_target(doc)
    if isinstance(target, list):
        target = target[0] if target else ""
    if isinstance(target, int) and task.config.doc_to_choice is not None:
        target = task.doc_to_choice(doc)[target]
    return str(target)
