"""docs/security.md explains each rule of the roles, and no other."""

import re
from pathlib import Path

import pytest
import yaml

from tuneline.pipelines.plan.cluster import LAUNCHER_RIGHTS, RIGHTS
from tuneline.steps import STEPS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
ROLES = {
    "tuneline-runner": ROOT / "manifests/base/role.yaml",
    "tuneline-trainer": ROOT / "manifests/components/trainer/role.yaml",
}

Rule = tuple[str, tuple[str, ...], frozenset[str]]
"""Resource with its group, names of objects, and verbs."""


def rules_of(path: Path) -> set[Rule]:
    (role,) = yaml.safe_load_all(path.read_text(encoding="utf-8"))
    return {
        (
            f"{resource}.{group}" if group else resource,
            tuple(rule.get("resourceNames", ())),
            frozenset(rule["verbs"]),
        )
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }


def rows_after(role: str) -> list[list[str]]:
    """Return the cells of the table that follows the name of a role."""
    rest = PAGE.partition(f"`{role}` (manifests/")[2]
    (table,) = re.findall(r"\|---.*?\n((?:\|.*\n)+)", rest)[:1]
    return [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in table.splitlines()]


@pytest.mark.parametrize("role", ROLES)
def test_each_rule_is_explained_and_each_explanation_is_a_rule(role: str) -> None:
    explained = set()
    for resource, verbs, used_by, without in rows_after(role):
        kind, *names = re.findall(r"`([^`]+)`", resource)
        explained.add((kind, tuple(names), frozenset(re.findall(r"`([^`]+)`", verbs))))
        assert len(used_by) > 3 and len(without) > 20, resource
        for name in re.findall(r"`([a-z-]+)`", used_by):
            assert name in STEPS or name in re.findall(r"`([a-z]+)`", verbs), name
    assert explained == rules_of(ROLES[role])


def test_the_rights_that_doctor_and_the_launcher_need_are_named() -> None:
    for right in RIGHTS:
        assert f"`{right}`" in PAGE, right
    granted = {
        f"{verb} {kind}" for kind, _, verbs in rules_of(ROLES["tuneline-trainer"]) for verb in verbs
    }
    assert {str(right) for right in LAUNCHER_RIGHTS} <= granted


def test_the_air_gapped_page_has_every_step_once() -> None:
    page = (ROOT / "docs" / "air-gapped.md").read_text(encoding="utf-8")
    rest = page.partition("## What each step connects to")[2].partition("## Try it")[0]
    named: list[str] = []
    with_network = set()
    for line in rest.splitlines():
        cells = line.split("|")
        if len(cells) > 3 and "`" in cells[1]:
            steps = re.findall(r"`([a-z0-9-]+)`", cells[1])
            named += steps
            if re.search(r"the Hub|targets", cells[2]):
                with_network |= set(steps)
    assert set(named) == set(STEPS)
    # plan reads a few bytes of the Hub, but has neither its token nor its cache.
    assert with_network - {"plan"} == {name for name, step in STEPS.items() if step.hub}
