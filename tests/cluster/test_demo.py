"""The shipped demo: promoted, published with all its exports, and then taken from the cache."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from cluster_figures import PodSizes, markdown
from cluster_runs import submitting
from real_cluster import Cluster, Run

from tuneline.pods import CACHE_PATH

# With `-n 3 --dist loadgroup` one process runs them all, so that the demo runs only twice.
pytestmark = pytest.mark.xdist_group("demo")

GGUF = ("f16", "q8_0", "q5_k_m", "q4_k_m")
UP_TO_GATE = (
    *("fetch", "prepare", "evaluate base", "train", "merge", "evaluate tuned", "gate"),
    *("convert-gguf", *(f"quantize-gguf {name}" for name in GGUF), "quantize-gptq gptq-4bit"),
)


@dataclass(frozen=True)
class Demo:
    run: Run
    again: Run
    """The same recipe, submitted after the end of `run`; it publishes to the claim."""
    published: str
    """The files that the second run has published."""
    figures: str


@pytest.fixture(scope="module")
def demo(request: pytest.FixtureRequest, cluster: Cluster) -> Iterator[Demo]:
    with submitting(request.node, cluster) as submit:

        def submit_demo(*assignments: str) -> Run:
            claim = f"placement.cache_claim={cluster.claim}"
            return submit(f"name=demo-{cluster.session}", claim, *assignments, recipe="demo")

        with PodSizes(run := submit_demo()) as sizes:
            run.wait(seconds=3600)
        target = f"{CACHE_PATH}/e2e-published-{cluster.seed}"
        with PodSizes(again := submit_demo(f"publish_to=dir:{target}")) as sizes_again:
            again.wait()
        published = cluster.run_on_claim(f"cd {target} && find . -type f")
        cluster.run_on_claim(f"rm -r {target}")
        figures = markdown("The demo", run, sizes)
        figures += "\n" + markdown("The same demo from the cache", again, sizes_again)
        print(figures)
        path = request.config.getoption("--kfp-figures")
        if path:
            with open(path, "w", encoding="utf-8") as file:
                file.write(figures)
        yield Demo(run, again, published, figures)


def test_the_demo_is_promoted(demo: Demo) -> None:
    assert demo.run.state() == "SUCCEEDED"
    steps = demo.run.steps()
    assert {name: steps.get(name) for name in UP_TO_GATE} == dict.fromkeys(UP_TO_GATE, "succeeded")
    assert steps["publish"] == "succeeded"
    assert "promote: heldout_choice" in demo.run.logs("gate")
    assert demo.run.diagnosis().result == "succeeded"
    assert "nothing wrong" in demo.run.doctor()


def test_every_export_is_published(demo: Demo) -> None:
    assert set(demo.run.outputs("publish")["published"]) >= {"gguf", "gptq-4bit"}
    for name in GGUF:
        assert re.search(rf"^\./demo\S*-gguf/\S*{name}\S*\.gguf$", demo.published, re.M | re.I), (
            f"{name} is missing: {demo.published}"
        )
    assert re.search(r"^\./demo\S*-gptq-4bit/\S*\.safetensors$", demo.published, re.M)


def test_the_report_fits_a_small_pod(demo: Demo) -> None:
    rows = dict(re.findall(r"^\| (report) \|.*\| (\d+) \|$", demo.figures, re.M))
    if not rows:
        pytest.skip("the sizes of the pods could not be measured (nodes/proxy, pods/exec)")
    assert int(rows["report"]) <= 536, "the report's pod needs more than 512 MiB of disk"


def test_the_second_run_is_taken_from_the_cache(demo: Demo) -> None:
    assert demo.again.state() == "SUCCEEDED"
    steps = demo.again.steps()
    assert {name: steps.get(name) for name in UP_TO_GATE} == dict.fromkeys(UP_TO_GATE, "from cache")
    assert steps["report"] == "succeeded"
    assert demo.again.diagnosis().result == "succeeded"
    assert "nothing wrong" in demo.again.doctor()
