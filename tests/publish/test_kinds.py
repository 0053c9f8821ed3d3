"""A kind of repository or export is known everywhere, or a test fails."""

from typing import get_args

from tuneline.kinds import EXPORT_KINDS, KINDS, RepoKind
from tuneline.pipelines.finetune import EXPORTERS
from tuneline.publish.component import publish
from tuneline.publish.usage import USAGE
from tuneline.quantize.config import QuantizeConfig
from tuneline.report.component import report


def test_every_kind_has_its_traits_and_its_paragraph() -> None:
    assert set(KINDS) == set(get_args(RepoKind))
    checkpoints = {kind for kind, traits in KINDS.items() if traits.has_repo_per_format}
    assert set(KINDS) - set(USAGE) == checkpoints | {"merged"}
    assert set(EXPORT_KINDS) < set(KINDS)
    suffixes = [traits.suffix for traits in KINDS.values()]
    assert len(set(suffixes)) == len(suffixes), "two kinds would share a repository"
    for kind in EXPORT_KINDS:
        assert KINDS[kind].runs_with and KINDS[kind].base_model_relation == "quantized"


def test_every_kind_of_export_is_made_and_reaches_report_and_publish() -> None:
    assert set(EXPORTERS) == set(EXPORT_KINDS) <= set(QuantizeConfig.model_fields)
    for component in (publish, report):
        inputs = component.component_spec.inputs
        assert {name for name, item in inputs.items() if item.is_artifact_list} == set(EXPORT_KINDS)
        assert all(inputs[kind].optional for kind in EXPORT_KINDS)


def test_a_format_with_a_repository_of_its_own_begins_with_its_kind() -> None:
    """The key of a published repository's metadata is read from its name."""
    properties = QuantizeConfig.model_json_schema()["properties"]
    for kind in EXPORT_KINDS:
        formats = properties[kind]["items"]["enum"]
        assert formats
        if KINDS[kind].has_repo_per_format:
            assert all(name.startswith(f"{kind}-") for name in formats)
