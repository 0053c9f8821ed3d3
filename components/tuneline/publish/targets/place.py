"""What every kind of place can do."""

from collections.abc import Sequence
from typing import Protocol

from tuneline.artifacts import PublishedRepo
from tuneline.publish.staging import StagedRepo


class Place(Protocol):
    """One target of publish, with its credentials."""

    def check(self, staged: Sequence[StagedRepo]) -> None:
        """Check that the repositories may be pushed, before anything is sent anywhere.

        Raises:
            CredentialsError: the credentials are missing or refused.
            OutputExistsError: something is in the way that tuneline did not publish.
            HubError: the place cannot be reached.
        """

    def push(
        self, staged: Sequence[StagedRepo], elsewhere: Sequence[PublishedRepo] = ()
    ) -> list[PublishedRepo]:
        """Push the repositories; one that holds the same model already stays as it is.

        Args:
            staged: the repositories; their folders are this place's own and may be changed.
            elsewhere: what earlier targets of the run have, for places that hold addresses.

        Raises:
            TunelineError: a repository could not be pushed.
        """

    def read_last(self, name: str) -> str | None:
        """Return tuneline.json of the merged model that was published last; None without one.

        Args:
            name: name of the merged model's repository, without a namespace.
        """
