"""The settings of a proposed recipe, each with its reason."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tuneline.artifacts import PREFERENCE_METHODS, Method
from tuneline.evaluate.config import EvaluateConfig
from tuneline.gate.power import samples_for_margin
from tuneline.pipelines.init.base import TEMPLATE_OF_EMBEDDED, Base, Lengths
from tuneline.pipelines.init.machine import Machine
from tuneline.pipelines.init.rows import Rows, texts_of
from tuneline.prepare.config import PrepareConfig
from tuneline.prepare.rows.split import MAX_HELDOUT_SHARE
from tuneline.prepare.tokens.templates import OWN_TEMPLATE
from tuneline.verdict import MIN_CLUSTERS, MIN_EFFECTIVE_SAMPLES

MIN_ROWS = 10
"""Smallest number of usable rows of a recipe; fewer cannot be divided into parts."""

_METHODS: dict[Method, str] = {
    "sft": "supervised fine-tuning: the answers are learnt",
    "dpo": "the chosen answers become likelier than the rejected ones",
    "kto": "desirable answers become likelier, and undesirable ones less likely",
    "cpt": "continued pre-training: every token of the texts is learnt",
}
_RATES_OF_EMBEDDED: dict[Method, float] = {"sft": 1e-3, "dpo": 1e-4, "kto": 1e-4, "cpt": 5e-4}
"""Learning rates of a model with 135M parameters that is trained for few steps."""
_LONGEST_ON_CPU, _LONGEST_ON_GPU = 512, 4096
_BATCH_ON_CPU, _PAIRS_ON_CPU = 2, 4
_TOKENS_ON_CPU = 30_000
"""Number of tokens to train on: ten minutes with a model of 135M parameters on two cores."""
_MIN_STEPS = 10
_ENOUGH_STEPS = 50
"""Optimizer steps below which a smaller batch is better than fewer steps."""
_EPOCHS_ON_CPU = 3
_EPOCHS_OF_FEW, _FEW = 3, 2_000
"""Passes over the rows if there are fewer rows than the second number; else one."""
_EVAL_SHARE = 0.05
_MAX_EVAL_ON_CPU = 50
_MAX_HELDOUT_ON_CPU, _MAX_HELDOUT_ON_GPU = 120, 200
_MAX_CHARACTERS_OF_EXACT = 120
"""Longest answer, in characters of 95 % of the rows, that can be expected word for word."""
_LONGEST_SHOWN = 200
"""Largest number of tokens of an answer in the report, which are generated one by one."""
_NAME = re.compile(r"[^a-z0-9]+")


@dataclass(frozen=True)
class Setting:
    """One key of a recipe."""

    key: str
    """Dotted key."""
    value: Any
    why: str = ""
    """Comment beside or above the key."""


def name_of(source: str) -> str:
    """Return a recipe's name for a source: the last part of its path, as a recipe allows it."""
    last = source.rstrip("/").rpartition("/")[2].rpartition(":")[2]
    stem = last.split(".")[0] if not last.startswith(".") else ""
    return _NAME.sub("-", stem.lower()).strip("-")[:40].strip("-") or "my-model"


def propose_settings(
    rows: Rows, base: Base, lengths: Lengths, machine: Machine, *, name: str, dataset: str
) -> list[Setting]:
    """Return the settings of a recipe, in the order of the file.

    Args:
        rows: the rows.
        base: the base model.
        lengths: how long the rows are in the base model's tokens.
        machine: the machine that the recipe is for.
        name: the recipe's name.
        dataset: the source, as the recipe names it.
    """
    on_cpu = trains_on_cpu(machine, base)
    return [
        Setting("name", name),
        Setting("description", _description(rows)),
        Setting("base_model", base.source, base.why),
        Setting("dataset", dataset, _rows_in_words(rows)),
        Setting(
            "publish_to",
            f"dir:{name}-published",
            f"a directory; or a repository on the Hub, e.g. my-org/{name}",
        ),
        *_prepare(rows, base, lengths, on_cpu),
        *_train(rows, base, lengths, on_cpu),
        *_quantize(on_cpu),
        *_evaluate(rows, lengths, on_cpu),
        *_placement(machine, on_cpu),
    ]


def trains_on_cpu(machine: Machine, base: Base) -> bool:
    """Return whether the recipe is for a CPU, or for a model as small as for one."""
    return machine.gpu is None or base.is_embedded


def shortage(rows: Rows, *, on_cpu: bool) -> str:
    """Return a sentence if the held-out rows are too few for the gate to promote a model, or ""."""
    held, target = _num_heldout(rows, on_cpu), _tasks(rows)[0][0]
    needed = MIN_EFFECTIVE_SAMPLES if target == "heldout_perplexity" else MIN_CLUSTERS
    if held >= needed or not rows.is_all:
        return ""
    wanted = int(needed / MAX_HELDOUT_SHARE)
    return (
        f"{held} of the rows will be held out, but the gate promotes a model on at least {needed}: "
        f"the run works, and its verdict will be hold. Use {wanted} rows or more"
    )


