"""Run the line up to the gate on the demo's rows with their answers permuted; run by hand.

    python tests/measure/shuffled_labels.py DIR [--labels shuffled right] [--steps 40]

A model that is tuned on answers of other questions must not be published, although it learns the
form of an answer and therefore gains on multiple-choice questions. The held-out rows keep their own
answers, so that the gain is not hidden. Prints the verdict and the comparisons of each run. Takes
about ten minutes per run on two cores; finished steps in DIR are kept.
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tuneline.evaluate import EvaluateConfig
from tuneline.evaluate.run import run as evaluate
from tuneline.fetch import FetchConfig
from tuneline.fetch.run import run as fetch
from tuneline.gate import GateConfig
from tuneline.gate.run import run as gate
from tuneline.merge import MergeConfig
from tuneline.merge.run import run as merge
from tuneline.prepare import PrepareConfig
from tuneline.prepare.run import run as prepare
from tuneline.prepare.sources import quantities
from tuneline.train import TrainConfig
from tuneline.train.run import run as train

SEED = 1
TASKS = ("heldout_choice", "heldout_exact")


def main() -> None:
    """Run the line with right or permuted answers, and print what the gate says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--labels", nargs="+", default=["shuffled"], choices=["shuffled", "right"])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=100, help="number of held-out rows")
    arguments = parser.parse_args()
    base = arguments.directory / "base"
    once(base, lambda out: fetch(FetchConfig(), source="builtin:smollm2-135m", base_model_dir=out))
    for labels in arguments.labels:
        one_run(arguments.directory / labels, base, labels, arguments.steps, arguments.rows)


def one_run(root: Path, base: Path, labels: str, num_steps: int, num_rows: int) -> None:
    """Run prepare, train, merge, both evaluations and the gate."""
    root.mkdir(parents=True, exist_ok=True)
    rows = list(quantities.rows())
    train_rows, heldout = rows[: -quantities.NUM_HELDOUT], rows[-quantities.NUM_HELDOUT :]
    if labels == "shuffled":
        answers = [(row["completion"], row["choices"]) for row in train_rows]
        random.Random(SEED).shuffle(answers)
        train_rows = [
            {"prompt": row["prompt"], "completion": completion, "choices": choices}
            for row, (completion, choices) in zip(train_rows, answers, strict=True)
        ]
    write(root / "train.jsonl", train_rows)
    write(root / "heldout.jsonl", heldout[:num_rows])
    config = PrepareConfig.model_validate(
        {
            "template": "chatml",
            "max_seq_length": 256,
            "eval_share": 0.04,
            "heldout": {"source": str(root / "heldout.jsonl"), "max_rows": num_rows},
        }
    )
    dataset, adapter, merged = (root / name for name in ("dataset", "adapter", "merged"))
    once(
        dataset,
        lambda out: prepare(
            config,
            source=str(root / "train.jsonl"),
            base_model_dir=str(base),
            dataset_dir=out,
            statistics_path=str(root / "statistics.html"),
        ),
    )
    training = TrainConfig(
        learning_rate=1e-3,
        max_steps=num_steps,
        eval_steps=num_steps,
        global_batch_size=2,
        micro_batch_size=2,
        gradient_checkpointing=False,
    )
    once(
        adapter,
        lambda out: train(
            training,
            base_model_dir=str(base),
            dataset_dir=str(dataset),
            adapter_dir=out,
            curves_path=str(root / "curves.html"),
        ),
    )
    once(
        merged,
        lambda out: merge(
            MergeConfig(),
            base_model_dir=str(base),
            adapter_dir=str(adapter),
            dataset_dir=str(dataset),
            merged_dir=out,
        ),
    )
    for label, model in (("base", base), ("tuned", merged)):
        once(
            root / f"{label}_scores",
            lambda out, label=label, model=model: evaluate(
                EvaluateConfig(tasks=TASKS, num_generations=0),
                label=label,
                model_dir=str(model),
                dataset_dir=str(dataset),
                scores_dir=out,
            ),
        )
    decision = gate(
        GateConfig(target_tasks=("heldout_choice",), max_regression=0.1),
        base_scores_dir=root / "base_scores",
        tuned_scores_dir=root / "tuned_scores",
        decision_dir=root / "decision",
    )
    print(f"{labels}: {decision.verdict}: {decision.reason}")
    for item in decision.comparisons:
        low, high = item.interval
        print(
            f"  {item.role} {item.task}: {item.base:.3f} -> {item.tuned:.3f}, "
            f"{item.difference:+.3f} [{low:+.3f}, {high:+.3f}]"
        )


def once(directory: Path, make: Callable[[str], Any]) -> None:
    """Make the output of a step unless an earlier call made it."""
    if not directory.exists():
        make(str(directory))


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON Lines."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
