"""Run benchmarks on one model, and store the score of every sample.

The prompts of the recipe's held-out rows have the chat template applied. Tasks from lm-eval's
registry run with lm-eval's defaults: as plain text without a chat template, even for instruct
models, so that the scores are comparable with published scores.
"""

import contextlib
import importlib.metadata
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from lm_eval import evaluator

from tuneline.artifacts import (
    GENERATIONS_FILE,
    PROMPT_CONTROL,
    PROMPTED_DIR,
    SAMPLES_DIR,
    DatasetManifest,
    MergeProof,
    ModelOrigin,
    QuantizedModel,
    Scores,
    TaskScore,
    new_directory,
    write_jsonl,
)
from tuneline.errors import TaskError
from tuneline.evaluate import examples, heldout, prompt_control, samples
from tuneline.evaluate import model as models
from tuneline.evaluate.config import EvaluateConfig
from tuneline.evaluate.examples import Tokens
from tuneline.evaluate.tasks_by_name import TaskFinder
from tuneline.record import Record
from tuneline.runtime.scratch import scratch_directory
from tuneline.runtime.step import emit

logger = logging.getLogger(__name__)


def run(
    config: EvaluateConfig, *, label: str, model_dir: str, dataset_dir: str, scores_dir: str
) -> Scores:
    """Measure the model in `model_dir` on the tasks of the config.

    Args:
        config: the `evaluate` section of the recipe.
        label: role of the model in this run: "base", "tuned" or the name of an export format.
        model_dir: a model directory with a tokenizer.
        dataset_dir: directory that prepare made, with the held-out rows.
        scores_dir: directory to create for the scores; it may exist if it is empty.

    Raises:
        TaskError: a task is unknown, or the dataset's rows lack a field that a task needs.
        ModelError: the model or its tokenizer cannot be loaded.
        HubError: the data of a task are not in the local cache and could not be downloaded.
        WorldError: a file of the model or of the dataset has changed since it was made.
    """
    started = time.monotonic()
    if not config.tasks:
        raise TaskError("evaluate.tasks is empty: name at least one task, e.g. heldout_exact")
    parents = _parents(model_dir, dataset_dir)
    rows = heldout.read_rows(dataset_dir, config.tasks)
    _warn_of_ignored(config, rows)

    # Load tokenizer, rows and tasks before the weights, so that errors in them are reported early.
    finder = TaskFinder(config.tasks, config.task_dir)
    tokenizer = models.load_tokenizer(model_dir)
    with new_directory(scores_dir) as target, scratch_directory() as scratch:
        heldout_file = scratch / "heldout.jsonl"
        documents = heldout.documents(rows, tokenizer)
        write_jsonl(heldout_file, documents)
        cache_dir = scratch / "cache"
        loaded = {name: finder.load(name, heldout_file, cache_dir) for name in config.tasks}
        lm = models.load(model_dir, tokenizer, batch_size=config.batch_size)
        lm.fuses = config.kernels == "auto"

        ours = {name: tasks for name, tasks in loaded.items() if name in heldout.TASKS}
        shown: list[Tokens] = []
        if label == "base" and ours and config.num_examples:
            shown = _examples(lm, config, documents, dataset_dir)
        again = ours if shown else {}
        total = len(loaded) + len(again)
        scores: dict[str, TaskScore] = {}
        for number, (name, tasks) in enumerate(loaded.items()):
            emit("evaluate", "progress", done=number, total=total, note=name)
            measured = _measure(
                lm, tasks, config, manager=finder.manager, templated=name in heldout.TASKS
            )
            scores |= _write_scores(measured, tasks, target / SAMPLES_DIR, label)
        prompted: dict[str, TaskScore] = {}
        with lm.showing(shown):
            for number, (name, tasks) in enumerate(again.items()):
                done, extra = len(loaded) + number, f"with {len(shown)} examples"
                emit("evaluate", "progress", done=done, total=total, note=f"{name} {extra}")
                measured = _measure(lm, tasks, config, manager=finder.manager, templated=True)
                prompted |= _write_scores(
                    measured, tasks, target / PROMPTED_DIR, f"{label} {extra}"
                )
        if ours and (
            table := prompt_control.measure(
                lm, documents[: config.limit], num_rows=config.prompt_rows
            )
        ):
            scores[PROMPT_CONTROL] = samples.score_of(
                table, metric=prompt_control.METRIC, higher_is_better=True
            )
            write_jsonl(target / SAMPLES_DIR / f"{PROMPT_CONTROL}.jsonl", table)
        answered = models.generate(
            lm, rows[: config.num_generations], max_new_tokens=config.max_new_tokens
        )
        write_jsonl(target / GENERATIONS_FILE, answered)
        result = Scores(
            model=label,
            tasks=scores,
            groups={name: sorted(tasks) for name, tasks in loaded.items() if set(tasks) != {name}},
            harness=f"lm-eval {importlib.metadata.version('lm-eval')}",
            num_examples=len(shown) if prompted else 0,
            prompted=prompted,
            seconds=round(time.monotonic() - started, 3),
        )
        result.write(target, config, parents=parents)
    return result


