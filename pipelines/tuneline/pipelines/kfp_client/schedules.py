"""Schedules, which KFP calls recurring runs. Each name has at most one.

KFP has no request that changes a recurring run, so a changed one replaces the old one: the old one
is disabled, the new one is created, then the old one is deleted. Therefore two recurring runs never
start runs at the same time. If the creation fails, the old one is enabled again. The description of
a recurring run holds a digest of its content, so that scheduling the same content twice changes
nothing.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tuneline.errors import UserError
from tuneline.pipelines.kfp_client.connection import Client, readable_errors
from tuneline.pipelines.kfp_client.runs import by_display_name, check_passed_on, recent_runs

MIN_INTERVAL_SECONDS = 60
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_MARK = re.compile(r"\[tuneline ([0-9a-f]{16})\]")

_MONTHS: Sequence[str] = "jan feb mar apr may jun jul aug sep oct nov dec".split()
_DAYS: Sequence[str] = "sun mon tue wed thu fri sat".split()
# Field, smallest value, largest value, and names of the values, beginning with the smallest.
_FIELDS: list[tuple[str, int, int, Sequence[str]]] = [
    ("second", 0, 59, []),
    ("minute", 0, 59, []),
    ("hour", 0, 23, []),
    ("day of month", 1, 31, []),
    ("month", 1, 12, _MONTHS),
    ("day of week", 0, 6, _DAYS),
]


@dataclass(frozen=True)
class Trigger:
    """When a schedule starts runs. Exactly one of the two fields is set."""

    cron: str | None = None
    """Cron expression with KFP's six fields, in UTC."""
    interval_seconds: int | None = None
    """Seconds between two starts."""

    def __str__(self) -> str:
        return f"cron {self.cron} UTC" if self.cron else f"every {self.interval_seconds} s"


@dataclass(frozen=True)
class Scheduled:
    """Result of scheduling a pipeline."""

    recurring_run_id: str
    outcome: str
    """created, changed or unchanged."""
    enabled: bool
    """Whether the schedule starts runs."""


def cron_trigger(text: str) -> Trigger:
    """Check a cron expression of five or six fields and return a trigger with six.

    KFP expects six fields, of which the first is the second. It reads five fields as the first five
    of six: "10 10 * * *" would start a run every hour, not every day. Five fields therefore get a 0
    for the second in front.

    Raises:
        UserError: the text is not a cron expression, or would start several runs per minute.
    """
    fields = text.split()
    if len(fields) == 5:
        fields = ["0", *fields]
    if len(fields) != 6:
        raise UserError(
            f"--cron '{text}' has {len(fields)} fields: write five (minute hour day month "
            "weekday), e.g. '0 3 * * 1' for Mondays at 3, or six, seconds first"
        )
    for value, field in zip(fields, _FIELDS, strict=True):
        _check_field(text, value, *field)
    if not fields[0].isdigit():
        raise UserError(
            f"--cron '{text}' starts more than one run per minute: with six fields, the first one "
            "is for seconds; set it to a single number, e.g. 0"
        )
    return Trigger(cron=" ".join(fields))


def _check_field(
    text: str, value: str, name: str, smallest: int, largest: int, names: Sequence[str]
) -> None:
    values = {word: smallest + index for index, word in enumerate(names)}
    for part in value.lower().split(","):
        span, _, step = part.partition("/")
        first, dash, last = span.partition("-")
        bounds = [] if span in ("*", "?") else [first, *([last] if dash else [])]
        numbers = [values.get(bound, int(bound) if bound.isdigit() else -1) for bound in bounds]
        fits = all(smallest <= number <= largest for number in numbers)
        if not fits or numbers != sorted(numbers) or ("/" in part and not step.isdigit()):
            raise UserError(
                f"--cron '{text}': '{part}' is not a valid {name}; write {smallest} to {largest}, "
                "*, a list a,b, a range a-b or a step */n"
            )


def interval_trigger(text: str) -> Trigger:
    """Parse an interval, a number with one of the units s, m, h and d.

    Raises:
        UserError: the text is not an interval, or the interval is shorter than a minute.
    """
    match = re.fullmatch(r"(\d+)([smhd])", text)
    seconds = int(match[1]) * _UNITS[match[2]] if match else 0
    if seconds < MIN_INTERVAL_SECONDS:
        raise UserError(
            f"--every '{text}': write a number with s, m, h or d, at least a minute, e.g. 12h"
        )
    return Trigger(interval_seconds=seconds)


