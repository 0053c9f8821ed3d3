"""Datasets on the Hub: prepare reads the commits that the look-up found, not newer ones."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hub_server
import pytest

from tuneline.errors import DataError
from tuneline.prepare import PrepareConfig
from tuneline.prepare.datasets import parse
from tuneline.prepare.fingerprint import at_version

LOOK_UP_THEN_PREPARE = """
import sys
from tuneline.runtime.torch_free import hide_torch
hide_torch()
from tuneline.prepare import PrepareConfig
from tuneline.prepare.fingerprint import fingerprint
from tuneline.prepare.run import run
model, out, source, config = sys.argv[1:]
config = PrepareConfig.parse(config)
found = fingerprint(config, source=source)
print(found, flush=True)
input()  # Commits are pushed now.
run(config, source=source, base_model_dir=model, dataset_dir=out, statistics_path=out + ".html",
    version=found)
"""
OLD, NEW = "0" * 40, "f" * 40
REPOS = ("org/rows", "org/more", "org/held", "org/chat")


@pytest.fixture
def hub() -> Iterator[hub_server.Hub]:
    server = hub_server.Hub()
    yield server
    server.close()


def rows(repo: str, state: str) -> bytes:
    """Return rows whose texts name their commit and have no words in common with other rows."""
    lines = [
        {"prompt": f"{repo} {number * 7919 + len(repo)} {state}", "completion": f"{number} {state}"}
        for number in range(12)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def test_prepare_reads_the_commits_that_were_looked_up(
    hub: hub_server.Hub, tiny_model_dir: Path, tmp_path: Path
) -> None:
    for repo in REPOS:
        hub.repos[repo] = hub_server.new_repo(**{"rows.jsonl": rows(repo, "before")})
    config = {
        "heldout": {"source": "org/held", "max_rows": 5},
        "general": {"source": "org/chat", "share": 0.3},
        "eval_share": 0.1,
    }
    source = json.dumps([{"source": "org/rows"}, {"source": "org/more", "revision": "main"}])
    environment = hub_server.client_environment(hub.url, tmp_path / "hf")
    with subprocess.Popen(
        [
            *(sys.executable, "-c", LOOK_UP_THEN_PREPARE),
            *(str(tiny_model_dir), str(tmp_path / "out"), source, json.dumps(config)),
        ],
        env=environment | {"HF_TOKEN": hub_server.TOKEN},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline()) == [OLD] * 4
        for repo in REPOS:
            hub_server.add_commit(hub.repos[repo], NEW, **{"rows.jsonl": rows(repo, "after")})
        _, errors = process.communicate("\n")
    assert process.returncode == 0, errors
    record = json.loads((tmp_path / "out/dataset.json").read_text())
    assert [entry["revision"] for entry in record["sources"]] == [OLD, OLD]
    assert record["num_general_rows"] > 0
    heldout = (tmp_path / "out/heldout.jsonl").read_text()
    assert heldout.count('"prompt"') == 5 and "before" in heldout and "after" not in heldout
    resolved = {
        line.split("/resolve/")[1].split("/")[0] for line in hub.requests if "/resolve/" in line
    }
    assert resolved == {OLD}


def test_a_version_of_other_datasets_is_refused() -> None:
    config = PrepareConfig()
    datasets = parse("org/rows", config)
    for version in ("b" * 40, "[]", json.dumps([OLD, OLD])):
        with pytest.raises(DataError, match="is not that of org/rows"):
            at_version(datasets, config, version)
    # Without the Hub (HF_HUB_OFFLINE), nothing is known of its commits.
    assert at_version(datasets, config, '["offline None"]') == (datasets, config)
