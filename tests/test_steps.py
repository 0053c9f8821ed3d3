"""The table of steps against the components, the report's picture and the graph."""

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

from tuneline.report.line import LINE
from tuneline.steps import STEPS

ROOT = Path(__file__).parent.parent
FILES = sorted(
    path for name in ("components", "pipelines") for path in (ROOT / name).rglob("component.py")
)


@dataclass(frozen=True)
class Component:
    """What the source of a KFP component says."""

    image: str
    packages: frozenset[str]
    """Packages of the modules that its body imports."""
    reports_as: str
    """Name of the step in the events."""


def components() -> dict[str, Component]:
    """Return the components of every component.py by KFP's name for them."""
    found = {}
    for path in FILES:
        for function in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(function, ast.FunctionDef):
                continue
            (decorator,) = function.decorator_list
            assert isinstance(decorator, ast.Call)
            values = {keyword.arg: ast.unparse(keyword.value) for keyword in decorator.keywords}
            nodes = list(ast.walk(function))
            modules = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
            (entered,) = [
                ast.literal_eval(item.context_expr.args[0])
                for node in nodes
                if isinstance(node, ast.With)
                for item in node.items
                if isinstance(item.context_expr, ast.Call)
                and ast.unparse(item.context_expr.func) == "step"
            ]
            found[function.name.replace("_", "-")] = Component(
                image=values["base_image"].removeprefix("images.").lower(),
                packages=frozenset(module.rpartition(".")[0] for module in modules),
                reports_as=entered,
            )
    return found


def test_every_component_has_an_entry_and_every_entry_a_component() -> None:
    without_entry = sorted(set(components()) - set(STEPS))
    assert not without_entry, f"add {without_entry} to STEPS in components/tuneline/steps.py"
    without_component = sorted(set(STEPS) - set(components()))
    assert not without_component, f"steps.py lists {without_component}, no component.py has them"


@pytest.mark.parametrize("name", sorted(components()))
def test_an_entry_says_what_its_component_does(name: str) -> None:
    component, step = components()[name], STEPS[name]
    assert component.image == step.image, f"{name} runs in images.{component.image.upper()}"
    # The self-check has to import code that the component runs.
    assert step.module.rpartition(".")[0] in component.packages
    # A training on several nodes is the step train to whoever reads the events.
    assert component.reports_as == ("train" if name == "train-on-nodes" else name)


def test_every_stage_of_the_picture_has_steps_and_no_step_is_outside_it() -> None:
    drawn = {name for name, _ in LINE}
    stages = {step.stage for step in STEPS.values() if step.stage is not None} - {"evaluate"}
    assert stages | {"evaluate base", "evaluate tuned"} == drawn
    assert {after for _, names in LINE for after in names} <= drawn
