"""Texts that KFP, Argo and Kubernetes would change reach a step unchanged."""

import importlib
import inspect
import json
import re
from types import SimpleNamespace

import pytest

from tuneline.runtime.parameter_text import decode_text, encode_text, find_replaced, to_json
from tuneline.runtime.step import set_metadata
from tuneline.steps import STEPS
from tuneline.strict_model import StrictModel


class Config(StrictModel):
    prompt: str
    columns: dict[str, str] = {}
    bounds: tuple[tuple[int, ...], ...] = ()


def on_a_cluster(text: str) -> str:
    """What a real KFP 2.17 does with a parameter: halves $$, and replaces what stands in braces.

    Recorded in text-pods.json: `cost $$5$$ $(HOME) {{item}} {{workflow.name}} {{=1+1}} <b>` arrived
    as `cost $5$ $(HOME) {{item}} x-text-mzb47 2 <b>`. Names that are known are replaced, too.
    """
    text = re.sub(r"\{\{.*?\}\}", "REPLACED", text)
    text = re.sub(r"\[\[(RunUUID|ScheduledTime|CurrentTime|Index)\b.*?\]\]", "REPLACED", text)
    return re.sub(r"\$(\$|\([A-Z]+\))", lambda m: "$" if m[1] == "$" else "REPLACED", text)


TEXTS = [
    "cost $$5$$ $(HOME) {{item}} {{workflow.name}} {{=1+1}} <b>",
    "{{{{=sprig.env('HOME')}}}} {{{ {{",
    "$$$$(A) $$$(B) \\$$ \\{{x}} \\\\$(C) $",
    "[[CurrentTime.2006]] [[[Index]]] [[RunUUID]] [[ScheduledTime]]",
    '"quoted" \n new \u00e9 \U0001f600 {{"a": 1}}',
    '"quoted"',
    '"',
    "",
]
PLAIN = [
    "a {question} for $5 [INST] {a} }}",
    "org/model",
    "dir:/models/x",
    "[[1, 2]]",
    "$HOME ${X}",
]


@pytest.mark.parametrize("text", TEXTS + PLAIN)
def test_a_text_arrives_as_it_was_written(text: str) -> None:
    passed = encode_text(text)
    assert find_replaced(passed) is None
    assert on_a_cluster(passed) == passed
    assert decode_text(passed) == text
    config = Config(prompt=text, columns={text: text}, bounds=((1, 2), (3,)))
    passed = to_json(config)
    assert find_replaced(passed) is None
    assert on_a_cluster(passed) == passed
    assert Config.parse(passed) == config
    # A record of a record, as KFP nests the parameters of a step.
    assert on_a_cluster(json.dumps({"config": passed})) == json.dumps({"config": passed})


@pytest.mark.parametrize("text", TEXTS[:4])
def test_the_same_text_would_change_on_its_way(text: str) -> None:
    assert on_a_cluster(text) != text
    assert find_replaced(text)


@pytest.mark.parametrize("text", PLAIN)
def test_other_texts_stay_readable(text: str) -> None:
    assert encode_text(text) == text
    assert to_json(Config(prompt=text)) == Config(prompt=text).model_dump_json()


@pytest.mark.parametrize("typed", ["org/model", '"org', '"a" and "b"', "{{x}}", "\\u0024"])
def test_what_a_person_typed_is_taken_as_typed(typed: str) -> None:
    assert decode_text(typed) == typed


def test_metadata_goes_the_same_way() -> None:
    artifact = SimpleNamespace(metadata={})
    set_metadata(artifact, source=TEXTS[0], num_rows=3, loss=None)
    assert artifact.metadata == {"source": encode_text(TEXTS[0]), "num_rows": 3, "loss": None}
    assert on_a_cluster(artifact.metadata["source"]) == artifact.metadata["source"]


def test_no_component_sets_metadata_in_another_way() -> None:
    packages = {step.module.rpartition(".")[0] for step in STEPS.values()}
    packages = {name.removesuffix(".gguf").removesuffix(".trainjob") for name in packages}
    checked = 0
    for package in packages:
        module = importlib.import_module(f"{package}.component")
        source = inspect.getsource(module)
        assert not re.search(r"\.metadata(\.update|\[| =)", source), package
        checked += "set_metadata(" in source
    assert checked >= 7
