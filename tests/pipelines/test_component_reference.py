"""The components on their own: their YAML, and docs/components, which is generated from them."""

from pathlib import Path

import pytest
import yaml
from kfp import components

from tuneline.pipelines.component_reference import (
    COMPONENTS,
    compile_component,
    write_reference,
)
from tuneline.steps import STEPS

PAGES = Path(__file__).parents[2] / "docs" / "components"


def test_the_pages_are_those_of_the_components(tmp_path: Path) -> None:
    write_reference(tmp_path)
    made = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*.*")}
    kept = {path.relative_to(PAGES): path.read_text() for path in PAGES.rglob("*.*")}
    assert made == kept, "docs/components is not current: run `make docs` and commit the files"
    assert list(COMPONENTS) and set(COMPONENTS) == set(STEPS)


@pytest.mark.parametrize("name", COMPONENTS)
def test_every_component_loads_on_its_own_and_describes_itself(name: str, tmp_path: Path) -> None:
    path = tmp_path / "component.yaml"
    compile_component(name, path, registry="registry.example.com/team")
    loaded = components.load_component_from_file(str(path))
    spec = COMPONENTS[name].component_spec
    assert set(loaded.component_spec.inputs or {}) == set(spec.inputs or {})
    document = yaml.safe_load(path.read_text())
    (executor,) = document["deploymentSpec"]["executors"].values()
    assert executor["container"]["image"].startswith("registry.example.com/team/")
    # The component that the pipelines share keeps its image.
    assert spec.implementation.container.image.startswith("localhost/tuneline/")
    (component,) = document["components"].values()
    for definitions in ("inputDefinitions", "outputDefinitions"):
        for kind in ("parameters", "artifacts"):
            for key, each in component.get(definitions, {}).get(kind, {}).items():
                assert each.get("description"), key
