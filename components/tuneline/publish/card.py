"""The model card: what the model was made from, its scores, and how to run it."""

import re
from collections.abc import Sequence
from typing import Any

import yaml

from tuneline.artifacts import (
    PUBLISHED_BUNDLE,
    DatasetManifest,
    MergeProof,
    QuantizedModel,
    TrainingPoint,
)
from tuneline.html.markdown import code, code_block, escape_markdown
from tuneline.publish.card_parts import CardParts
from tuneline.publish.config import PublishConfig
from tuneline.publish.licences import licence_fields
from tuneline.publish.sources import Repository, Sources
from tuneline.publish.usage import usage
from tuneline.recorded_recipe import RecordedRecipe, without_paths
from tuneline.runtime.redaction import redacted
from tuneline.runtime.source_names import is_data_file
from tuneline.training_figures import training_figures

CURVE_POINTS = 10
"""Evenly spaced training points in the card's table; points with an evaluation are added."""

_VERSIONS = ("image", "tuneline", "kernels", "torch", "transformers", "peft", "trl", "bitsandbytes")


def model_card(
    sources: Sources,
    repo: Repository,
    *,
    family: Sequence[Repository],
    config: PublishConfig,
    recipe: RecordedRecipe,
    run_id: str = "",
) -> CardParts:
    """Return the README.md of one repository.

    Args:
        sources: the artifacts of the run.
        repo: the repository of the card.
        family: all repositories of the run.
        config: the `publish` section of the recipe.
        recipe: the recipe as the records of the run state it, without what is private.
        run_id: ID of the run; "" if it is not known.
    """
    parts = [
        f"# {repo.short_name}: {repo.traits.title}",
        escape_markdown(redacted(sources.header.description)),
        _made_from(sources, recipe, run_id),
        _training(sources),
        _curve(sources),
        _scores(sources),
        _exports(sources),
        usage(sources, repo, family),
        _recipe(recipe),
        "## Repositories of this run",
        "\n".join(f"- `{other.name}`: {other.traits.title}" for other in family),
    ]
    body = "\n\n".join(part for part in parts if part)
    return CardParts(_front_matter(sources, repo, family, config), "", body, "")


def _front_matter(
    sources: Sources, repo: Repository, family: Sequence[Repository], config: PublishConfig
) -> dict[str, Any]:
    """Return the metadata of a card, which the Hub reads.

    Args:
        sources: the artifacts of the run.
        repo: the repository of the card.
        family: all repositories of the run.
        config: the `publish` section of the recipe.
    """
    matter: dict[str, Any] = {
        "library_name": repo.traits.library_name,
        "pipeline_tag": "text-generation",
        "tags": ["tuneline", sources.training.method, *config.tags],
    }
    matter |= licence_fields(config.licence or sources.origin.licence)
    if base := _base_model(sources, repo, family):
        matter["base_model"] = base
        matter["base_model_relation"] = repo.traits.base_model_relation
    if hub_ids := _hub_datasets(sources.dataset):
        matter["datasets"] = hub_ids
    return matter


def _base_model(sources: Sources, repo: Repository, family: Sequence[Repository]) -> str | None:
    """Return the Hub ID of the model that a repository is based on; None if it is not on the Hub.

    Readers cannot use a path on this machine, and on the Hub, the name of a folder could be that of
    another model.
    """
    if repo.exports:
        # An export is a quantisation of the tuned model, not of the model that was tuned.
        tuned = next(other for other in family if other.kind == "merged")
        return tuned.name if tuned.is_on_hub else None
    # Only a Hub ID has a revision.
    return sources.origin.source if sources.origin.revision else None


def _hub_datasets(dataset: DatasetManifest) -> list[str]:
    """Return the Hub IDs of the data; the names of local files are not published."""
    if dataset.hub_ids is not None:
        return dataset.hub_ids
    # The record of an older tuneline, by which a directory data/rows cannot be told from an ID.
    name = dataset.source
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not is_data_file(name)
    return [name] if is_id else []


