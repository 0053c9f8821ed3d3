"""What a notification says, and how JSON, Slack and Teams want it.

Slack: https://api.slack.com/messaging/webhooks and, for the escaping, "Formatting text for app
surfaces". Teams: "Create incoming webhooks with Workflows for Microsoft Teams" and the schema 1.4
of adaptive cards, on learn.microsoft.com and adaptivecards.io.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tuneline.notify.config import Event
from tuneline.records.in_words import change_text, score_pair
from tuneline.records.scores import TaskComparison
from tuneline.runtime.redaction import without_secrets
from tuneline.version import VERSION

JsonShape = Literal["json", "slack", "teams"]
"""Shapes of a webhook's body that are JSON."""
HEADINGS: dict[Event, str] = {
    "promoted": "promoted",
    "held": "on hold",
    "failed": "failed",
    "cancelled": "stopped",
}
MAX_CHARACTERS = 2900
"""Longest text of a block: Slack's limit is 3000 characters."""


MAX_SCORES = 8
"""Scores that a termination message has room for."""


@dataclass(frozen=True)
class Score:
    """How a task changed."""

    task: str
    metric: str
    base: float
    tuned: float
    text: str
    """The change as people read it."""


@dataclass(frozen=True)
class Message:
    """How a run ended."""

    event: Event
    run: str
    """Name of the run."""
    recipe: str
    """Name of the recipe."""
    text: str
    """One or two sentences: the verdict, or what failed."""
    scores: Sequence[Score] = ()
    links: Mapping[str, str] = field(default_factory=dict)
    """Where the report and the published model are, and commands that show more."""
    step: str = ""
    """The step that failed."""
    cause: str = ""
    advice: str = ""
    """What to change."""
    seconds: float | None = None
    """Time from the start of the first step to now; None if it is not known."""

    @property
    def title(self) -> str:
        """The run and how it ended."""
        where = f" at {self.step}" if self.step and self.event == "failed" else ""
        return f"{self.run}: {HEADINGS[self.event]}{where}"


def scores_of(comparisons: Sequence[TaskComparison]) -> list[Score]:
    """Return the scores of a decision, of the targets and guards."""
    return [
        Score(
            task=item.task,
            metric=item.metric,
            base=round(item.base, 4),
            tuned=round(item.tuned, 4),
            text=f"{' -> '.join(score_pair(item))} ({change_text(item, item.change)})",
        )
        for item in comparisons
        if item.role in ("target", "guard")
    ]


def encode_scores(scores: Sequence[Score]) -> str:
    """Return scores as JSON that fits into a termination message: the first eight."""
    rows = [list(asdict(score).values()) for score in scores[:MAX_SCORES]]
    return json.dumps(rows, separators=(",", ":"), ensure_ascii=False)


def decode_scores(text: str) -> list[Score]:
    """Return the scores in a termination message; [] if there are none."""
    try:
        return [Score(*row) for row in json.loads(text or "[]")]
    except (ValueError, TypeError):
        return []


def payload(message: Message, shape: JsonShape) -> dict[str, Any]:
    """Return the JSON object that a webhook of a shape gets, without secrets."""
    clean: dict[str, Any] = without_secrets(SHAPES[shape](message))
    return clean


def _json(message: Message) -> dict[str, Any]:
    return {**asdict(message), "title": message.title, "tuneline": VERSION}


def _slack(message: Message) -> dict[str, Any]:
    lines = [f"*{_escaped(message.title)}*", *map(_escaped, _sentences(message))]
    lines += [f"\u2022 {_escaped(f'{score.task}: {score.text}')}" for score in message.scores]
    lines += [f"{_escaped(name)}: {_escaped(value)}" for name, value in message.links.items()]
    text = _cut("\n".join(lines))
    return {
        # Notifications on a screen show this text instead of the blocks.
        "text": _escaped(f"{message.title}. {message.text}")[:MAX_CHARACTERS],
        "blocks": [{"type": "section", "text": {"type": "mrkdwn", "text": text}}],
    }


def _teams(message: Message) -> dict[str, Any]:
    colour = {"promoted": "good", "held": "warning", "failed": "attention", "cancelled": "default"}
    body: list[dict[str, Any]] = [
        {
            "type": "TextBlock",
            "text": message.title,
            "weight": "bolder",
            "size": "medium",
            "wrap": True,
            "color": colour[message.event],
        },
        *({"type": "TextBlock", "text": _cut(text), "wrap": True} for text in _sentences(message)),
    ]
    facts = [{"title": score.task, "value": score.text} for score in message.scores]
    facts += [{"title": name, "value": value} for name, value in message.links.items()]
    if facts:
        body.append({"type": "FactSet", "facts": facts})
    card = {
        "$schema": "http://adaptivecards.io/schemas/adaptive-card.json",
        "type": "AdaptiveCard",
        "version": "1.4",
        "body": body,
    }
    content = "application/vnd.microsoft.card.adaptive"
    return {
        "type": "message",
        "attachments": [{"contentType": content, "contentUrl": None, "content": card}],
    }


SHAPES: dict[JsonShape, Callable[[Message], dict[str, Any]]] = {
    "json": _json,
    "slack": _slack,
    "teams": _teams,
}


def _sentences(message: Message) -> list[str]:
    cause = message.cause if message.cause != message.text else ""
    return [text for text in (message.text, cause, message.advice) if text]


def _escaped(text: str) -> str:
    """Return text in which Slack sees no control sequences, such as <!channel>."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _cut(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else f"{text[: MAX_CHARACTERS - 3]}..."
