"""The Hub as a place."""

import os
from collections.abc import Sequence

from tuneline.artifacts import PublishedRepo
from tuneline.publish.account import TOKEN_VARIABLE, read_token
from tuneline.publish.config import PublishConfig
from tuneline.publish.hub import check_push, look_up_files, new_api, push
from tuneline.publish.previous import MARKER_FILE
from tuneline.publish.staging import StagedRepo


class OnHub:
    """The Hub as a place."""

    def __init__(self, target: str, config: PublishConfig) -> None:
        self._target = target
        self._config = config

    def check(self, staged: Sequence[StagedRepo]) -> None:
        """Check the token and all repositories; see `Place`."""
        check_push(new_api(read_token(self._target)), staged, self._config)

    def push(
        self, staged: Sequence[StagedRepo], elsewhere: Sequence[PublishedRepo] = ()
    ) -> list[PublishedRepo]:
        """Push every repository as a commit; see `Place`."""
        return push(list(staged), token=read_token(self._target), config=self._config)

    def read_last(self, name: str) -> str | None:
        """Return tuneline.json of the merged model's repository; see `Place`."""
        api = new_api(os.environ.get(TOKEN_VARIABLE, "").strip())
        files = look_up_files(api, self._target, self._config.max_attempts)
        return None if files is None else files.read(MARKER_FILE)