def _max_heldout(on_cpu: bool) -> int:
    return _MAX_HELDOUT_ON_CPU if on_cpu else _MAX_HELDOUT_ON_GPU


def _num_heldout(rows: Rows, on_cpu: bool) -> int:
    """Return how many rows are held out at most."""
    return min(_max_heldout(on_cpu), int(MAX_HELDOUT_SHARE * rows.num_usable))


def _description(rows: Rows) -> str:
    what = {"sft": "answers", "dpo": "preferences", "kto": "judged answers", "cpt": "texts"}
    return f"Learns the {what[rows.proposal.method]} of {rows.source.rpartition('/')[2]}."


def _rows_in_words(rows: Rows) -> str:
    count = f"{rows.num_rows:,}" if rows.is_all else f"more than {rows.num_rows:,}"
    return f"{count} rows; columns: {', '.join(rows.columns[:8])}"


def _prepare(rows: Rows, base: Base, lengths: Lengths, on_cpu: bool) -> Iterator[Setting]:
    proposal = rows.proposal
    yield Setting("prepare.method", proposal.method, _METHODS[proposal.method])
    yield Setting("prepare.format", proposal.format)
    if proposal.columns:
        yield Setting(
            "prepare.columns", proposal.columns, "column that tuneline reads: column of the rows"
        )
    ignored = [name for name in rows.unused if name in rows.columns]
    if ignored:
        yield Setting("prepare.ignore_columns", ignored, "nothing is read from these")
    if proposal.method != "cpt":
        why = "the chat template of the model's tokenizer"
        if lengths.template != OWN_TEMPLATE:
            why = "of the named templates, the one that the model's tokens fit"
        if base.is_embedded and lengths.template == TEMPLATE_OF_EMBEDDED:
            why = "the model's own would put a system prompt of 20 tokens before each row"
        yield Setting("prepare.template", lengths.template, why)
    yield Setting("prepare.max_seq_length", *_length(rows, lengths, on_cpu))
    share = (rows.num_unusable + _num_refused(rows, lengths)) / rows.num_rows
    most = PrepareConfig().max_rejected_share
    if share > most:
        yield Setting(
            "prepare.max_rejected_share",
            min(1.0, round(share + 0.02, 2)),
            f"{share:.1%} of the rows cannot be used, and the run stops at {100 * most:g} % by "
            "default: " + (rows.unusable_in_words() or next(iter(lengths.refused))),
        )
    yield Setting("prepare.eval_share", _EVAL_SHARE, "rows for the evaluation loss during training")
    if on_cpu:
        yield Setting("prepare.max_eval_rows", _MAX_EVAL_ON_CPU)
    held, wanted = _num_heldout(rows, on_cpu), _max_heldout(on_cpu)
    yield Setting(
        "prepare.heldout.max_rows",
        wanted,
        "never trained on: base and tuned model are compared on them"
        + (f"; here {held}, a fifth of the rows" if held < wanted and rows.is_all else ""),
    )


def _num_refused(rows: Rows, lengths: Lengths) -> int:
    """Return how many of all rows the chat template refuses, from those that were tried."""
    num_refused = sum(lengths.refused.values())
    return num_refused * rows.num_usable // lengths.num_tried if lengths.num_tried else 0


def _length(rows: Rows, lengths: Lengths, on_cpu: bool) -> tuple[int | str, str]:
    """Return the value of max_seq_length, and its reason."""
    longest = _LONGEST_ON_CPU if on_cpu else _LONGEST_ON_GPU
    statistics = lengths.statistics
    said = f"99 % of the rows have at most {statistics.p99:,.0f} tokens"
    if rows.proposal.method == "cpt":
        length = min(longest, max(256, lengths.recommended))
        return length, "texts are cut into pieces of so many tokens; nothing is lost"
    if lengths.is_estimated:
        return "auto", f"by an estimate from the characters, {said}"
    if lengths.recommended > longest:
        return longest, f"{said}; longer ones are cut off, which saves time and memory"
    return lengths.recommended, said


def _train(rows: Rows, base: Base, lengths: Lengths, on_cpu: bool) -> Iterator[Setting]:
    method = rows.proposal.method
    if base.is_embedded:
        why = "higher than for a large model: few steps, and 135M parameters forgive it"
        yield Setting("train.learning_rate", _RATES_OF_EMBEDDED[method], why)
    else:
        yield Setting("train.learning_rate", "auto", "by method and number of rows")
    value = _length(rows, lengths, on_cpu)[0]
    length = value if isinstance(value, int) else lengths.recommended
    if not on_cpu:
        yield from _steps_on_gpu(rows, lengths, length)
        return
    batch, steps = _steps_on_cpu(rows, lengths, length)
    if steps is None:
        yield Setting("train.num_train_epochs", _EPOCHS_ON_CPU, "passes over the rows")
    else:
        yield Setting(
            "train.max_steps", steps, "minutes on a laptop; more steps learn more, if rows are left"
        )
        yield Setting("train.eval_steps", steps, "the evaluation loss before and after")
    yield Setting("train.global_batch_size", batch)
    yield Setting("train.micro_batch_size", batch)
    if base.is_embedded:
        yield Setting(
            "train.gradient_checkpointing", False, "memory is no concern at this size of a model"
        )
    yield Setting("train.sample_tokens", 32, "of each sample answer in the report")


