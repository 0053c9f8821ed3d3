"""The `notify` section of a recipe."""

import re
from typing import Literal

from pydantic import Field, field_validator

from tuneline.strict_model import StrictModel

Event = Literal["promoted", "held", "failed", "cancelled"]
Shape = Literal["json", "slack", "teams", "prometheus"]


class NotifyConfig(StrictModel):
    """A webhook that gets a message when a run ends."""

    webhook: str
    """Name of the environment variable that holds the URL of the webhook, e.g. SLACK_WEBHOOK. The
    URL is a secret, so it is not part of a recipe. On a cluster, placement.secrets sets the
    variable from a Kubernetes secret: {my-webhook: {url: SLACK_WEBHOOK}}."""
    format: Shape = "json"
    """What is sent. json: an object with run, recipe, event, text, scores, links, step, cause,
    advice and seconds. slack: a message of Slack's incoming webhooks. teams: an adaptive card, for
    a webhook of Teams' Workflows. prometheus: metrics of the run, for a Pushgateway; the variable
    then holds the gateway's URL, such as http://pushgateway.monitoring:9091."""
    events: tuple[Event, ...] = Field(
        default=("promoted", "held", "failed", "cancelled"), min_length=1
    )
    """The ends of a run that are reported: the gate promoted or held the model, a step failed, or
    somebody stopped the run."""

    @field_validator("webhook")
    @classmethod
    def _is_a_variable(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
            # The value is not repeated: it may be the URL.
            raise ValueError(
                "webhook is the name of an environment variable, such as SLACK_WEBHOOK, which "
                "holds the URL: the URL itself is a secret and does not belong into a recipe"
            )
        return value
