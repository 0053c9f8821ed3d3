"""The recipe of a run as the records of its steps state it.

A run may have other values than its recipe: KFP's UI starts a compiled pipeline with other
parameters, and the recipe that it was compiled from stays as it was. Therefore page, model card and
tuneline.json take each section from the record of the step that used it.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tuneline.artifacts import (
    DatasetManifest,
    Decision,
    MergeProof,
    ModelOrigin,
    QuantizedModel,
    RunHeader,
    TrainingSummary,
)
from tuneline.kinds import EXPORT_KINDS
from tuneline.runtime.parameter_text import decode_list
from tuneline.runtime.redaction import redacted, without_secrets
from tuneline.runtime.source_names import is_hub_id

MAX_SHOWN_DIFFERENCES = 20

PRIVATE_SECTIONS = ("placement", "notify")
"""Sections that are not published: registry, secrets and names of a cluster, and who is told."""
PRIVATE_KEYS = {"train": ("sample_prompts", "price_per_hour", "max_cost")}
"""Keys that are not published, by their sections: texts and prices of those who ran it."""


@dataclass(frozen=True)
class RecordedRecipe:
    """A recipe with the values that a run had, without secrets."""

    values: dict[str, Any]
    """The recipe, in the order of its keys."""
    given: dict[str, Any]
    """The recipe that the run was started with."""

    @property
    def differences(self) -> tuple[str, ...]:
        """Return a phrase per value that the run had instead of its recipe's."""
        return tuple(_differences(self.given, self.values))

    def public(self) -> "RecordedRecipe":
        """Return the recipe without what concerns only those who ran it, for publication.

        Of a path, the last part is left.
        """
        return RecordedRecipe(_public(self.values), _public(self.given))

    @property
    def sha256(self) -> str:
        """Return the SHA-256 of the values, which does not depend on the order of keys."""
        return hashlib.sha256(json.dumps(self.values, sort_keys=True).encode()).hexdigest()

    @property
    def remark(self) -> str:
        """Return a paragraph that lists the differences; empty if there are none."""
        if not self.differences:
            return ""
        shown = self.differences[:MAX_SHOWN_DIFFERENCES]
        more = len(self.differences) - len(shown)
        return (
            "The run was started with other values than its recipe has: "
            f"{'; '.join(shown)}{f'; and {more} more' if more else ''}. All values shown here are "
            "those of the run."
        )


def recorded_recipe(
    header: RunHeader,
    *,
    origin: ModelOrigin,
    dataset: DatasetManifest,
    training: TrainingSummary,
    merge: MergeProof,
    exports: Sequence[QuantizedModel],
    decision: Decision,
    target: str,
    publish: Mapping[str, Any],
) -> RecordedRecipe:
    """Return the recipe that the records of a run amount to.

    A section that no record has, such as placement, is that of the recipe.

    Args:
        header: the recipe that the run was started with.
        origin: record of the base model.
        dataset: record of the dataset.
        training: record of the adapter.
        merge: record of the merged model.
        exports: records of the exports.
        decision: record of the gate's decision.
        target: where the run publishes, as the pipeline's parameter.
        publish: the section `publish` that the run has.
    """
    given = header.model_dump(mode="json")
    evaluated = decision.made_from.get("tuned_scores")
    used: dict[str, Mapping[str, Any]] = {
        "fetch": origin.settings,
        "prepare": dataset.settings,
        "train": training.settings,
        "merge": merge.settings,
        "quantize": _quantize(exports),
        "evaluate": evaluated.settings if evaluated else {},
        "gate": decision.settings,
        "publish": publish,
    }
    values = {**given, "base_model": origin.source}
    values["publish_to"] = decode_list(target)
    if given.get("dataset") is not None:
        values["dataset"] = dataset.source
    elif _mixture(given.get("datasets")) != (used_mixture := _mixture(dataset.sources)):
        values["datasets"] = used_mixture
    values |= {name: dict(section) for name, section in used.items() if section}
    return RecordedRecipe(without_secrets(values), without_secrets(given))


def _mixture(datasets: Sequence[Any] | None) -> list[dict[str, Any]]:
    """Return source and weight of each dataset of a recipe or of a record."""
    entries = [
        entry if isinstance(entry, Mapping) else entry.model_dump() for entry in datasets or ()
    ]
    return [
        {"source": redacted(entry["source"]), "weight": entry.get("weight", 1.0)}
        for entry in entries
    ]


def _quantize(exports: Sequence[QuantizedModel]) -> dict[str, Any]:
    """Return the section `quantize`, with the formats that were made."""
    settings = next((export.settings for export in exports if export.settings), None)
    if settings is None:
        return {}
    formats = {
        kind: [export.format for export in exports if export.kind == kind] for kind in EXPORT_KINDS
    }
    # The formats are fixed in the compiled pipeline; a parameter cannot change them.
    return {**settings, **{kind: names for kind, names in formats.items() if kind in settings}}


def _public(recipe: Mapping[str, Any]) -> dict[str, Any]:
    values = {key: value for key, value in recipe.items() if key not in PRIVATE_SECTIONS}
    for section, keys in PRIVATE_KEYS.items():
        if isinstance(values.get(section), dict):
            values[section] = {k: v for k, v in values[section].items() if k not in keys}
    targets = values.get("publish_to")
    if isinstance(targets, list):
        # Of several targets, buckets and claims concern only those who ran it.
        kinds = [each.partition(":")[0] for each in targets]
        values["publish_to"] = next(filter(is_hub_id, targets), kinds)
    return {key: without_paths(value) for key, value in values.items()}


def without_paths(value: Any) -> Any:
    """Return a plain value with every absolute path in it shortened to the last part."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"^(dir:|file://)?[/~](?:.*/)?([^/]+)/?$", r"\1\2", value)
    return value


def _differences(given: Any, used: Any, name: str = "") -> Iterator[str]:
    """Yield a phrase for each value that differs.

    A section, or a key of one, that only one of them has is skipped, because it has a default.

    Args:
        given: the recipe, or a value in it.
        used: the same of the run.
        name: dotted name of the value; "" for the whole recipe.
    """
    if isinstance(given, dict) and isinstance(used, dict):
        for key in dict.fromkeys((*given, *used)):
            inner = f"{name}.{key}" if name else key
            if key in given and key in used:
                yield from _differences(given[key], used[key], inner)
            elif "." in name and key in used:
                yield f"{inner} was {_short(used[key])}, the recipe does not set it"
            elif "." in name:
                yield f"{inner} was not set, the recipe has {_short(given[key])}"
    elif given != used and not _are_alike(name, given, used):
        yield f"{name} was {_short(used)}, the recipe has {_short(given)}"


def _are_alike(name: str, given: Any, used: Any) -> bool:
    """Return whether two values mean the same, i.e. are the same formats in another order."""
    if name.startswith("quantize.") and isinstance(given, list) and isinstance(used, list):
        return sorted(map(str, given)) == sorted(map(str, used))
    return False


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
