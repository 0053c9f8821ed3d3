"""The quota and the limit range hold the runs that the documentation shows.

What KFP adds to a pod is compared with pods that KFP 2.17.0 made: tests/data/kfp-2.17 has the
containers of a step and of two drivers of the demo, cut to names and resources.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tuneline.gpu_profiles import GPU_PROFILES
from tuneline.pipelines.catalog import find_recipe
from tuneline.pipelines.plan.demand import DRIVER, LAUNCHER, Unit, total, units_of
from tuneline.placement import PROFILES, PlacementConfig, quantity_value
from tuneline.pods import NO_SIDECAR
from tuneline.recipe import Recipe

ROOT = Path(__file__).parents[2]
RECORDED = json.loads((ROOT / "tests/data/kfp-2.17/containers.json").read_text(encoding="utf-8"))


def spec_of(name: str) -> Any:
    path = ROOT / "manifests" / "base" / f"{name}.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8"))["spec"]


HARD = {key: quantity_value(text) for key, text in spec_of("resource-quota")["hard"].items()}
(LIMITS,) = spec_of("limit-range")["limits"]
DEFAULTS = {
    **{f"requests.{key}": text for key, text in LIMITS["defaultRequest"].items()},
    **{f"limits.{key}": text for key, text in LIMITS["default"].items()},
}


def placements_in_documents() -> list[dict[str, Any]]:
    """Every block of the documentation that begins with `placement:`."""
    found = []
    for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("manifests/*.md")):
        for block in re.findall(
            r"^    placement:\n(?:^     .*\n)+", path.read_text(encoding="utf-8"), re.MULTILINE
        ):
            found.append(yaml.safe_load(block)["placement"])
    return found


def most(groups: list[list[Unit]]) -> dict[str, float]:
    """Return the largest amount of each resource over the groups of a run."""
    sums = [total(unit.amounts for unit in group) for group in groups]
    return {key: max(each.get(key, 0.0) for each in sums) for each in sums for key in each}


def demand_of(recipe: Recipe) -> dict[str, float]:
    return most(units_of(recipe, DEFAULTS))


def recipe_with(placement: dict[str, Any]) -> Recipe:
    recipe = find_recipe("llama3-8b-instruct", ["train.global_batch_size=16"])
    return recipe.model_copy(update={"placement": PlacementConfig.parse(placement)})


def test_the_documents_show_a_training_on_two_nodes() -> None:
    shown = placements_in_documents()
    assert any(each.get("num_nodes") == 2 and each.get("num_accelerators") == 8 for each in shown)


@pytest.mark.parametrize("placement", [
    *placements_in_documents(),
    *[{"profile": name} for name in PROFILES],
    *[{"profile": name, "num_accelerators": 8, "num_nodes": 2, "shared_claim": "c"}
      for name in GPU_PROFILES],
], ids=str)  # fmt: skip
def test_the_quota_holds_a_run_of_each_example_beside_a_small_one(
    placement: dict[str, Any],
) -> None:
    both = total([demand_of(recipe_with(placement)), demand_of(recipe_with({"profile": "h100"}))])
    over = {key: (value, HARD[key]) for key, value in both.items() if value > HARD.get(key, value)}
    assert not over
    # And the sum is not one of nothing.
    assert both["requests.cpu"] > 60 and both["requests.nvidia.com/gpu"] >= 3


def test_the_quota_counts_what_every_pod_sets() -> None:
    """A pod without a value for a resource that the quota limits is refused."""
    demand = demand_of(recipe_with({"profile": "h100", "num_accelerators": 8}))
    objects = {"requests.storage", "persistentvolumeclaims"}
    assert HARD.keys() - objects <= demand.keys()
    without = most(units_of(recipe_with({"profile": "h100"})))
    assert "requests.ephemeral-storage" not in without


def test_the_pods_of_kfp_have_these_containers() -> None:
    for pod in RECORDED.values():
        assert dict([NO_SIDECAR]) == pod["metadata"]["annotations"]
        containers = {each["name"]: each["resources"] for each in pod["spec"]["containers"]}
        assert containers.keys() == {"main", "wait"} and not containers["wait"]
        initial = {each["name"]: each["resources"] for each in pod["spec"]["initContainers"]}
        assert not initial.pop("init")
        own, known = (
            (initial["kfp-launcher"], LAUNCHER) if initial else (containers["main"], DRIVER)
        )
        assert known == {
            f"{kind}.{key}": text
            for kind in ("requests", "limits")
            for key, text in own[kind].items()
        }


def test_no_limit_of_a_default_is_below_its_request() -> None:
    for key, request in LIMITS["defaultRequest"].items():
        assert quantity_value(request) <= quantity_value(LIMITS["default"][key])
    # A container with a limit of its own would get the default request; KFP's have both.
    for pod in RECORDED.values():
        for container in (*pod["spec"]["initContainers"], *pod["spec"]["containers"]):
            if container["resources"]:
                assert set(container["resources"]) == {"requests", "limits"}
