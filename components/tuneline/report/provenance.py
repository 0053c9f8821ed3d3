"""The section with hashes, versions and the recipe."""

from html import escape

import yaml

from tuneline.html.page import Cell, badge, details, facts, section, table
from tuneline.report.records import Line
from tuneline.runtime.redaction import redacted

TRAINED_WITH = ("torch", "transformers", "peft", "trl")


def provenance(line: Line) -> str:
    """Return the hashes, the versions and the recipe."""
    origin, dataset, adapter = line.origin, line.dataset, line.training
    rows = [
        [
            "base model",
            redacted(origin.source),
            _code(origin.sha256),
            origin.licence or "not stated",
        ],
        [
            "dataset",
            redacted(dataset.source),
            _code(dataset.sha256),
            dataset.licence or "not stated",
        ],
        [
            "adapter",
            "trained on the two above",
            Cell(
                f"{_same('base model', adapter.base_sha256, origin.sha256)} "
                f"{_same('dataset', adapter.dataset_sha256, dataset.sha256)}"
            ),
            "",
        ],
    ]
    tuneline = sorted({record.tuneline for record in (origin, dataset, adapter, line.decision)})
    left = [
        ("Architecture of the base model", origin.architecture),
        ("Revision of the base model", origin.revision or "none: a local source"),
        ("Weights of the base model", origin.stored_as or "not quantised"),
        ("Base model fetched", origin.created_at),
    ]
    versions = [f"{name} {adapter.environment.get(name, '-')}" for name in TRAINED_WITH]
    right = [
        ("tuneline", ", ".join(tuneline)),
        ("Trained with", ", ".join(versions)),
        ("Kernels", adapter.environment.get("kernels", "-")),
        ("Seed of the training", str(adapter.settings.get("seed", "-"))),
        ("Evaluated with", line.tuned_scores.harness),
        ("Time of the decision", line.decision.created_at),
    ]
    text = yaml.safe_dump(line.recipe.values, sort_keys=False, allow_unicode=True, width=100)
    return section(
        "Provenance",
        table(["artifact", "source", "SHA-256", "licence"], rows),
        f'<div class="pair">{facts(left)}{facts(right)}</div>',
        details("The recipe, with all defaults", f"<pre>{escape(text)}</pre>"),
    )


def _code(text: str) -> Cell:
    return Cell(f'<code title="{escape(text)}">{escape(text[:16])}</code>')


def _same(name: str, recorded: str, actual: str) -> Cell:
    if recorded == actual:
        return badge(f"{name}: same hash", "good")
    return badge(f"{name}: another hash, {recorded[:12]}", "bad")
