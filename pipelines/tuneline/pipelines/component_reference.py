"""Every component of the line on its own: its compiled YAML, a page in Markdown, and metadata.

    python -m tuneline.pipelines.component_reference docs/components

writes a directory per component, with README.md and metadata.yaml in the layout of Kubeflow's
repository of components. Everything in them comes from the component's signature and docstring, and
from the table of the steps. The names of people and the date of the last check, which that layout
also has, belong to the repository that takes a component over, and are not in them.
"""

import copy
import inspect
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from kfp import compiler
from kfp.dsl.python_component import PythonComponent

from tuneline.diagnose.component import diagnose
from tuneline.errors import UserError
from tuneline.evaluate.component import collect_benchmarks, evaluate
from tuneline.fetch.component import fetch, look_up_model
from tuneline.gate.component import gate
from tuneline.images import in_registry
from tuneline.merge.component import merge
from tuneline.pipelines.plan.component import plan
from tuneline.prepare.component import look_up_data, prepare, receive_files
from tuneline.publish.component import look_up_published, publish
from tuneline.quantize.component import (
    check_exports,
    convert_gguf,
    measure_importance,
    quantize_awq,
    quantize_fp8,
    quantize_gguf,
    quantize_gptq,
)
from tuneline.report.component import report
from tuneline.steps import STEPS
from tuneline.train.component import train, train_on_nodes

_ALL: list[Any] = [
    *(plan, look_up_model, receive_files, look_up_data, look_up_published, fetch, prepare),
    *(check_exports, train, train_on_nodes, merge, convert_gguf, measure_importance),
    *(quantize_gguf, quantize_gptq, quantize_awq, quantize_fp8),
    *(collect_benchmarks, evaluate, gate, report, publish, diagnose),
]
COMPONENTS: dict[str, PythonComponent] = {component.name: component for component in _ALL}
"""The components, by the name of their step."""

TYPES = {
    "String": "text",
    "Integer": "whole number",
    "Float": "number",
    "typing.List[str]": "list of texts",
    "TaskFinalStatus": "final status of the run",
}
"""KFP's types of parameters, in words."""


def compile_component(name: str, path: Path, *, registry: str | None = None) -> None:
    """Compile one component to a file that KFP loads in any pipeline.

    Args:
        name: name of the component's step, e.g. train.
        path: the file.
        registry: registry of the image, as in placement.registry; None: the nodes have the image.

    Raises:
        UserError: there is no component of this name.
    """
    component = COMPONENTS.get(name)
    if component is None:
        raise UserError(f"there is no component '{name}': name one of {', '.join(COMPONENTS)}")
    component = copy.deepcopy(component)
    container = component.component_spec.implementation.container
    container.image = in_registry(container.image, registry)
    compiler.Compiler().compile(component, str(path))


def component_metadata(name: str) -> str:
    """Return the metadata of a component as YAML."""
    step = STEPS[name]
    pipelines = {"name": "Pipelines", "version": f">={version('kfp')}"}
    kubeflow = [pipelines]
    if name == "train-on-nodes":
        kubeflow.append({"name": "Trainer", "version": ">=2.0"})
    values = {
        "name": name,
        "stability": "alpha",
        "dependencies": {"kubeflow": kubeflow},
        "tags": ["llm", "fine-tuning", *dict.fromkeys([step.stage or name, step.image])],
    }
    return yaml.safe_dump(values, sort_keys=False)


def component_readme(name: str) -> str:
    """Return the page of a component in Markdown."""
    return "\n".join([*_lines(name, COMPONENTS[name])])


def write_reference(directory: Path) -> None:
    """Write a directory per component, with its page and its metadata, and an index of them."""
    lines = ["# Components", "", _GENERATED, "", "| component | what it does |", "|---|---|"]
    for name, component in COMPONENTS.items():
        place = directory / name
        place.mkdir(parents=True, exist_ok=True)
        (place / "README.md").write_text(component_readme(name), encoding="utf-8")
        (place / "metadata.yaml").write_text(component_metadata(name), encoding="utf-8")
        lines.append(f"| [{name}]({name}/README.md) | {_summary(component)[0]} |")
    (directory / "README.md").write_text("\n".join([*lines, ""]), encoding="utf-8")


_GENERATED = "<!-- Generated from the components: run `make docs`, do not edit. -->"


def _summary(component: PythonComponent) -> tuple[str, str]:
    """Return the first sentence of a component's docstring, and the text after it."""
    text = inspect.getdoc(component.python_func) or ""
    first, _, rest = text.partition("\n\n")
    return " ".join(first.split()), rest.partition("Args:")[0].strip()


def _lines(name: str, component: PythonComponent) -> Iterator[str]:
    step, spec = STEPS[name], component.component_spec
    summary, more = _summary(component)
    yield from (f"# {name}", "", _GENERATED, "", summary, "")
    if more:
        yield from (more, "")
    yield from ("## Inputs", "", "| name | type | default | meaning |", "|---|---|---|---|")
    for key, each in (spec.inputs or {}).items():
        yield f"| `{key}` | {_type(each)} | {_default(each)} | {_words(each)} |"
    yield ""
    if spec.outputs:
        yield from ("## Outputs", "", "| name | type | meaning |", "|---|---|---|")
        for key, each in spec.outputs.items():
            yield f"| `{key}` | {_type(each)} | {_words(each)} |"
        yield ""
    cpu, memory = (" to ".join(dict.fromkeys(each)) for each in (step.cpu, step.memory))
    yield from ("## Where it runs", "")
    image = spec.implementation.container.image
    yield f"Image `{image}`, {cpu} CPU cores, {memory} of memory"
    yield "(request to limit; `placement.steps` of a recipe changes them)."
    if step.gpu:
        yield "It uses an accelerator if it is given one."
    if step.hub:
        yield "It uses the network."
    yield from ("", "## Use it in a pipeline", "", f"    tuneline compile --component {name}", "")
    yield from ("    from kfp import components", "")
    function = name.replace("-", "_")
    yield f'    {function} = components.load_component_from_file("{name}.component.yaml")'
    yield ""


def _type(spec: Any) -> str:
    kind = str(spec.type)
    if spec.is_artifact_list:
        return f"list of {_artifact(kind)}"
    return TYPES.get(kind) or _artifact(kind)


def _artifact(kind: str) -> str:
    return kind.partition("@")[0].removeprefix("system.")


def _default(spec: Any) -> str:
    if not spec.optional:
        return ""
    return f"`{spec.default!r}`" if spec.default is not None else "none"


def _words(spec: Any) -> str:
    return " ".join((spec.description or "").split()).replace("|", "\\|")


if __name__ == "__main__":
    write_reference(Path(sys.argv[1]))