def _examples(
    lm: Any, config: EvaluateConfig, documents: list[dict[str, Any]], dataset_dir: str
) -> list[Tokens]:
    """Return the training rows that the base model sees in its prompts."""
    longest = max(
        len(lm.tokenizer.encode(document["prompt"] + answer))
        for document in documents
        for answer in (document["target"], *document["endings"])
    )
    return examples.choose(
        dataset_dir,
        num_examples=config.num_examples,
        max_tokens=min(examples.MAX_TOKENS, lm.max_length - longest),
        begin_id=lm.tokenizer.bos_token_id,
    )


def _write_scores(
    measured: list[tuple[str, list[dict[str, Any]]]],
    tasks: dict[str, Any],
    directory: Path,
    label: str,
) -> dict[str, TaskScore]:
    """Write the scores of the samples of each task, and return the scores of the tasks.

    Args:
        measured: samples of lm-eval, by task.
        tasks: the tasks by name.
        directory: directory for a file per task.
        label: what was measured, for the log.
    """
    directory.mkdir(exist_ok=True)
    scores = {}
    for task, task_samples in measured:
        metric = samples.primary_metric(task, task_samples)
        table = samples.rows_of(task_samples, metric)
        scores[task] = samples.score_of(
            table,
            metric=metric,
            higher_is_better=tasks[task].higher_is_better().get(metric, True),
        )
        write_jsonl(directory / f"{task}.jsonl", table)
        value = scores[task].value
        logger.info("%s: %s %s %.4f on %d samples", label, task, metric, value, len(table))
    return scores


def _parents(model_dir: str, dataset_dir: str) -> list[Record]:
    """Return the records of dataset and model, as far as their directories contain a record.

    Raises:
        WorldError: a file has changed since the step that made it recorded its hash.
    """
    kinds = (DatasetManifest, ModelOrigin, MergeProof, QuantizedModel)
    found: list[Record] = []
    for directory in (dataset_dir, model_dir):
        for kind in kinds:
            if Path(directory, kind.filename).is_file():
                found.append(record := kind.read(directory))
                record.check_files(directory)
    return found


def _warn_of_ignored(config: EvaluateConfig, rows: list[dict[str, Any]]) -> None:
    """Warn about settings that have no effect on these tasks and rows."""
    ours = [task for task in config.tasks if task in heldout.TASKS]
    if config.num_fewshot and ours:
        logger.warning(
            "num_fewshot %d is ignored for %s, whose prompts are already complete",
            config.num_fewshot,
            ", ".join(ours),
        )
    if config.num_generations and not rows:
        logger.warning("num_generations is ignored: the dataset has no held-out rows")


def _measure(
    lm: Any, tasks: dict[str, Any], config: EvaluateConfig, *, manager: Any, templated: bool
) -> list[tuple[str, list[dict[str, Any]]]]:
    """Run lm-eval and return its samples by task."""
    with lm.templated() if templated else contextlib.nullcontext(), _no_machine_report():
        result = evaluator.simple_evaluate(
            model=lm,
            tasks=list(tasks.values()),
            task_manager=manager,
            num_fewshot=None if templated else config.num_fewshot,
            limit=config.limit,
            # 0, because samples.py computes the standard error instead of lm-eval's bootstrap.
            bootstrap_iters=0,
            log_samples=True,
        )
    # Any: by its type, the result may be None (on ranks other than 0) or lack samples.
    return sorted(cast(Any, result)["samples"].items())


@contextlib.contextmanager
def _no_machine_report() -> Iterator[None]:
    """Prevent lm-eval from collecting its report on the machine within the body.

    For this report lm-eval runs `pip list`, compilers and more, which takes 4 s per call. The
    report is not used here.
    """
    report = evaluator.add_env_info
    evaluator.add_env_info = lambda results: None
    try:
        yield
    finally:
        evaluator.add_env_info = report
