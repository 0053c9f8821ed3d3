"""The alert rules: they read metrics that runs push, and fire when they should."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tuneline.notify.message import Message, Score
from tuneline.notify.metrics import registry_of

DIRECTORY = Path(__file__).parents[2] / "manifests" / "components" / "monitoring"
RULE: dict[str, Any] = yaml.safe_load((DIRECTORY / "prometheus-rule.yaml").read_text())
PROMTOOL = shutil.which("promtool")


def test_the_rules_read_metrics_that_a_run_pushes() -> None:
    score = Score("t", "acc", 0.1, 0.2, "")
    message = Message("promoted", run="r", recipe="r", text="", scores=[score], seconds=1)
    pushed = {family.name for family in registry_of(message).collect()}
    rules = [rule for group in RULE["spec"]["groups"] for rule in group["rules"]]
    assert {rule["alert"] for rule in rules} == {"TunelineNoPromotion", "TunelineRunFailed"}
    for rule in rules:
        read = set(re.findall(r"tuneline_\w+", rule["expr"]))
        assert read and read <= pushed


DAY = 86_400


@pytest.mark.slow
@pytest.mark.skipif(
    PROMTOOL is None,
    reason="no promtool: go install github.com/prometheus/prometheus/cmd/promtool@latest",
)
def test_an_alert_fires_after_runs_without_a_promotion(tmp_path: Path) -> None:
    assert PROMTOOL is not None
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(RULE["spec"]))
    # A sample per day. Runs end every 7 days; those of `good` are promoted on day 21.
    weekly = " ".join(str(day // 7 * 7 * DAY) for day in range(29))
    since_day_21 = " ".join("_" if day < 21 else str(21 * DAY) for day in range(29))
    series = [
        {"series": f'tuneline_run_ended_timestamp_seconds{{recipe="{name}"}}', "values": weekly}
        for name in ("good", "held")
    ]
    series += [
        {
            "series": 'tuneline_run_promoted_timestamp_seconds{recipe="good"}',
            "values": since_day_21,
        },
        {
            "series": 'tuneline_run_outcome{recipe="held",outcome="failed"}',
            "values": " ".join("1" if day >= 28 else "0" for day in range(29)),
        },
    ]

    def alert(name: str, day: int, *recipes: str) -> dict[str, Any]:
        return {
            "eval_time": f"{day}d",
            "alertname": name,
            "exp_alerts": [
                {"exp_labels": {"recipe": recipe, "severity": "warning"}} for recipe in recipes
            ],
        }

    tests = [
        alert("TunelineNoPromotion", 20),
        alert("TunelineNoPromotion", 21, "held"),
        alert("TunelineNoPromotion", 28, "held"),
        alert("TunelineRunFailed", 27),
        alert("TunelineRunFailed", 28, "held"),
    ]
    # promtool compares annotations too, so they are left out of what it tests.
    for group in RULE["spec"]["groups"]:
        for rule in group["rules"]:
            rule.pop("annotations")
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(RULE["spec"]))
    content = {
        "rule_files": ["plain.yaml"],
        "evaluation_interval": "1d",
        "tests": [{"interval": "1d", "input_series": series, "alert_rule_test": tests}],
    }
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(content))
    for command in (("check", "rules", "rules.yaml"), ("test", "rules", "test.yaml")):
        done = subprocess.run(
            [PROMTOOL, *command], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
