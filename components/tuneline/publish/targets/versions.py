"""The tags v1, v2 and so on, for places without a history: a repository has one per version."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from tuneline.errors import OutputExistsError
from tuneline.publish.previous import MARKER_FILE
from tuneline.publish.staging import StagedRepo

_TAG = re.compile(r"v([1-9]\d*)")


def newest_first(names: Iterable[str]) -> list[str]:
    """Return the names that are tags of versions, the newest first."""
    numbers = [int(found[1]) for name in names if (found := _TAG.fullmatch(name))]
    return [f"v{number}" for number in sorted(numbers, reverse=True)]


def next_tag(tags: Iterable[str]) -> str:
    """Return the tag after the newest one."""
    newest = newest_first(tags)[:1]
    return f"v{int(newest[0][1:]) + 1}" if newest else "v1"


def name_for(repo: StagedRepo, staged: Sequence[StagedRepo], name: str) -> str:
    """Return the name of a repository at a target that names the merged model itself.

    Args:
        repo: the repository.
        staged: all repositories of the run.
        name: the merged model's name at the target; exports have a suffix, e.g. -gguf.
    """
    merged = next(each.folder.name for each in staged if each.kind == "merged")
    return name + repo.folder.name.removeprefix(merged)


def check_versions(
    place: str, *, names: Collection[str], has_ours: bool, last: Mapping[str, Any], kind: str
) -> None:
    """Check that a repository may get a new version.

    Args:
        place: name of the repository, for messages.
        names: what the repository holds: versions and anything else.
        has_ours: whether a version in it is tuneline's.
        last: tuneline.json of its newest version; empty if there is none.
        kind: kind of the new version.

    Raises:
        OutputExistsError: tuneline did not make the repository, or it holds another kind.
    """
    advice = "Choose another name in publish_to, or remove it yourself"
    if names and not has_ours:
        raise OutputExistsError(
            f"{place} exists, but was not made by tuneline: it has {', '.join(sorted(names)[:3])} "
            f"and no version with {MARKER_FILE}. {advice}"
        )
    held = last.get("kind", kind)
    if held != kind:
        raise OutputExistsError(
            f"{place} holds the kind '{held}' of another run, and this run would publish the kind "
            f"'{kind}' there. {advice}"
        )
