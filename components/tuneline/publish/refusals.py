"""Sentences for the requests of a push that the Hub refuses, with the cause of each refusal."""

import re

from tuneline.errors import CredentialsError, HubError, TunelineError, UserError

STORAGE_LIMIT = re.compile(
    r"storage (limit|quota|patterns)|(limit|quota) .*\bstorage|out of storage|exceeded .*\bquota",
    re.IGNORECASE,
)
"""What the Hub says if an account may not store more; it answers with the status 403 or 402."""
_RATE_LIMIT = re.compile(r"rate.?limit|too many|per (day|hour)", re.IGNORECASE)


def refusal(what: str, status: int | None, error: Exception | None) -> TunelineError:
    """Return the error for a response that would be the same after another attempt.

    Args:
        what: description of the request.
        status: status code of the response; None: there was no response.
        error: the client's error.
    """
    message = " ".join((getattr(error, "server_message", None) or "").split())
    says = f". The Hub says: {message}" if message else ""
    if status in (402, 403, 413) and STORAGE_LIMIT.search(message):
        return UserError(
            f"{what}: the account has no storage left ({status}){says}. The token is not the "
            "cause. Set publish.private to false (public repositories have a larger limit), name "
            "fewer formats in the section quantize, delete old repositories, or take a "
            "larger plan"
        )
    if status == 403 and _RATE_LIMIT.search(message):
        return HubError(f"{what}: the Hub limits the number of requests (403){says}. Try later")
    if status == 401:
        return CredentialsError(
            f"{what}: the Hub does not accept the token in HF_TOKEN (401). Create a new one with "
            "write access"
        )
    if status == 403:
        return CredentialsError(
            f"{what}: the token in HF_TOKEN lacks the permission (403): it needs write access to "
            f"this namespace{says}"
        )
    if status == 404:
        return HubError(
            f"{what}: the Hub cannot find the repository (404). Check that its namespace exists "
            "and that nobody removes the repository meanwhile, then run the step again"
        )
    if status in (409, 412):
        return UserError(
            f"{what}: the Hub answered {status}: the repository exists or was changed meanwhile. "
            "Check that nobody else publishes to the same name, then run the step again"
        )
    if status is None:
        return HubError(
            f"{what}: {type(error).__name__}: {error}. Check HF_ENDPOINT, HF_HUB_OFFLINE and the "
            "proxy"
        )
    return HubError(f"{what}: the Hub answered {status}: {message or 'no reason given'}")
