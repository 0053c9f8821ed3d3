"""Send a message to the webhooks of a recipe. No failure of it fails the run."""

import logging
import os
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import urlsplit

import urllib3

from tuneline.errors import HubError
from tuneline.notify.config import NotifyConfig
from tuneline.notify.message import Message, payload
from tuneline.runtime.http_pool import http_pool
from tuneline.runtime.retries import retrying

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 4
"""Attempts per webhook, with pauses of 2, 4 and 8 seconds, or those that the server asks for."""
_TIMEOUT = urllib3.Timeout(connect=5, read=15)


class _RefusedError(Exception):
    """The server answered with another status than success."""

    def __init__(self, response: urllib3.BaseHTTPResponse) -> None:
        super().__init__(f"the server answered {response.status}")
        self.status, self.response = response.status, response


def send(webhooks: Iterable[NotifyConfig], message: Message) -> list[str]:
    """Send a message to each webhook that asks for its event.

    The URLs, which are secrets, appear in no text.

    Returns:
        A sentence per webhook that did not get the message.
    """
    problems = []
    for webhook in webhooks:
        if message.event not in webhook.events:
            continue
        problem = _problem(webhook, message)
        if problem:
            problems.append(f"The webhook in {webhook.webhook} was not told: {problem}.")
        else:
            logger.info("told the webhook in %s: %s", webhook.webhook, message.title)
    return problems


def _problem(webhook: NotifyConfig, message: Message) -> str:
    """Send a message to one webhook; return why it was not sent, or ""."""
    url = os.environ.get(webhook.webhook, "").strip()
    if not url:
        return f"the environment variable {webhook.webhook} is not set"
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
        return "the variable holds no URL that begins with https:// or http://"

    def post() -> None:
        if webhook.format == "prometheus":
            _push(url, message)
        else:
            _request("POST", url, json=payload(message, webhook.format))

    try:
        retrying(
            f"a message to the webhook in {webhook.webhook}",
            post,
            max_attempts=MAX_ATTEMPTS,
            advice="Check the URL and the network",
        )
    except (HubError, _RefusedError) as error:
        return str(error)
    # Whatever it is: the run has ended, and its result does not depend on a message.
    except Exception as error:
        return type(error).__name__
    return ""


def _push(url: str, message: Message) -> None:
    """Push the metrics of a run to a Pushgateway; other metrics of the recipe's group stay."""
    # Imported here, because only runs that name a Pushgateway need the package.
    from prometheus_client import pushadd_to_gateway

    from tuneline.notify.metrics import JOB, registry_of

    def handler(
        *, url: str, method: str, timeout: float, headers: list[tuple[str, str]], data: bytes
    ) -> Callable[[], None]:
        return lambda: _request(method, url, headers=dict(headers), body=data)

    grouping = {"recipe": message.recipe}
    pushadd_to_gateway(url, JOB, registry_of(message), grouping, handler=handler)


def _request(method: str, url: str, **arguments: Any) -> None:
    # urllib3's own retries would log the URL.
    with http_pool(url, retries=False, timeout=_TIMEOUT) as pool:
        response = pool.request(method, url, redirect=False, **arguments)
    if not 200 <= response.status < 300:
        raise _RefusedError(response)
