"""A kind of repository or export is known everywhere, or a test fails."""

from types import SimpleNamespace
from typing import Any, get_args

import pytest

from tuneline.artifacts import RunHeader
from tuneline.errors import RecipeError
from tuneline.gate.component import gate
from tuneline.kinds import EXPORT_KINDS, KINDS, RepoKind
from tuneline.pipelines.finetune import EXPORTERS
from tuneline.publish.component import publish
from tuneline.publish.usage import USAGE
from tuneline.quantize import formats
from tuneline.quantize.config import QuantizeConfig
from tuneline.report.component import report

RETURNED = "Output"
"""Name that KFP gives the value that a component returns."""


def test_every_kind_has_its_traits_and_its_paragraph() -> None:
    assert set(KINDS) == set(get_args(RepoKind))
    checkpoints = {kind for kind, traits in KINDS.items() if traits.has_repo_per_format}
    assert set(KINDS) - set(USAGE) == checkpoints | {"merged"}
    assert set(EXPORT_KINDS) < set(KINDS)
    for kind in EXPORT_KINDS:
        assert KINDS[kind].runs_with and KINDS[kind].base_model_relation == "quantized"


def test_no_two_kinds_share_a_repository() -> None:
    owners: dict[str, str] = {}
    for kind, traits in KINDS.items():
        names = formats.names(kind) if kind in EXPORT_KINDS else [""]
        for repo in {traits.suffix.format(format=name) for name in names}:
            assert owners.setdefault(repo, kind) == kind, f"{repo!r}: {owners[repo]} and {kind}"


def test_every_kind_of_export_is_made_and_reaches_gate_report_and_publish() -> None:
    assert set(EXPORTERS) == set(EXPORT_KINDS) <= set(QuantizeConfig.model_fields)
    for component in (gate, publish, report):
        inputs = component.component_spec.inputs
        assert {name for name, item in inputs.items() if item.is_artifact_list} == set(EXPORT_KINDS)
        assert all(inputs[kind].optional for kind in EXPORT_KINDS)


@pytest.mark.parametrize("component", [gate, publish, report])
def test_the_components_hand_on_one_export_of_each_kind(
    component: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KFP ships the body of a component, which names every kind by hand."""
    called: dict[str, Any] = {}

    def run(config: Any, **settings: Any) -> Any:
        called.update(settings)
        return SimpleNamespace(metadata=dict, held_exports=dict, verdict="hold", reason="")

    monkeypatch.setattr(f"tuneline.{component.name}.run.run", run)
    monkeypatch.setattr(RunHeader, "parse", lambda recipe: recipe)
    spec = component.component_spec
    arguments: dict[str, Any] = {
        name: SimpleNamespace(path=f"at/{name}", metadata={})
        for name in (*spec.inputs, *(name for name in spec.outputs if name != RETURNED))
    }
    texts = dict.fromkeys(("config", "recipe", "target"), "{}").items()
    arguments.update({name: text for name, text in texts if name in spec.inputs})
    for kind in EXPORT_KINDS:
        arguments[kind] = [SimpleNamespace(path=f"at/{kind}")]
    component.python_func(**arguments)
    assert sorted(called["exports_dirs"]) == sorted(f"at/{kind}" for kind in EXPORT_KINDS)
    for kind in EXPORT_KINDS:
        component.python_func(**{**arguments, **dict.fromkeys(EXPORT_KINDS), kind: arguments[kind]})
        assert called["exports_dirs"] == [f"at/{kind}"]


@pytest.mark.parametrize("kind", EXPORT_KINDS)
def test_a_recipe_names_each_format_of_a_kind_once(kind: Any) -> None:
    name = formats.names(kind)[0]
    with pytest.raises(RecipeError, match=f"{name} is named more than once"):
        QuantizeConfig.parse({kind: [name, name]})


def test_a_format_with_a_repository_of_its_own_begins_with_its_kind() -> None:
    """The key of a published repository's metadata is read from its name."""
    properties = QuantizeConfig.model_json_schema()["properties"]
    for kind in EXPORT_KINDS:
        formats = properties[kind]["items"]["enum"]
        assert formats
        if KINDS[kind].has_repo_per_format:
            assert all(name == kind or name.startswith(f"{kind}-") for name in formats)
