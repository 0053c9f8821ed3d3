"""Repeat a request after a fault of the network or of a server that does not last.

KFP 2.17 does not run a step again whose process failed, so a step waits out such faults itself.
Repeated are broken connections, time limits, and the status codes 408, 429 and 5xx. Everything else
would fail again: a missing token or repository (401, 403, 404), a bad request, a full disk.

The clients of the Hub repeat some requests themselves. huggingface_hub repeats uploads, and
downloads after a broken connection, but neither look-ups nor downloads after 5xx. datasets repeats
reads of a file that it has opened after a broken connection. What is repeated here is one call of a
client, after its own attempts. No library for retries is in the locks of the images, and none of
them reads Retry-After.
"""

import datetime
import email.utils
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from tuneline.errors import HubError

logger = logging.getLogger(__name__)

T = TypeVar("T")

SECONDS_VARIABLE = "TUNELINE_RETRY_SECONDS"
"""Environment variable with the sum of the pauses of one request, in seconds; 0 repeats none."""
MAX_SECONDS = 600.0
"""Sum of the pauses of one request by default: twice the window of the Hub's rate limits."""
MAX_PAUSE_SECONDS = 60.0
"""Longest pause if the server does not name one."""

_HUB_ADVICE = (
    "Check the network and HF_ENDPOINT, or set HF_HUB_OFFLINE=1 if the files are in the cache, and "
    "run the step again later; files that were transferred are not sent again"
)
_STATUSES = {408, 429, *range(500, 600)} - {501, 505, 507, 511}
_NETWORK_ERRORS = {
    *("httpx2.TimeoutException", "httpx2.NetworkError", "httpx2.RemoteProtocolError"),
    *("requests.ConnectionError", "requests.Timeout", "requests.ChunkedEncodingError"),
    *("urllib3.ProtocolError", "urllib3.TimeoutError", "urllib3.NewConnectionError"),
    *("aiohttp.ClientConnectionError", "aiohttp.ClientPayloadError", "http.IncompleteRead"),
    *("botocore.HTTPClientError", "azure.ServiceRequestError", "azure.ServiceResponseError"),
    *("google.TransportError", "oci.ConnectTimeout", "oci.RequestException"),
}
"""Errors of the connection, as package and class, of libraries that not every image has."""
_LASTING = ("OfflineModeIsEnabled", "CERTIFICATE_VERIFY")
"""Words in the class or the message of errors of the connection that would come again. datasets
names the first in the message of a ConnectionError."""
# What hf_xet and its HTTP client write into their messages, instead of an attribute.
_STATUS_IN_TEXT = re.compile(r"HTTP status (?:client|server) error \((\d{3})|\b(40[134])\b")


@dataclass(frozen=True)
class Fault:
    """A fault that may not last."""

    text: str
    """What happened, for messages."""
    retry_after: float | None = None
    """Seconds after which the server asks to repeat the request."""


def passing_fault(error: BaseException) -> Fault | None:
    """Return the fault that caused an error if it may not last, or None if it would come again."""
    fault = None
    for cause in _causes(error):
        if any(word in f"{type(cause).__name__}: {cause}" for word in _LASTING):
            return None
        status = _status(cause)
        if status is not None:
            if status not in _STATUSES:
                return None
            headers = getattr(getattr(cause, "response", None), "headers", {})
            return Fault(f"the server answered {status}", _retry_after(headers))
        if fault is None and _is_of_network(cause):
            fault = Fault(f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}")
    return fault


def http_status(error: BaseException) -> int | None:
    """Return the HTTP status code that an error or one of its causes reports; None without one."""
    return next((code for cause in _causes(error) if (code := _status(cause)) is not None), None)


class Retries:
    """The attempts of one request."""

    def __init__(
        self, what: str, *, max_attempts: int | None = None, advice: str = _HUB_ADVICE
    ) -> None:
        """Begin with the first attempt.

        Args:
            what: What is requested, for messages.
            max_attempts: Largest number of attempts; None: as many as the time allows.
            advice: What to try if the fault lasts, as a sentence without a full stop.
        """
        self._what = what
        self._max_attempts = max_attempts
        self._advice = advice
        self.start_again()

    def start_again(self) -> None:
        """Forget earlier faults, because the request has made progress."""
        self._num_attempts = 1
        self._seconds = 0.0

    def wait(self, error: Exception) -> None:
        """Wait before the next attempt after an error that the last one raised.

        Raises:
            HubError: no time for waiting or no attempt was left.
            Exception: the error itself, if it would come again.
        """
        fault = passing_fault(error)
        if fault is None:
            raise error
        pause = fault.retry_after
        if pause is None:
            pause = min(MAX_PAUSE_SECONDS, 2.0**self._num_attempts * random.uniform(0.5, 1))
        max_seconds = float(os.environ.get(SECONDS_VARIABLE, MAX_SECONDS))
        if self._num_attempts == self._max_attempts or self._seconds + pause > max_seconds:
            attempts = f"{self._num_attempts} attempt{'s' * (self._num_attempts > 1)}"
            asks = "" if fault.retry_after is None else f", and asks to wait {pause:.0f} s"
            raise HubError(
                f"{self._what}: {fault.text}{asks}, after {attempts} and {self._seconds:.0f} s of "
                f"waiting. {self._advice}"
            ) from error
        self._num_attempts += 1
        self._seconds += pause
        logger.warning(
            "%s: %s; attempt %d in %.1f s", self._what, fault.text, self._num_attempts, pause
        )
        time.sleep(pause)


def retrying(
    what: str,
    request: Callable[[], T],
    *,
    max_attempts: int | None = None,
    advice: str = _HUB_ADVICE,
) -> T:
    """Return the answer to a request; repeat the request after a fault that may not last.

    Args:
        what: What is requested, for messages.
        request: Function that sends the request.
        max_attempts: Largest number of attempts; None: as many as the time allows.
        advice: What to try if the fault lasts, as a sentence without a full stop.

    Raises:
        HubError: the fault lasted.
        Exception: what the request raised, if it would raise it again.
    """
    retries = Retries(what, max_attempts=max_attempts, advice=advice)
    while True:
        try:
            return request()
        except Exception as error:
            retries.wait(error)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes, because libraries wrap errors of the network in others."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)


def _status(error: BaseException) -> int | None:
    """Return the HTTP status code that an error reports, if it does."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, Mapping):
        # botocore's errors, which the client of S3 raises.
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status if isinstance(status, int) else None
    for value in (getattr(response, "status_code", None), getattr(error, "status", None)):
        if isinstance(value, int):
            return value
    if isinstance(error, ConnectionError | RuntimeError):
        match = _STATUS_IN_TEXT.search(str(error))
        return int(match[1] or match[2]) if match else None
    return None


def _is_of_network(error: BaseException) -> bool:
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    return any(
        f"{kind.__module__.partition('.')[0]}.{kind.__name__}" in _NETWORK_ERRORS
        for kind in type(error).__mro__
    )


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds after which a response asks to repeat the request."""
    value = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", value):
        return float(value)
    try:
        moment = email.utils.parsedate_to_datetime(value)
    except ValueError:
        # The Hub's own limits: RateLimit: "api";r=0;t=55
        limit = re.search(r"\br=0\s*;\s*t=(\d+)", headers.get("RateLimit", ""))
        return float(limit[1]) if limit else None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    return max(0.0, (moment - datetime.datetime.now(datetime.UTC)).total_seconds())