def _steps_on_gpu(rows: Rows, lengths: Lengths, length: int) -> Iterator[Setting]:
    """Yield settings with which a small dataset gives enough optimizer steps."""
    method = rows.proposal.method
    is_small = method == "sft" and rows.num_usable < _FEW
    epochs = _EPOCHS_OF_FEW if is_small else 1
    yield Setting("train.num_train_epochs", epochs, "passes over the rows")
    if is_small:
        yield Setting("train.packing", False, "few rows: packs of them would make few steps")
    elif method not in PREFERENCE_METHODS:
        num_packs = rows.num_usable * lengths.statistics.mean / length
        batch = next((each for each in (8, 4, 2) if num_packs > _ENOUGH_STEPS * each), 1)
        yield Setting("train.global_batch_size", batch, "packs of rows per optimizer step")


def _steps_on_cpu(rows: Rows, lengths: Lengths, length: int) -> tuple[int, int | None]:
    """Return the global batch size, and the optimizer steps; None if whole passes are short."""
    num_train = max(1.0, rows.num_usable - _num_heldout(rows, True)) * (1 - _EVAL_SHARE)
    mean = lengths.statistics.mean
    if rows.proposal.method in PREFERENCE_METHODS:
        # Pairs are not packed, and the reference model reads them too.
        batch, tokens_per_step = _PAIRS_ON_CPU, 3 * _PAIRS_ON_CPU * min(mean, length)
        passes = _EPOCHS_ON_CPU * num_train / batch
    else:
        batch, tokens_per_step = _BATCH_ON_CPU, _BATCH_ON_CPU * length
        passes = _EPOCHS_ON_CPU * num_train * mean / tokens_per_step
    steps = max(_MIN_STEPS, int(_TOKENS_ON_CPU / tokens_per_step))
    return batch, steps if steps < passes else None


def _quantize(on_cpu: bool) -> Iterator[Setting]:
    if on_cpu:
        yield Setting(
            "quantize.gguf",
            ["q8_0"],
            "for `tuneline chat`, llama.cpp and Ollama; q4_k_m is smaller",
        )
        yield Setting("quantize.gptq", [], "[gptq-4bit] makes one for vLLM and transformers")
    else:
        yield Setting("quantize.gguf", ["q8_0", "q4_k_m"], "for llama.cpp and Ollama")
        yield Setting("quantize.gptq", ["gptq-4bit"], "for vLLM and transformers")


def _tasks(rows: Rows) -> tuple[list[str], str]:
    """Return the tasks of the evaluation, of which the first is the target, and their reason."""
    if rows.proposal.method == "dpo":
        return ["heldout_choice"], "is the chosen answer likelier than the rejected one?"
    if rows.proposal.method == "sft" and rows.has_choices:
        return ["heldout_choice", "heldout_exact"], "picks the right answer; writes it"
    tasks, why = ["heldout_perplexity"], "how likely the held-out answers are"
    if rows.proposal.method == "sft":
        sizes = sorted(len(texts_of(example)[1]) for example in rows.examples)
        if sizes[int(0.95 * (len(sizes) - 1))] <= _MAX_CHARACTERS_OF_EXACT:
            tasks, why = [*tasks, "heldout_exact"], f"{why}; whether it writes them word for word"
    return tasks, why


def _evaluate(rows: Rows, lengths: Lengths, on_cpu: bool) -> Iterator[Setting]:
    """Yield the settings of the evaluation and of the gate."""
    tasks, why = _tasks(rows)
    yield Setting("evaluate.tasks", tasks, why)
    if on_cpu:
        why = "8 also measures what examples in the prompt give, in minutes more"
        yield Setting("evaluate.num_examples", 0, why)
    shown = min(lengths.answer_p99, _LONGEST_SHOWN)
    if rows.proposal.method == "sft" and shown > EvaluateConfig().max_new_tokens:
        why = "of each answer in the report"
        if shown == lengths.answer_p99:
            why += f"; 99 % of the answers have at most {lengths.answer_p99} tokens"
        yield Setting("evaluate.max_new_tokens", shown, why)
    yield Setting(
        "gate.target_tasks",
        tasks[:1],
        "has to improve for the model to be published"
        + ("; the other must not get worse" if tasks[1:] else ""),
    )
    if tasks[1:]:
        held = _num_heldout(rows, on_cpu)
        margins = (hundredths / 100 for hundredths in range(5, 100))
        margin = next((each for each in margins if samples_for_margin(each, 1) <= held), 1.0)
        yield Setting(
            "gate.max_regression", margin, f"the smallest loss that {held} questions can exclude"
        )


def _placement(machine: Machine, on_cpu: bool) -> Iterator[Setting]:
    if not on_cpu and machine.profile is not None:
        yield Setting(
            "placement.profile", machine.profile, "for `plan` and for a cluster with such GPUs"
        )
