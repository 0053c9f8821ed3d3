"""Schedules: one a name, changed in place, with the real kfp.Client against a local server.

That KFP starts the runs in time is tested on a cluster (tests/cluster/test_schedule.py).
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from tuneline.errors import ClusterError, UserError
from tuneline.pipelines.catalog import find_recipe
from tuneline.pipelines.cli.main import app
from tuneline.pipelines.kfp_client import runs, schedules
from tuneline.pipelines.kfp_client.connection import Client, connect

COLLECTION = "/apis/v2beta1/recurringruns"
LOCAL = ("--set", "placement.registry=local")
MONDAYS = schedules.cron_trigger("0 3 * * 1")


@pytest.fixture
def client(kfp_server: Any) -> Client:
    return connect(kfp_server.host)


@pytest.fixture(scope="module")
def pipeline() -> Iterator[Path]:
    with runs.compiled(find_recipe("demo", [])) as path:
        yield path


@pytest.fixture
def put(client: Client, pipeline: Path) -> Callable[..., schedules.Scheduled]:
    """Schedule the demo, with one thing or another changed."""

    def put(
        trigger: schedules.Trigger = MONDAYS, *, compiled: Path = pipeline, **values: Any
    ) -> schedules.Scheduled:
        named = {"name": "weekly", "experiment": "demo", "description": "A demo.", **values}
        return schedules.schedule(client, compiled, trigger, **named)

    return put


@pytest.mark.parametrize(
    ("text", "six"),
    [
        ("0 3 * * 1", "0 0 3 * * 1"),
        ("10 10 * * *", "0 10 10 * * *"),
        ("0 */15 9-17 ? jan-mar mon,WED", "0 */15 9-17 ? jan-mar mon,WED"),
        ("30 0 0 1 1 *", "30 0 0 1 1 *"),
        ("59 23 31 12 6", "0 59 23 31 12 6"),
    ],
)
def test_five_fields_become_kfps_six(text: str, six: str) -> None:
    assert schedules.cron_trigger(text) == schedules.Trigger(cron=six)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("daily", "has 1 fields: write five"),
        ("0 0 0 1 1 * 2026", "has 7 fields"),
        ("60 3 * * *", "'60' is not a valid minute; write 0 to 59"),
        ("0 24 * * *", "'24' is not a valid hour"),
        ("0 0 0 * *", "'0' is not a valid day of month; write 1 to 31"),
        ("0 3 * 13 *", "'13' is not a valid month"),
        ("0 3 * * 7", "'7' is not a valid day of week; write 0 to 6"),
        ("0 3 * * sonntag", "'sonntag' is not a valid day of week"),
        ("0 17-9 * * *", "'17-9' is not a valid hour"),
        ("*/x 3 * * *", r"'\*/x' is not a valid minute"),
        ("0 3,, * * *", "'' is not a valid hour"),
        ("* 0 3 * * *", "starts more than one run per minute"),
        ("*/10 0 3 * * *", "starts more than one run per minute"),
    ],
)
def test_a_wrong_cron_is_named(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        schedules.cron_trigger(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("5m", 300), ("12h", 43200), ("2d", 172800)]
)
def test_intervals(text: str, seconds: int) -> None:
    assert schedules.interval_trigger(text) == schedules.Trigger(interval_seconds=seconds)


@pytest.mark.parametrize("text", ["59s", "0h", "12", "h", "-5m", "1.5h", "1w"])
def test_a_wrong_interval_is_named(text: str) -> None:
    with pytest.raises(UserError, match="write a number with s, m, h or d"):
        schedules.interval_trigger(text)


def test_a_schedule_is_created_as_asked(kfp_server: Any, client: Client, put: Any) -> None:
    done = put(service_account="tuneline-runner", pipeline_root="s3://bucket/runs")
    assert (done.outcome, done.enabled) == ("created", True)
    assert kfp_server.writes() == ["POST /apis/v2beta1/experiments", f"POST {COLLECTION}"]
    body = dict(kfp_server.requests[-1][2])
    spec = body.pop("pipeline_spec")
    assert spec["pipeline_spec"]["pipelineInfo"]["name"] == "tuneline-demo"
    assert body.pop("description").startswith("A demo. [tuneline ")
    (experiment,) = kfp_server.experiments
    assert body == {
        "display_name": "weekly",
        "experiment_id": experiment,
        "mode": "ENABLE",
        "max_concurrency": 1,
        "no_catchup": True,
        "trigger": {"cron_schedule": {"cron": "0 0 3 * * 1"}},
        "service_account": "tuneline-runner",
        "runtime_config": {"parameters": {}, "pipeline_root": "s3://bucket/runs"},
    }


def test_the_same_again_writes_nothing(kfp_server: Any, client: Client, put: Any) -> None:
    first = put()
    written = kfp_server.writes()
    again = put()
    assert (again.outcome, again.recurring_run_id) == ("unchanged", first.recurring_run_id)
    assert kfp_server.writes() == written


@pytest.mark.parametrize(
    ("trigger", "values"),
    [
        (schedules.interval_trigger("12h"), {}),
        (MONDAYS, {"service_account": "other"}),
        (MONDAYS, {"pipeline_root": "s3://other"}),
        (MONDAYS, {"experiment": "other"}),
    ],
)
def test_a_change_replaces_and_never_doubles(
    kfp_server: Any,
    client: Client,
    put: Any,
    trigger: schedules.Trigger,
    values: dict[str, str],
) -> None:
    first = put()
    kfp_server.requests.clear()
    second = put(trigger, **values)
    assert second.outcome == "changed"
    assert list(kfp_server.recurringruns) == [second.recurring_run_id]
    writes = [each for each in kfp_server.writes() if "experiments" not in each]
    # The old one starts nothing any more before the new one can.
    assert writes == [
        f"POST {COLLECTION}/{first.recurring_run_id}:disable",
        f"POST {COLLECTION}",
        f"DELETE {COLLECTION}/{first.recurring_run_id}",
    ]
    assert schedules.trigger_of(schedules.find_schedule(client, "weekly")) == trigger


def test_a_changed_recipe_is_a_change(kfp_server: Any, put: Any) -> None:
    put()
    with runs.compiled(find_recipe("demo", ["train.max_steps=7"])) as other:
        assert put(compiled=other).outcome == "changed"
        assert put(compiled=other).outcome == "unchanged"
    assert len(kfp_server.recurringruns) == 1


def test_when_creating_fails_the_old_one_goes_on(kfp_server: Any, client: Client, put: Any) -> None:
    first = put()
    kfp_server.fail_creation = True
    with pytest.raises(ClusterError, match="500: Internal error: the database is unreachable"):
        put(schedules.interval_trigger("12h"))
    (kept,) = schedules.find_schedules(client)
    assert kept.recurring_run_id == first.recurring_run_id
    assert schedules.is_enabled(kept)


def test_a_schedule_is_kept_while_one_of_its_runs_goes_on(
    kfp_server: Any, client: Client, put: Any
) -> None:
    """KFP 2.17 answered a deletion with 200, and the run stayed RUNNING without any pod."""
    first = put()
    run = kfp_server.replay("running", recurring_run_id=first.recurring_run_id)
    (recurring_run,) = schedules.find_schedules(client, "weekly")
    with pytest.raises(UserError, match=f"tuneline cancel {run['run_id']}"):
        schedules.delete_schedule(client, recurring_run)
    with pytest.raises(UserError, match="has not ended"):
        put(schedules.interval_trigger("12h"))
    (kept,) = schedules.find_schedules(client, "weekly")
    assert kept.recurring_run_id == first.recurring_run_id
    assert schedules.is_enabled(kept)
    run["state"] = "SUCCEEDED"
    schedules.delete_schedule(client, kept)
    assert schedules.find_schedules(client, "weekly") == []


def test_disabled_stays_disabled_until_told(kfp_server: Any, client: Client, put: Any) -> None:
    put(enabled=False)
    assert put().enabled is False
    changed = put(schedules.interval_trigger("12h"))
    assert (changed.outcome, changed.enabled) == ("changed", False)
    assert not schedules.is_enabled(schedules.find_schedule(client, "weekly"))
    woken = put(schedules.interval_trigger("12h"), enabled=True)
    assert (woken.outcome, woken.enabled) == ("changed", True)
    assert woken.recurring_run_id == changed.recurring_run_id
    assert schedules.is_enabled(schedules.find_schedule(client, "weekly"))


def test_what_others_made_is_left_alone(kfp_server: Any, client: Client, put: Any) -> None:
    made = put()
    kfp_server.recurringruns[made.recurring_run_id]["description"] = "by hand"
    written = kfp_server.writes()
    with pytest.raises(UserError, match="'weekly' exists that tuneline did not create"):
        put()
    assert kfp_server.writes() == written


def test_every_page_is_read(kfp_server: Any, client: Client, put: Any) -> None:
    made = put()
    stored = kfp_server.recurringruns[made.recurring_run_id]
    for number in range(250):
        other = {**stored, "recurring_run_id": f"r{number}", "display_name": f"other-{number}"}
        kfp_server.recurringruns[f"r{number}"] = other
    assert len(schedules.find_schedules(client)) == 251
    assert len(schedules.find_schedules(client, "other-249")) == 1


@pytest.mark.parametrize("kfp_server", [{"multi_user": True}], indirect=True)
def test_namespaces_have_schedules_of_their_own(kfp_server: Any, client: Client, put: Any) -> None:
    for namespace in ("team-a", "team-b"):
        assert put(namespace=namespace).outcome == "created"
    assert put(namespace="team-a").outcome == "unchanged"
    assert len(schedules.find_schedules(client, namespace="team-b")) == 1


def tuneline(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments)


def test_the_commands(kfp_server: Any) -> None:
    made = tuneline("schedule", "demo", *LOCAL, "--cron", "0 3 * * 1")
    assert "--cron has five fields: KFP gets '0 0 3 * * 1', with seconds first" in made.output
    assert "schedule demo: created, enabled, cron 0 0 3 * * 1 UTC" in made.output
    assert (
        "changed, enabled, every 43200 s"
        in tuneline("schedule", "demo", *LOCAL, "--every", "12h").output
    )
    assert tuneline("schedules", "--disable", "demo").output == "schedule demo: disabled\n"
    (identity,) = kfp_server.recurringruns
    row = next(line for line in tuneline("schedules").output.splitlines() if identity in line)
    assert row.split() == ["demo", "disabled", "every", "43200", "s", identity]
    assert tuneline("schedules", "--enable", "demo").output == "schedule demo: enabled\n"
    assert tuneline("schedules", "--delete", "demo").output == "schedule demo: deleted\n"
    assert kfp_server.recurringruns == {}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("schedule", "demo"), "give one of --cron and --every"),
        (("schedule", "demo", "--cron", "0 3 * * 1", "--every", "1h"), "give one of"),
        (("schedules", "--enable", "nightly"), "no schedule 'nightly'; existing schedules: none"),
    ],
)
def test_mistakes_on_the_command_line(
    kfp_server: Any, arguments: tuple[str, ...], says: str
) -> None:
    result = tuneline(*arguments)
    assert isinstance(result.exception, UserError)
    assert says in str(result.exception)
    assert kfp_server.writes() == []