def schedule(
    client: Client,
    pipeline: Path,
    trigger: Trigger,
    *,
    name: str,
    experiment: str,
    description: str = "",
    namespace: str | None = None,
    service_account: str | None = None,
    pipeline_root: str | None = None,
    enabled: bool | None = None,
) -> Scheduled:
    """Create the recurring run `name`, or replace it if its content differs.

    A recurring run has at most one active run, and does not catch up on starts that it missed.

    Args:
        client: connection to the KFP API.
        pipeline: file of the compiled pipeline that each run executes.
        trigger: when runs start.
        name: name of the recurring run; its runs are named after it.
        experiment: KFP experiment of its runs; created if it does not exist.
        description: text for readers; the digest of the content is appended to it.
        namespace: the user's namespace, on Kubeflow with profiles.
        service_account: service account that the pods use; None: KFP's default.
        pipeline_root: URI under which KFP stores artifacts; None: KFP's default.
        enabled: whether the recurring run starts runs; None: as before, or True for a new one.

    Raises:
        UserError: a recurring run of this name exists that tuneline did not create, or Argo or
            Kubernetes would replace a part of the name or of the URI.
    """
    check_passed_on(name, pipeline_root)
    present = find_schedules(client, name, namespace=namespace)
    foreign = [recurring_run for recurring_run in present if not _digest_of(recurring_run)]
    if foreign:
        raise UserError(
            f"a recurring run '{name}' exists that tuneline did not create "
            f"({foreign[0].recurring_run_id}): choose another --name, or delete it first"
        )
    if enabled is None:
        enabled = not present or any(is_enabled(recurring_run) for recurring_run in present)
    text = pipeline.read_text(encoding="utf-8")
    content = [text, asdict(trigger), description, experiment, service_account, pipeline_root]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    if [_digest_of(recurring_run) for recurring_run in present] == [digest]:
        (same,) = present
        if is_enabled(same) == enabled:
            return Scheduled(same.recurring_run_id, "unchanged", enabled)
        set_enabled(client, same, enabled)
        return Scheduled(same.recurring_run_id, "changed", enabled)
    were_enabled = [recurring_run for recurring_run in present if is_enabled(recurring_run)]
    for recurring_run in were_enabled:
        set_enabled(client, recurring_run, False)
    try:
        _refuse_while_it_runs(client, present, namespace)
        with readable_errors():
            group = client.create_experiment(experiment, namespace=namespace)
            created = client.create_recurring_run(
                experiment_id=group.experiment_id,
                job_name=name,
                description=f"{description} [tuneline {digest}]".strip(),
                interval_second=trigger.interval_seconds,
                cron_expression=trigger.cron,
                max_concurrency=1,
                no_catchup=True,
                pipeline_package_path=str(pipeline),
                enabled=enabled,
                pipeline_root=pipeline_root,
                service_account=service_account,
            )
    except BaseException:
        for recurring_run in were_enabled:
            set_enabled(client, recurring_run, True)
        raise
    for recurring_run in present:
        delete_schedule(client, recurring_run, namespace=namespace)
    return Scheduled(created.recurring_run_id, "changed" if present else "created", enabled)


def find_schedules(
    client: Client, name: str | None = None, *, namespace: str | None = None
) -> list[Any]:
    """Return all recurring runs; if `name` is given, only the recurring runs with that name."""
    recurring_runs: list[Any] = []
    token = ""
    while True:
        with readable_errors():
            page = client.list_recurring_runs(
                page_token=token,
                page_size=100,
                namespace=namespace or client.get_user_namespace() or None,
                filter=by_display_name(name) if name else None,
            )
        recurring_runs += page.recurring_runs or []
        token = page.next_page_token or ""
        if not token:
            return recurring_runs


def find_schedule(client: Client, name: str, *, namespace: str | None = None) -> Any:
    """Return the only recurring run with this name.

    Raises:
        UserError: no recurring run or more than one has this name.
    """
    matches = find_schedules(client, name, namespace=namespace)
    if len(matches) == 1:
        return matches[0]
    if matches:
        ids = ", ".join(recurring_run.recurring_run_id for recurring_run in matches)
        raise UserError(
            f"{len(matches)} recurring runs are named '{name}': delete all but one: {ids}"
        )
    others = find_schedules(client, namespace=namespace)
    names = ", ".join(recurring_run.display_name for recurring_run in others)
    raise UserError(f"no schedule '{name}'; existing schedules: {names or 'none'}")


def is_enabled(recurring_run: Any) -> bool:
    """Return whether a recurring run starts runs."""
    return not (recurring_run.mode == "DISABLE" or recurring_run.status == "DISABLED")


def set_enabled(client: Client, recurring_run: Any, enabled: bool) -> None:
    """Enable or disable a recurring run."""
    with readable_errors():
        change = client.enable_recurring_run if enabled else client.disable_recurring_run
        change(recurring_run.recurring_run_id)


def delete_schedule(client: Client, recurring_run: Any, *, namespace: str | None = None) -> None:
    """Delete a recurring run. Kubernetes then deletes the workflows and pods of its runs.

    Raises:
        UserError: one of its runs has not ended. KFP would call that run RUNNING for ever.
    """
    _refuse_while_it_runs(client, [recurring_run], namespace)
    with readable_errors():
        client.delete_recurring_run(recurring_run.recurring_run_id)


def _refuse_while_it_runs(
    client: Client, recurring_runs: Sequence[Any], namespace: str | None
) -> None:
    ids = {recurring_run.recurring_run_id for recurring_run in recurring_runs}
    if not ids:
        return
    for run in recent_runs(client, namespace=namespace, limit=100):
        if run.recurring_run_id in ids and run.state in ("PENDING", "RUNNING"):
            raise UserError(
                f"run {run.display_name} of this schedule has not ended, and Kubernetes deletes "
                f"its pods with the schedule: wait until it ends, or `tuneline cancel {run.run_id}`"
            )


def trigger_of(recurring_run: Any) -> Trigger:
    """Return the trigger of a recurring run."""
    trigger = recurring_run.trigger
    if trigger.cron_schedule:
        return Trigger(cron=trigger.cron_schedule.cron)
    return Trigger(interval_seconds=int(trigger.periodic_schedule.interval_second))


def _digest_of(recurring_run: Any) -> str | None:
    match = _MARK.search(recurring_run.description or "")
    return match[1] if match else None
