"""Recurring runs: one a name, changed by replacing it.

KFP has no call that changes a recurring run. The old one is disabled, the new one created, the
old one deleted: never two that start runs, and when creating fails the old one goes on as it was.
What a recurring run holds is known by a digest in its description, so that scheduling the same
twice writes nothing.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tuneline.errors import UserError
from tuneline.pipelines.kfp_client.runs import Client, by_display_name, plainly

MIN_INTERVAL_SECONDS = 60
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_MARK = re.compile(r"\[tuneline ([0-9a-f]{16})\]")

_MONTHS = "jan feb mar apr may jun jul aug sep oct nov dec".split()
_DAYS = "sun mon tue wed thu fri sat".split()
# Name, smallest, largest, names from the smallest on.
_FIELDS: list[tuple[str, int, int, list[str]]] = [
    ("second", 0, 59, []),
    ("minute", 0, 59, []),
    ("hour", 0, 23, []),
    ("day of month", 1, 31, []),
    ("month", 1, 12, _MONTHS),
    ("day of week", 0, 6, _DAYS),
]


@dataclass(frozen=True)
class Trigger:
    """When runs start: one of the two is set."""

    cron: str | None = None
    """KFP's six fields, in UTC."""
    interval_seconds: int | None = None

    def __str__(self) -> str:
        return f"cron {self.cron} UTC" if self.cron else f"every {self.interval_seconds} s"


@dataclass(frozen=True)
class Scheduled:
    """What became of a schedule."""

    recurring_run_id: str
    outcome: str
    """created, changed or unchanged."""
    enabled: bool


def cron_trigger(text: str) -> Trigger:
    """Check a cron expression of five or six fields.

    KFP reads six, seconds first, and takes five for the first five of them: "10 10 * * *" would
    start every hour instead of every day. So five get a second in front.

    Raises:
        UserError: it is not a cron expression, or starts a run every second.
    """
    fields = text.split()
    if len(fields) == 5:
        fields = ["0", *fields]
    if len(fields) != 6:
        raise UserError(
            f"--cron '{text}' has {len(fields)} fields: write five (minute hour day month "
            "weekday), e.g. '0 3 * * 1' for Mondays at 3, or six with the second first"
        )
    for value, field in zip(fields, _FIELDS, strict=True):
        _check_field(text, value, *field)
    if not fields[0].isdigit():
        raise UserError(
            f"--cron '{text}' starts more than one run a minute: the first of six fields is the "
            "second, give it one number, e.g. 0"
        )
    return Trigger(cron=" ".join(fields))


def _check_field(
    text: str, value: str, name: str, smallest: int, largest: int, names: list[str]
) -> None:
    known = {word: smallest + index for index, word in enumerate(names)}
    for part in value.lower().split(","):
        span, _, step = part.partition("/")
        first, dash, last = span.partition("-")
        bounds = [] if span in ("*", "?") else [first, *([last] if dash else [])]
        numbers = [known.get(bound, int(bound) if bound.isdigit() else -1) for bound in bounds]
        fits = all(smallest <= number <= largest for number in numbers)
        if not fits or numbers != sorted(numbers) or ("/" in part and not step.isdigit()):
            raise UserError(
                f"--cron '{text}': '{part}' is not a {name}; write {smallest} to {largest}, *, a "
                "list a,b, a range a-b or a step */n"
            )