def _data_names(dataset: DatasetManifest) -> list[str]:
    return [entry.source for entry in dataset.sources] or [dataset.source]


def _recipe(recipe: RecordedRecipe) -> str:
    remark = escape_markdown(recipe.remark)
    block = code_block(_yaml(recipe.values), "yaml")
    return "\n\n".join(part for part in ("## Recipe", remark, block) if part)


def _made_from(sources: Sources, recipe: RecordedRecipe, run_id: str) -> str:
    origin, data, training = sources.origin, sources.dataset, sources.training
    revision = f" at {code(origin.revision)}" if origin.revision else ""
    names = ", ".join(code(without_paths(redacted(name))) for name in _data_names(data))
    lines = [
        f"- base model: {code(without_paths(redacted(origin.source)))}{revision}, "
        f"{origin.num_parameters:,} parameters, "
        f"{f'weights in {origin.stored_as}, ' if origin.stored_as else ''}licence "
        f"{escape_markdown(origin.licence or 'not stated')}, SHA-256 of the weights "
        f"`{origin.sha256[:16]}`",
        f"- dataset: {names}, {data.num_train_rows:,} "
        f"training rows, {data.num_eval_rows:,} evaluation rows, {data.num_heldout_rows:,} "
        f"held-out rows, licence {escape_markdown(data.licence or 'not stated')}, SHA-256 "
        f"`{data.sha256[:16]}`",
        f"- merge: the adapter was added to the {sources.merge.base} base weights{_bases(sources)}."
        f" Compared with base model plus adapter, the mean KL divergence is "
        f"{sources.merge.mean_kl:.1e} nats per token, and {sources.merge.top1_agreement:.1%} of "
        "positions have the same most likely token",
        f"- versions: {escape_markdown(_versions(training.environment))}; seed "
        f"{training.settings.get('seed', 'not recorded')}",
        f"- published by: {f'run {code(run_id)}, ' if run_id else ''}recipe "
        f"{code(sources.header.name)}, SHA-256 `{recipe.sha256[:16]}`",
        f"- hashes of all files: in `{PUBLISHED_BUNDLE}`; `tuneline verify DIR` checks a copy of "
        "this repository",
    ]
    return "\n".join(["## Made from", "", *lines])


def _bases(sources: Sources) -> str:
    losses = sources.merge.base_losses
    if len(losses) < 2:
        return ""
    measured = ", ".join(f"{loss:.3f} on {name}" for name, loss in losses.items())
    return f" (held-out loss: {measured})"


def _versions(environment: dict[str, str]) -> str:
    versions = [f"{name} {environment[name]}" for name in _VERSIONS if name in environment]
    return ", ".join(versions) or "not recorded"


def _training(sources: Sources) -> str:
    rows = [
        f"| {figure.label} | {_cell(figure.text)} |"
        for figure in training_figures(sources.training)
    ]
    return "\n".join(["## Training", "", "| figure | value |", "|---|---|", *rows])


def _curve(sources: Sources) -> str:
    """Return a table with some points of the loss curves."""
    history = [
        point
        for point in sources.training.history
        if point.loss is not None or point.eval_loss is not None
    ]
    if not history:
        return ""
    drawn = {round(n * (len(history) - 1) / (CURVE_POINTS - 1)) for n in range(CURVE_POINTS)}
    rows = [
        _curve_row(point)
        for index, point in enumerate(history)
        if index in drawn or point.eval_loss is not None
    ]
    head = "| step | training loss | evaluation loss |"
    return "\n".join(["## Training curve", "", head, "|---|---|---|", *rows])


def _curve_row(point: TrainingPoint) -> str:
    return (
        f"| {point.step} | {_measured(point.loss, '.3f')} | {_measured(point.eval_loss, '.3f')} |"
    )


