"""Say in a sentence why a store refused a request or could not be reached."""

import contextlib
from collections.abc import Iterator

from tuneline.errors import CredentialsError, DataError, HubError, StorageError, TunelineError
from tuneline.runtime.redaction import redacted
from tuneline.runtime.retries import http_status, passing_fault
from tuneline.runtime.source_names import STORES, store_of

_WITHOUT_CREDENTIALS = (
    *("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"),
    *("ClientAuthenticationError", "CredentialUnavailableError", "ConfigFileNotFound"),
    *("InvalidConfig", "RefreshError", "TokenRetrievalError", "HttpError: Anonymous caller"),
)
"""Names of errors of the stores' libraries that mean that no credentials were found or usable."""
_NO_SPACE = (
    *("QuotaExceeded", "StorageFull", "InsufficientCapacity", "InsufficientStorage"),
    *("AccountStorageQuota", "No space left", "EDQUOT"),
)
"""Words in errors of stores that may not hold more."""
_OTHER_REGION = ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraint")


@contextlib.contextmanager
def readable_errors(source: str) -> Iterator[None]:
    """Raise errors of a store's library as errors with a sentence."""
    try:
        yield
    except TunelineError:
        raise
    except Exception as error:
        raise explained(source, error) from error


def explained(source: str, error: Exception, *, verb: str = "read") -> TunelineError:
    """Return an error whose message says what to try after an error of a store's library.

    Args:
        source: address in the store.
        error: the error.
        verb: what was tried, "read" or "written".
    """
    if isinstance(error, TunelineError):
        return error
    name = store_of(source)
    assert name is not None
    store = STORES[name]
    shown = redacted(source)
    details = redacted(" ".join(f"{type(error).__name__}: {error}".split()))[:200]
    chain = " ".join(f"{type(cause).__name__}: {cause}" for cause in _causes(error))
    if isinstance(error, ImportError):
        return DataError(
            f"{shown}: {name}:// needs the package {store.package}, which is not installed: "
            f"install it with pip install 'tuneline[stores]'"
        )
    status = http_status(error)
    if any(word in chain for word in _OTHER_REGION):
        return DataError(
            f"{shown}: the bucket is in another region than the request ({details}): set "
            "AWS_REGION to the bucket's region, or AWS_ENDPOINT_URL to the store's address"
        )
    if any(word in chain for word in _NO_SPACE):
        return StorageError(
            f"{shown} cannot be {verb}, because the store is full or a quota is used up "
            f"({details}): make space, or raise the quota"
        )
    if (
        isinstance(error, PermissionError)
        or status in (401, 403)
        or any(word in chain for word in _WITHOUT_CREDENTIALS)
    ):
        return CredentialsError(
            f"{shown} may not be {verb} ({details}): {store.credentials}. On a cluster, name the "
            "Kubernetes secret that holds them under placement.secrets, or give the service "
            "account of the run access"
        )
    if isinstance(error, FileNotFoundError) or status == 404:
        return DataError(
            f"there is no {shown}, or these credentials may not see it: check the bucket and the "
            "path"
        )
    fault = passing_fault(error)
    if fault is not None:
        return HubError(f"{shown} cannot be reached ({fault.text}): check the network and the name")
    return DataError(f"{shown} cannot be {verb}: {details}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
