"""The pipeline as resources of Kubernetes, against the definitions that KFP ships."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from kfp import compiler
from typer.testing import CliRunner

from tuneline.pipelines.catalog import find_recipe
from tuneline.pipelines.cli.main import app
from tuneline.pipelines.finetune import finetune
from tuneline.pipelines.gitops import write_resources
from tuneline.pipelines.lint.lint import lint_file

CRDS = Path(__file__).parents[1] / "data" / "crds" / "kfp-2.17"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The demo's resources, written by the command, and what it said."""
    path = tmp_path_factory.mktemp("resources") / "resources.yaml"
    arguments = ["compile", "demo", "--resources", "team", "-o", str(path)]
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return path, done.output


def test_the_same_recipe_gives_the_same_version(written: tuple[Path, str], tmp_path: Path) -> None:
    again, other = tmp_path / "b.yaml", tmp_path / "c.yaml"
    version = write_resources(find_recipe("demo", []), again, namespace="team")
    assert written[1].splitlines()[0].endswith(f": version {version}")
    assert again.read_text() == written[0].read_text()
    changed = find_recipe("demo", ["train.max_steps=7"])
    assert write_resources(changed, other, namespace="team") != version


def test_the_resources_hold_what_is_compiled(written: tuple[Path, str], tmp_path: Path) -> None:
    path, plain = written[0], tmp_path / "plain.yaml"
    pipeline, version = yaml.safe_load_all(path.read_text())
    said, images, _ = written[1].splitlines()
    assert said == f"wrote {path}: version {version['metadata']['name']}"
    assert images.startswith("images: localhost/tuneline/*:")
    assert (pipeline["kind"], version["kind"]) == ("Pipeline", "PipelineVersion")
    assert {found["metadata"]["namespace"] for found in (pipeline, version)} == {"team"}
    assert version["spec"]["pipelineName"] == pipeline["metadata"]["name"] == "tuneline-demo"
    compiler.Compiler().compile(finetune(find_recipe("demo", [])), str(plain))
    documents = list(yaml.safe_load_all(plain.read_text()))
    assert version["spec"]["pipelineSpec"] == documents[0]
    assert version["spec"]["platformSpec"] == documents[1]
    assert lint_file(path) == []


def test_the_resources_fit_kfps_definitions(written: tuple[Path, str]) -> None:
    for document in yaml.safe_load_all(written[0].read_text()):
        plural = document["kind"].lower() + "s"
        definition = CRDS / f"pipelines.kubeflow.org_{plural}.yaml"
        (crd,) = [found for found in yaml.safe_load_all(definition.read_text()) if found]
        (version,) = crd["spec"]["versions"]
        assert document["apiVersion"] == f"{crd['spec']['group']}/{version['name']}"
        schema: dict[str, Any] = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
        jsonschema.validate(document["spec"], {**schema, "additionalProperties": False})