def _scores(sources: Sources) -> str:
    rows = [
        f"| {_cell(score.title)} | {score.role} | {_cell(score.metric)} | {score.base:.4f} | "
        f"{score.tuned:.4f} | "
        f"{score.difference:+.4f} | [{score.interval[0]:+.4f}, {score.interval[1]:+.4f}] | "
        f"{score.num_samples} |"
        for score in sources.decision.comparisons
    ]
    head = "| task | role | metric | base | tuned | improvement | 95 % interval | samples |"
    notes = [
        f"Why it was published: {escape_markdown(sources.decision.reason)}",
        *map(escape_markdown, sources.decision.remarks),
        "Both models answered the same samples. A positive improvement is better in every metric. "
        "Guards are tasks that must not get worse. The control, prompt_dependence, is how much "
        "likelier an answer is after its own prompt than after another row's. Prompted is a "
        "comparison with the base model that sees training rows in its prompt.",
    ]
    table = "\n".join(["## Scores", "", head, "|---|---|---|---|---|---|---|---|", *rows])
    return "\n\n".join([table, *notes])


def _exports(sources: Sources) -> str:
    if not sources.exports:
        return ""
    exports = list(sources.exports.values())
    rows = [
        f"| {export.format} | {export.num_bytes / 1e6:.1f} MB | {export.bits_per_weight:.2f} | "
        f"{_measured(export.mean_kl, '.1e')} | {_measured(export.top1_agreement, '.1%')} | "
        f"{_measured(export.perplexity, '.3f')} | {_measured(export.benchmark_score, '.1%')} | "
        f"{_measured(export.tokens_per_second, '.0f')} | {_checks(export)} | "
        f"{_notes(export, sources.merge)} |"
        for export in exports
    ]
    head = (
        "| format | size | bits per weight | mean KL | top-1 agreement | perplexity | benchmark "
        "| tokens per second | checks | notes |"
    )
    merged = next((e.reference_perplexity for e in exports if e.reference_perplexity), None)
    note = (
        "Every export is compared with the merged model "
        f"(perplexity {_measured(merged, '.3f')}) on rows that were not used for training. Mean KL "
        "is the KL divergence in nats per token. Top-1 agreement is the fraction of positions with "
        "the same most likely token up to a near tie (0.1 logits). The speed is that of one "
        "sequence on a CPU."
        f"{_benchmark(exports)}"
    )
    verdicts = [
        f"- {item.format}{' is not published' if item.is_held else ''}: "
        f"{escape_markdown(item.reason)}"
        for item in sources.decision.exports
    ]
    return "\n".join(["## Exports", "", head, f"|{'---|' * 10}", *rows, "", note, "", *verdicts])


def _notes(export: QuantizedModel, merge: MergeProof) -> str:
    lost = escape_markdown(export.loss_of_tuning(merge))
    return "; ".join(filter(None, [_cell("; ".join(export.notes)), lost]))


def _checks(export: QuantizedModel) -> str:
    """Return the checks that an export passed, except those that have a separate column."""
    answer = _cell(export.generated)  # text of the model
    checks = [f'loads and answers "{answer}"' if answer else "loads"]
    if export.num_tokenizer_texts:
        checks.append(f"same tokens as the tokenizer on {export.num_tokenizer_texts} texts")
    if export.num_conversations:
        checks.append(f"same chat template on {export.num_conversations} conversations")
    if export.stop_tokens:
        checks.append(f"stops at {', '.join(code(text) for text in export.stop_tokens)}")
    return "; ".join(checks)


def _benchmark(exports: Sequence[QuantizedModel]) -> str:
    scored = next((export for export in exports if export.benchmark), None)
    if scored is None:
        return ""
    return (
        f" The benchmark is {_cell(scored.benchmark or '')} on {scored.num_benchmark_rows} of "
        f"these rows; the merged model scores {_measured(scored.reference_benchmark_score, '.1%')}."
    )


def _measured(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def _cell(text: str) -> str:
    """Return text for a cell of a Markdown table, on one line."""
    return escape_markdown(text, max_length=120)
