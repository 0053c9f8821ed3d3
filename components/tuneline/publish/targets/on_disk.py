"""A directory or a claim as a place: it holds the newest version, which replaces the one before."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tuneline.artifacts import PublishedRepo
from tuneline.errors import ProofError, RecipeError, StorageError
from tuneline.publish.card_parts import CARD_FILE
from tuneline.publish.directory import check_tree, put_back, write_tree
from tuneline.publish.previous import MARKER_FILE, MAX_READ_BYTES, read_bundle
from tuneline.publish.staging import StagedRepo
from tuneline.publish.target import Target
from tuneline.record import sha256_of_file
from tuneline.runtime.scratch import scratch_directory
from tuneline.runtime.source_names import claim_problem, path_on_claim


class OnDisk:
    """A directory or a claim as a place."""

    def __init__(self, target: Target) -> None:
        self._target = target

    @property
    def directory(self) -> Path:
        """Return the directory in this process.

        Raises:
            RecipeError: the claim is not mounted here.
        """
        if self._target.kind == "directory":
            return Path(self._target.path).resolve()
        if problem := claim_problem(self._target.text):
            raise RecipeError(f"publish_to: {problem}")
        return Path(path_on_claim(self._target.text))

    def check(self, staged: Sequence[StagedRepo]) -> None:
        """Check that the directory can be written and has nothing of others; see `Place`."""
        with scratch_in(self.directory):
            check_tree(staged, self.directory)

    def push(
        self, staged: Sequence[StagedRepo], elsewhere: Sequence[PublishedRepo] = ()
    ) -> list[PublishedRepo]:
        """Put all repositories in their places, or none; see `Place`."""
        # The files have to be on the file system of the directory, so that one rename puts each
        # repository in its place.
        with scratch_in(self.directory) as beside:
            root = beside / "staged"
            forked = [fork(repo, root) for repo in staged]
            repos = write_tree(root, forked, self.directory)
        if self._target.kind == "directory":
            return repos
        # The form in which KServe reads a model from a claim.
        address = f"pvc://{self._target.text.partition(':')[2]}"
        return [
            repo.model_copy(
                update={
                    "repo": f"{self._target.text}/{Path(repo.repo).name}",
                    "url": f"{address}/{Path(repo.repo).name}",
                }
            )
            for repo in repos
        ]

    def read_last(self, name: str) -> str | None:
        """Return tuneline.json of the merged model's directory; see `Place`."""
        path = self.directory / name / MARKER_FILE
        is_small = path.is_file() and path.stat().st_size <= MAX_READ_BYTES
        return path.read_text(encoding="utf-8", errors="replace") if is_small else None


@contextlib.contextmanager
def scratch_in(directory: Path) -> Iterator[Path]:
    """Create a temporary directory for the body; a directory made for it is removed if left empty.

    What a step that was killed left there is removed, and a repository that it had set aside, but
    not replaced yet, is put back.

    Raises:
        StorageError: `directory` is not writable.
    """
    is_new = not directory.exists()
    with contextlib.ExitStack() as stack:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if is_new:
                stack.callback(_remove_if_empty, directory)
            made = scratch_directory(directory, prefix=".publish.", rescue=put_back)
            scratch = stack.enter_context(made)
        except OSError as error:
            raise StorageError(
                f"{directory}, where the repositories are staged, is not writable "
                f"({error.strerror}). Name another directory in publish_to, with a writable parent"
            ) from error
        yield scratch


def _remove_if_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):
        directory.rmdir()


def fork(repo: StagedRepo, root: Path) -> StagedRepo:
    """Return a copy of a staged repository below `root`, whose card and tuneline.json may change.

    The other files are hard links where possible. A copy is compared with the proven hash.

    Raises:
        ProofError: a copied file has other bytes.
    """
    folder = root / repo.folder.name
    hashes = read_bundle((repo.folder / MARKER_FILE).read_text(encoding="utf-8"))["files"]
    for name, source in repo.files().items():
        destination = folder / name
        destination.parent.mkdir(parents=True, exist_ok=True)
        if name not in (MARKER_FILE, CARD_FILE) and _link(source, destination):
            continue
        shutil.copyfile(source, destination)
        if name in hashes and sha256_of_file(destination) != hashes[name]:
            raise ProofError(
                f"{destination} is not what was proven: copying it changed its bytes. Check the "
                "disk, and run this step again"
            )
    return replace(repo, folder=folder)


def _link(source: Path, destination: Path) -> bool:
    """Make a hard link; return whether it could be made."""
    try:
        os.link(source, destination)
    except OSError:
        # Another file system, or one without hard links.
        return False
    return True
