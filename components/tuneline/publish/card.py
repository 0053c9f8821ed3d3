"""The model card: what it is, what it was made from, what it scored, how to run it."""

import re
from typing import TYPE_CHECKING, Any

import yaml

from tuneline.artifacts import PUBLISHED_BUNDLE, QuantizedModel
from tuneline.publish.config import PublishConfig
from tuneline.publish.licences import licence_fields
from tuneline.publish.usage import usage

if TYPE_CHECKING:
    from tuneline.publish.staging import Kind, Sources

_TITLES = {
    "adapter": "LoRA adapter",
    "merged": "merged model",
    "gguf": "GGUF files",
    "gptq": "GPTQ checkpoint",
}
_DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md")
"""Of a file in a directory, whose path looks like a Hub id: data/rows.jsonl."""
CURVE_POINTS = 10
"""Rows of the training curve, evaluations not counted."""

_LIBRARIES = {"adapter": "peft", "merged": "transformers", "gguf": "gguf", "gptq": "transformers"}


def model_card(
    sources: "Sources",
    *,
    repo: str,
    kind: "Kind",
    all_repos: "dict[str, Kind]",
    config: PublishConfig,
) -> str:
    """Return the README.md of one repository."""
    name = repo.rsplit("/", 1)[-1]
    parts = [
        f"---\n{_yaml(_front_matter(sources, kind, config))}---",
        f"# {name}: {_TITLES[kind]}",
        sources.recipe.description,
        _made_from(sources),
        _curve(sources),
        _scores(sources),
        _exports(sources),
        usage(sources, repo=repo, all_repos=all_repos),
        "## Recipe",
        f"```yaml\n{_yaml(_public(sources.recipe.model_dump(mode='json')))}```",
        "## In this family",
        "\n".join(f"- `{other}`: {_TITLES[other_kind]}" for other, other_kind in all_repos.items()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(sources: "Sources", kind: "Kind", config: PublishConfig) -> dict[str, Any]:
    matter: dict[str, Any] = {
        "library_name": _LIBRARIES[kind],
        "pipeline_tag": "text-generation",
        "tags": ["tuneline", sources.training.method, *config.tags],
    }
    matter |= licence_fields(config.licence or sources.origin.licence)
    # Only names that mean the same on another machine: a revision says that it is a Hub id.
    if sources.origin.revision:
        matter["base_model"] = sources.origin.source
        matter["base_model_relation"] = "adapter" if kind == "adapter" else "finetune"
        if kind in ("gguf", "gptq"):
            matter["base_model_relation"] = "quantized"
    name = sources.dataset.source
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.lower().endswith(_DATA_SUFFIXES):
        matter["datasets"] = [name]
    return matter


def _made_from(sources: "Sources") -> str:
    origin, data, training = sources.origin, sources.dataset, sources.training
    revision = f" at `{origin.revision}`" if origin.revision else ""
    lines = [
        "## Made from",
        f"- base: `{_public(origin.source)}`{revision}, {origin.num_parameters:,} parameters, "
        f"licence {origin.licence or 'not stated'}, weights sha256 `{origin.sha256[:16]}`",
        f"- data: `{_public(data.source)}`, {data.num_train_rows:,} rows to train, "
        f"{data.num_eval_rows:,} for the evaluation loss, {data.num_heldout_rows:,} held out, "
        f"licence {data.licence or 'not stated'}, sha256 `{data.sha256[:16]}`",
        f"- training: {training.method}, {training.num_steps:,} steps, {training.num_tokens:,} "
        f"tokens, base in {training.base_quantization}, {training.num_trainable_parameters:,} "
        f"trainable parameters, loss {training.final_loss:.3f}"
        + (
            f", evaluation loss {training.first_eval_loss:.3f} -> {training.final_eval_loss:.3f}"
            if training.first_eval_loss is not None and training.final_eval_loss is not None
            else ""
        ),
        f"- merge: onto the {sources.merge.base} base weights{_bases(sources)}; mean KL to the "
        f"trained model {sources.merge.mean_kl:.1e} nats a token, same first choice on "
        f"{sources.merge.top1_agreement:.1%} of positions",
        f"- versions: {_versions(training.environment)}; seed {sources.recipe.train.seed}; all "
        f"hashes in `{PUBLISHED_BUNDLE}`, which `tuneline verify DIR` holds against the files",
    ]
    return "\n".join([lines[0], "", *lines[1:]])


def _versions(environment: dict[str, str]) -> str:
    named = ("image", "tuneline", "kernels", "torch", "transformers", "peft", "trl", "bitsandbytes")
    found = [f"{name} {environment[name]}" for name in named if name in environment]
    return ", ".join(found) or "not recorded"


def _curve(sources: "Sources") -> str:
    """Return some points of the losses; a card shows no picture that is not a file of its own."""
    history = [
        point
        for point in sources.training.history
        if point.loss is not None or point.eval_loss is not None
    ]
    if not history:
        return ""
    shown = {round(n * (len(history) - 1) / (CURVE_POINTS - 1)) for n in range(CURVE_POINTS)}
    rows = [
        f"| {point.step} | {_measured(point.loss, '.3f')} | {_measured(point.eval_loss, '.3f')} |"
        for number, point in enumerate(history)
        if number in shown or point.eval_loss is not None
    ]
    head = "| step | training loss | evaluation loss |"
    return "\n".join(["## Training curve", "", head, "|---|---|---|", *rows])


def _bases(sources: "Sources") -> str:
    losses = sources.merge.base_losses
    if len(losses) < 2:
        return ""
    measured = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
    return f" (held-out loss by base: {measured})"


def _scores(sources: "Sources") -> str:
    rows = [
        f"| {score.task} | {score.metric} | {score.base:.4f} | {score.tuned:.4f} | "
        f"{score.difference:+.4f} | [{score.interval[0]:+.4f}, {score.interval[1]:+.4f}] | "
        f"{score.num_samples} |"
        for score in sources.decision.comparisons
    ]
    head = "| task | metric | base | tuned | better by | 95 % interval | samples |"
    note = (
        f"{sources.decision.reason}\n\nThe interval is a paired bootstrap over the same samples; "
        "positive is better."
    )
    return "\n".join(["## Scores", "", head, "|---|---|---|---|---|---|---|", *rows, "", note])


def _exports(sources: "Sources") -> str:
    if not sources.exports:
        return ""
    rows = [
        f"| {export.format} | {export.num_bytes / 1e6:.1f} MB | {export.bits_per_weight:.2f} | "
        f"{_measured(export.mean_kl, '.1e')} | {_measured(export.top1_agreement, '.1%')} | "
        f"{_measured(export.perplexity, '.3f')} | {_measured(export.benchmark_score, '.1%')} | "
        f"{_measured(export.tokens_per_second, '.0f')} | {_checks(export)} | "
        f"{_cell('; '.join(export.notes))} |"
        for export in sources.exports.values()
    ]
    head = (
        "| format | size | bits a weight | mean KL | same first choice | perplexity | benchmark "
        "| tokens/s | checks | notes |"
    )
    merged = next(
        (e.reference_perplexity for e in sources.exports.values() if e.reference_perplexity), None
    )
    note = (
        "Mean KL (nats a token), the share of positions with the same most likely token, and "
        "perplexity are measured against the merged model "
        f"(perplexity {_measured(merged, '.3f')}), on rows that training did not see; tokens/s "
        f"on a CPU, one sequence.{_benchmark(sources)}"
    )
    return "\n".join(["## Exports", "", head, f"|{'---|' * 10}", *rows, "", note])


def _checks(export: QuantizedModel) -> str:
    """Say what was proved of a file beyond the numbers."""
    answer = _cell(export.generated)
    found = [f'loaded, answered "{answer}"' if answer else "loaded"]
    if export.num_tokenizer_texts:
        found.append(f"{export.num_tokenizer_texts} texts split as by the tokenizer")
    if export.num_conversations:
        found.append(f"{export.num_conversations} chats rendered as by the template")
    if export.stop_tokens:
        found.append(f"stops at {', '.join(f'`{_cell(text)}`' for text in export.stop_tokens)}")
    return "; ".join(found)


def _benchmark(sources: "Sources") -> str:
    scored = next((export for export in sources.exports.values() if export.benchmark), None)
    if scored is None:
        return ""
    return (
        f" Benchmark: {scored.benchmark} on {scored.num_benchmark_rows} of them, on which the "
        f"merged model has {_measured(scored.reference_benchmark_score, '.1%')}."
    )


def _measured(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:120]


def _public(value: Any) -> Any:
    """Shorten paths of the machine that made it to their last part."""
    if isinstance(value, dict):
        return {key: _public(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_public(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"^(dir:)?/(?:.*/)?([^/]+)/?$", r"\1\2", value)
    return value
