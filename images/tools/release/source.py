"""What is released: a commit whose checkout is clean, and a version that CHANGELOG.md describes."""

import re
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

from release.commands import output_of
from tuneline.errors import ToolError, UserError

MAX_SHOWN_FILES = 5


@dataclass(frozen=True)
class Source:
    """A version at a commit."""

    root: Path
    """Top directory of the checkout."""
    version: str
    commit: str
    """SHA-1 of the commit."""
    epoch: int
    """Time of the commit in seconds since 1970, which becomes the time of every file."""
    uri: str | None
    """Address of the repository without credentials; None if the clone has no address in a
    network."""
    notes: tuple[str, ...] = ()
    """Sentences about what the release may lack."""


def read_source(root: Path, version: str) -> Source:
    """Return what a checkout releases.

    Raises:
        UserError: the checkout is not clean, CHANGELOG.md has no entry for the version, or another
            commit has the version's tag.
        ToolError: the directory is not a checkout of git.
    """
    try:
        changed = output_of(["git", "status", "--porcelain"], where=root).splitlines()
    except ToolError as error:
        raise ToolError(f"{root} is not a checkout of git: release from a clone; {error}") from None
    if changed:
        names = ", ".join(line[3:] for line in changed[:MAX_SHOWN_FILES])
        more = f" and {len(changed) - MAX_SHOWN_FILES} more" * (len(changed) > MAX_SHOWN_FILES)
        raise UserError(
            f"{names}{more}: not committed, so no commit would describe the release. Commit or "
            "remove these files, or release from a clean clone"
        )
    notes = _check_changelog(root / "CHANGELOG.md", version)
    commit = output_of(["git", "rev-parse", "HEAD"], where=root).strip()
    _check_tag(root, f"v{version}", commit)
    epoch = int(output_of(["git", "log", "-1", "--format=%ct"], where=root))
    return Source(root, version, commit, epoch, _uri(root), notes)


def _check_changelog(path: Path, version: str) -> tuple[str, ...]:
    """Check that the changelog has an entry for a version; return what to say about it."""
    titles = re.findall(r"^## \[?([^\s\]]+)", path.read_text(encoding="utf-8"), re.M)
    if version not in titles:
        has = ", ".join(titles) or "no entry"
        raise UserError(
            f"CHANGELOG.md has no entry for {version}, the version in "
            f"components/tuneline/version.py (it has {has}): write '## {version}' above its "
            "changes"
        )
    newer = titles[: titles.index(version)]
    if newer:
        return (
            f"CHANGELOG.md has {', '.join(newer)} above {version}: those changes are in this "
            f"release too. Raise the version in components/tuneline/version.py if {version} was "
            "released before",
        )
    return ()


def _check_tag(root: Path, tag: str, commit: str) -> None:
    """Refuse a version that was released from another commit."""
    if not output_of(["git", "tag", "--list", tag], where=root).strip():
        return
    tagged = output_of(["git", "rev-parse", f"{tag}^{{commit}}"], where=root).strip()
    if tagged != commit:
        raise UserError(
            f"the tag {tag} is at {tagged[:12]} and not at {commit[:12]}, which is checked out: "
            "check out the tag, or raise the version in components/tuneline/version.py"
        )


def _uri(root: Path) -> str | None:
    """Return the address of `origin` without user and password, if it is one in a network."""
    remotes = output_of(["git", "remote"], where=root).split()
    if "origin" not in remotes:
        return None
    address = output_of(["git", "remote", "get-url", "origin"], where=root).strip()
    parts = urllib.parse.urlsplit(address)
    if parts.scheme not in ("https", "http", "ssh", "git") or not parts.hostname:
        return None
    port = f":{parts.port}" if parts.port else ""
    return f"git+{parts.scheme}://{parts.hostname}{port}{parts.path}"
