"""Versions outside the bounds of the installed package end a step before it starts."""

import importlib.metadata
import os
import re
import subprocess
import sys

import pytest

from tuneline.errors import ToolError
from tuneline.runtime.environment import NO_USAGE_REPORTS, check_versions, versions_of
from tuneline.runtime.step import step


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put the metadata of a package of some version before those that are installed."""

    def put(name: str, version: str) -> None:
        directory = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        directory.mkdir()
        (directory / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\n")
        with open(directory / "METADATA", "a") as file:
            file.write(f"Version: {version}\n")

    monkeypatch.syspath_prepend(tmp_path)
    return put


def test_this_environment_is_within_the_bounds():
    for name in ("fetch", "train", "evaluate", "quantize", "quantize-gptq", "publish", "gate"):
        check_versions(name)


def test_a_version_outside_the_bounds_ends_the_step_by_name(install, capfd):
    install("transformers", "5.17.0")
    install("lm-eval", "0.4.12")
    with pytest.raises(SystemExit), step("fetch"):
        pytest.fail("the step began")
    message = capfd.readouterr().err.splitlines()[-1]
    assert message.startswith("fetch: ToolError: the environment has packages that fetch was not")
    assert re.search(r"transformers is 5\.17\.0 instead of (<6,>=5\.23|>=5\.23,<6)", message)
    # fetch does not use it.
    assert "lm-eval" not in message
    with pytest.raises(ToolError, match=r"lm-eval is 0\.4\.12 instead of ==0\.4\.13"):
        check_versions("evaluate")
    # The light image has neither.
    check_versions("gate")


def test_a_build_of_the_same_version_is_the_same(install):
    install("llama-cpp-python", "0.3.36+cu130")
    check_versions("quantize")


def test_the_versions_of_a_set_are_those_that_decide(install):
    before = {name: versions_of(name) for name in ("train", "gptq", "evaluate", "light")}
    assert f"transformers {importlib.metadata.version('transformers')}" in before["gptq"]
    assert "gptqmodel" in before["gptq"] and "gptqmodel" not in before["train"]
    assert "huggingface_hub" not in before["train"]
    install("lm-eval", "0.4.14")
    after = {name: versions_of(name) for name in before}
    assert {name for name in before if before[name] != after[name]} == {"evaluate"}
    install("numpy", "3.0")
    assert all(versions_of(name) != after[name] for name in before)


def test_the_libraries_know_the_variables_that_stop_reports_of_use() -> None:
    program = (
        "from huggingface_hub import constants; import evaluate.config as config\n"
        "print(constants.HF_HUB_DISABLE_TELEMETRY, config.HF_UPDATE_DOWNLOAD_COUNTS)"
    )
    for variables, said in ((NO_USAGE_REPORTS, "True False\n"), ({}, "False True\n")):
        own = {name: value for name, value in os.environ.items() if name not in NO_USAGE_REPORTS}
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**own, **variables, "HF_HUB_OFFLINE": "0"},
            capture_output=True,
            text=True,
        )
        assert done.stdout == said, done.stderr
