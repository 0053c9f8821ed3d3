"""The images' files against the code that runs in them; with the marker docker, the images."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml

from tuneline import images, selfcheck
from tuneline.images import USER_ID
from tuneline.runtime.environment import IMAGE_VARIABLE, describe_environment
from tuneline.steps import IMAGE_SETS, steps_in
from tuneline.train import TrainConfig

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "images"
SETS = sorted(IMAGE_SETS)
LOCKS = sorted(set(IMAGES.glob("*/*.lock")) - {IMAGES / "line" / "requirements.lock"})


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(lock: Path) -> dict[str, str]:
    """Return name -> version of a lock; a local version (+cpu) counts as its public one."""
    found = re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;+]+)", lock.read_text(), re.M)
    return {normal(name): version for name, version in found}


def image_of(name: str) -> str:
    return getattr(images, name.upper())


def test_there_is_an_image_for_each_set() -> None:
    named = {name.lower() for name in vars(images) if isinstance(getattr(images, name), str)}
    named -= {"local", "local_prefix", "version"}
    assert set(SETS) == {name for name in named if not name.startswith("__")}
    assert set(SETS) == set(selfcheck.LIBRARY_CHECKS)
    assert set(SETS) == {path.parent.name for path in IMAGES.glob("*/requirements.lock")} - {
        "line", "tools"
    }  # fmt: skip
    for name in SETS:
        assert image_of(name).startswith(f"{images.LOCAL_PREFIX}/{name}:")
        assert (IMAGES / name / "requirements.lock").is_file()


def test_the_readme_lists_the_steps_of_each_image() -> None:
    rows = re.findall(r"^\| (\w+) \| ([\w, -]+) \|", (IMAGES / "README.md").read_text(), re.M)
    listed = {name: steps.split(", ") for name, steps in rows if name != "set"}
    assert listed == {name: steps_in(name) for name in SETS}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_pin_has_a_hash(lock: Path) -> None:
    blocks = re.split(r"^(?=[A-Za-z0-9])", lock.read_text(), flags=re.M)[1:]
    assert len(blocks) == len(pins(lock)) > 5
    for block in blocks:
        assert re.match(r"[a-z0-9.-]+==[^\s]+ \\\n    --hash=sha256:[0-9a-f]{64}", block), block[
            :80
        ]


@pytest.mark.parametrize("name", SETS)
def test_versions_are_those_that_the_tests_ran_with(name: str) -> None:
    line = pins(IMAGES / "line" / "requirements.lock")
    # Alone in its image, gptqmodel gets the protobuf that it asks for.
    exempt = {"protobuf"} if name == "gptq" else set()
    own = pins(IMAGES / name / "requirements.lock")
    differing = {
        package: (version, line[package])
        for package, version in own.items()
        if package in line and line[package] != version and package not in exempt
    }
    assert differing == {}
    assert "kfp" in own


@pytest.mark.parametrize("torch", ["cpu", "cuda"])
@pytest.mark.parametrize("name", SETS)
def test_an_image_and_the_layer_below_share_no_package(name: str, torch: str) -> None:
    wants = {
        normal(line)
        for line in (IMAGES / name / "requirements.in").read_text().splitlines()
        if line and not line.startswith("#")
    }
    own, below = pins(IMAGES / name / "requirements.lock"), pins(IMAGES / "torch" / f"{torch}.lock")
    if "torch" in wants:
        assert not set(own) & set(below)
        assert wants <= set(own) | set(below)
    else:
        assert wants <= set(own)


def test_the_dockerfile_ends_as_a_numeric_user_with_a_check() -> None:
    lines = (IMAGES / "Dockerfile").read_text().splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users == [f"{USER_ID}:{USER_ID}"]
    assert lines[-1].startswith("RUN python3 -m tuneline.selfcheck ${SET};")
    assert not [line for line in lines if ":latest" in line]


def test_an_image_names_itself_in_the_records_of_its_artifacts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = (IMAGES / "Dockerfile").read_text()
    assert 'TUNELINE_IMAGE="tuneline/${SET}:${VERSION}+${REVISION}"' in text
    # Each variable in it is declared in the last stage, where it would otherwise be empty.
    last = text.rpartition("\nFROM ")[2]
    assert all(f"ARG {name}" in last for name in ("SET", "VERSION", "REVISION"))
    monkeypatch.setenv(IMAGE_VARIABLE, "tuneline/train:1+abc")
    assert describe_environment()["image"] == "tuneline/train:1+abc"
    monkeypatch.delenv(IMAGE_VARIABLE)
    assert "image" not in describe_environment()


def test_the_context_holds_what_the_dockerfile_copies() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (IMAGES / "Dockerfile").read_text(), re.M)
    for source in {part.split("/")[0] for each in copied for part in each.split()}:
        assert [line for line in ignored if line.startswith(f"!{source}")], source


@pytest.mark.parametrize("name", ["light", "publish"])
def test_the_self_check_says_what_works(name: str, tmp_path: Path) -> None:
    done = run_check(name, HF_HOME=str(tmp_path / "hf"))
    assert done.returncode == 0, done.stderr
    assert f"HF_HOME: {tmp_path}/hf can be written" in done.stdout
    for step in steps_in(name):
        assert f"step {step}\n" in done.stdout


def test_the_self_check_fails_where_caches_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run_check("light", HF_HOME=str(tmp_path / "file" / "hf"))
    assert done.returncode == 1
    assert "NotADirectoryError" in done.stderr


def run_check(name: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tuneline.selfcheck", name],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_importing_the_check_imports_no_library_of_a_set() -> None:
    tree = ast.parse(Path(selfcheck.__file__).read_text())
    top = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    assert not top & {"torch", "numpy", "kfp", "llama_cpp", "lm_eval"}


RESTRICTED = [
    "--rm", "--network=none", "--user=1000690000:0", "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
]  # fmt: skip
READ_ONLY = ["--read-only", "--tmpfs=/tmp"]


@pytest.mark.docker
@pytest.mark.parametrize("name", SETS)
def test_any_user_can_work_in_an_image_with_a_read_only_root_too(name: str) -> None:
    present = subprocess.run(
        ["docker", "image", "inspect", image_of(name)], capture_output=True, text=True, check=False
    )
    if present.returncode:
        pytest.skip(f"{image_of(name)} is not built: make images")
    (image,) = json.loads(present.stdout)
    assert image["Config"]["User"] == f"{USER_ID}:{USER_ID}"
    for root in ([], READ_ONLY):
        command = ["docker", "run", *RESTRICTED, *root, image_of(name)]
        done = subprocess.run(
            [*command, "python3", "-m", "tuneline.selfcheck", name],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        # Not at the start: gptqmodel says something when it is imported.
        assert "user 1000690000:0, Python 3.11" in done.stdout
    bill = subprocess.run(
        [*command, "cat", "/opt/tuneline/sbom.cdx.json"], capture_output=True, text=True, check=True
    )
    listed = {
        normal(part["name"]): part["version"] for part in yaml.safe_load(bill.stdout)["components"]
    }
    for package, version in pins(IMAGES / name / "requirements.lock").items():
        assert listed[package] == version


def test_the_train_image_has_every_tracker_that_a_recipe_may_name() -> None:
    packages = {"mlflow": "mlflow-skinny", "wandb": "wandb", "tensorboard": "tensorboardx"}
    allowed = get_args(get_args(TrainConfig.model_fields["track"].annotation)[0])
    assert set(packages) == set(allowed)
    assert set(packages.values()) <= pins(IMAGES / "train" / "requirements.lock").keys()