def interval_trigger(text: str) -> Trigger:
    """Read an interval: a number with s, m, h or d.

    Raises:
        UserError: it is not one, or shorter than a minute.
    """
    match = re.fullmatch(r"(\d+)([smhd])", text)
    seconds = int(match[1]) * _UNITS[match[2]] if match else 0
    if seconds < MIN_INTERVAL_SECONDS:
        raise UserError(
            f"--every '{text}': write a number with s, m, h or d, a minute or more, e.g. 12h"
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
    """Make the recurring run `name` what is asked for; one run at a time, none made up for.

    Args:
        client: where.
        pipeline: the compiled pipeline that each run runs.
        trigger: when.
        name: of the recurring run, and so of its runs.
        experiment: that its runs belong to.
        description: for people; what tells one content from another is put behind it.
        namespace: for Kubeflow with profiles.
        service_account: that pods run as.
        pipeline_root: where artifacts go.
        enabled: None keeps what it was; a new one is enabled.

    Raises:
        UserError: one of this name exists that tuneline did not make.
    """
    present = find_schedules(client, name, namespace=namespace)
    foreign = [found for found in present if not _digest_of(found)]
    if foreign:
        raise UserError(
            f"a recurring run '{name}' exists that tuneline did not make "
            f"({foreign[0].recurring_run_id}): choose another --name, or delete it first"
        )
    if enabled is None:
        enabled = any(is_enabled(found) for found in present) if present else True
    text = pipeline.read_text(encoding="utf-8")
    content = [text, asdict(trigger), description, experiment, service_account, pipeline_root]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    if [_digest_of(found) for found in present] == [digest]:
        (same,) = present
        if is_enabled(same) == enabled:
            return Scheduled(same.recurring_run_id, "unchanged", enabled)
        set_enabled(client, same, enabled)
        return Scheduled(same.recurring_run_id, "changed", enabled)
    were_enabled = [found for found in present if is_enabled(found)]
    for found in were_enabled:
        set_enabled(client, found, False)
    try:
        with plainly():
            owner = client.create_experiment(experiment, namespace=namespace)
            made = client.create_recurring_run(
                experiment_id=owner.experiment_id,
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
        for found in were_enabled:
            set_enabled(client, found, True)
        raise
    for found in present:
        delete_schedule(client, found)
    return Scheduled(made.recurring_run_id, "changed" if present else "created", enabled)


def find_schedules(
    client: Client, name: str | None = None, *, namespace: str | None = None
) -> list[Any]:
    """Return the recurring runs, all or those of one name."""
    found: list[Any] = []
    token = ""
    while True:
        with plainly():
            page = client.list_recurring_runs(
                page_token=token,
                page_size=100,
                namespace=namespace or client.get_user_namespace() or None,
                filter=by_display_name(name) if name else None,
            )
        found += page.recurring_runs or []
        token = page.next_page_token or ""
        if not token:
            return found


def find_schedule(client: Client, name: str, *, namespace: str | None = None) -> Any:
    """Return the one recurring run of a name.

    Raises:
        UserError: there is none, or more than one.
    """
    found = find_schedules(client, name, namespace=namespace)
    if len(found) == 1:
        return found[0]
    if found:
        ids = ", ".join(each.recurring_run_id for each in found)
        raise UserError(
            f"{len(found)} recurring runs are named '{name}': delete all but one: {ids}"
        )
    known = [each.display_name for each in find_schedules(client, namespace=namespace)]
    near = f"there are {', '.join(known)}" if known else "there are none"
    raise UserError(f"no schedule '{name}': {near}")


def is_enabled(recurring_run: Any) -> bool:
    """Say whether it starts runs."""
    return recurring_run.mode != "DISABLE" and recurring_run.status != "DISABLED"


def set_enabled(client: Client, recurring_run: Any, enabled: bool) -> None:
    """Let it start runs, or not."""
    with plainly():
        change = client.enable_recurring_run if enabled else client.disable_recurring_run
        change(recurring_run.recurring_run_id)


def delete_schedule(client: Client, recurring_run: Any) -> None:
    """Delete it; its runs stay."""
    with plainly():
        client.delete_recurring_run(recurring_run.recurring_run_id)


def trigger_of(recurring_run: Any) -> Trigger:
    """Return when it starts runs."""
    trigger = recurring_run.trigger
    if trigger.cron_schedule:
        return Trigger(cron=trigger.cron_schedule.cron)
    return Trigger(interval_seconds=int(trigger.periodic_schedule.interval_second))


def _digest_of(recurring_run: Any) -> str | None:
    match = _MARK.search(recurring_run.description or "")
    return match[1] if match else None
