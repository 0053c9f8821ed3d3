"""Stage the repositories, then push them to the Hub or write them into a directory.

Both kinds of target get the same staged tree, so `dir:PATH` shows what a push would send. Only the
names of the repositories differ, and the exports in a directory have no `base_model`.
"""

import contextlib
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tuneline.artifacts import Decision, Published, RunHeader, new_directory
from tuneline.errors import CredentialsError, StorageError, UserError
from tuneline.publish.config import PublishConfig
from tuneline.publish.directory import write_tree
from tuneline.publish.hub import push
from tuneline.publish.proven import check_verdict
from tuneline.publish.sources import Sources
from tuneline.publish.staging import stage, write_serving
from tuneline.publish.target import DIRECTORY_PREFIX, check_target
from tuneline.recorded_recipe import recorded_recipe
from tuneline.runtime.termination import Ending, leave

logger = logging.getLogger(__name__)

TOKEN_VARIABLE = "HF_TOKEN"


def run(
    config: PublishConfig,
    *,
    target: str,
    recipe: str,
    base_model_dir: str | Path,
    dataset_dir: str | Path,
    adapter_dir: str | Path,
    merged_dir: str | Path,
    exports_dirs: list[str],
    decision_dir: str | Path,
    published_dir: str | Path,
) -> Published:
    """Publish a model that the gate promoted, without the exports that the gate holds.

    Args:
        config: the `publish` section of the recipe.
        target: `namespace/name` on the Hub, or `dir:PATH`. The repositories are named after it:
            NAME (merged model), NAME-lora, NAME-gguf, NAME-gptq-4bit.
        recipe: the whole recipe as JSON, for the model cards.
        base_model_dir: directory of the `base_model` artifact, or a copy of its record.
        dataset_dir: directory of the `dataset` artifact, or a copy of its record.
        adapter_dir: directory of the `adapter` artifact.
        merged_dir: directory of the `merged` artifact.
        exports_dirs: directories of the `quantized` artifacts, one per format; may be empty.
        decision_dir: directory of the `decision` artifact.
        published_dir: new directory for published.json.

    Raises:
        UserError: the verdict is hold, or tuneline did not make the repository of that name.
        RecipeError: the target is neither a Hub name nor `dir:PATH`.
        CredentialsError: the token is missing or refused; nothing was changed.
        HubError: the Hub failed after all attempts.
        StorageError: the target directory or its parent is not writable.
        ProofError: a file differs from its record, or was made from other inputs, or the verdict
            does not follow from the comparisons.
        WorldError: an artifact has no record, or an export that the recipe asks for is missing.
    """
    started = time.monotonic()
    decision = Decision.read(decision_dir)
    check_verdict(decision)
    if decision.verdict != "promote":
        raise UserError(
            f"the verdict is {decision.verdict} ({decision.reason}), but only a promoted model is "
            "published. Improve the model or change the recipe's gate, then run again"
        )
    target = check_target(target)
    local = target.startswith(DIRECTORY_PREFIX)
    # Read before large files are hashed, which can take an hour, so that a missing token is found
    # early.
    token = "" if local else read_token(target)
    sources = Sources.read(
        RunHeader.parse(recipe, where="recipe"),
        base_model_dir=Path(base_model_dir),
        dataset_dir=Path(dataset_dir),
        adapter_dir=Path(adapter_dir),
        merged_dir=Path(merged_dir),
        exports_dirs=[Path(path) for path in exports_dirs],
        decision_dir=Path(decision_dir),
    )
    name = sources.header.name if local else target
    used = recorded_recipe(
        sources.header,
        origin=sources.origin,
        dataset=sources.dataset,
        training=sources.training,
        merge=sources.merge,
        exports=list(sources.exports.values()),
        decision=decision,
        target=target,
        publish=config.model_dump(mode="json"),
    )
    if used.differences:
        logger.warning("%s", used.remark)
    held = decision.held_exports()
    for format, why in held.items():
        logger.warning("the export %s is held and is not published: %s", format, why)
    with new_directory(published_dir) as record_dir:
        output = Path(target.removeprefix(DIRECTORY_PREFIX)).resolve() if local else record_dir
        # The scratch directory is in a directory target, so that the staged files can be hard links
        # and one rename puts each repository in its place.
        with _scratch_in(output) as scratch:
            staged_root = Path(scratch, "staged")
            staged = stage(
                sources, name=name, config=config, recipe=used.public(), directory=staged_root
            )
            if local:
                repos = write_tree(staged_root, staged, output)
            else:
                repos = push(staged, token=token, config=config)
        record = Published(
            target=target,
            private=all(repo.private is not False for repo in repos),
            repos=repos,
            left_out=[f"{repo.repo}: {name}" for repo in staged for name in repo.left_out],
            held_exports=held,
            seconds=round(time.monotonic() - started, 3),
        )
        write_serving(sources, name, record.repos, record_dir)
        record.write(record_dir, config, parents=(sources.merge, decision))
    for repo in record.repos:
        logger.info("published %s: %d files, %d bytes", repo.url, repo.num_files, repo.num_bytes)
    urls = ", ".join(" ".join(filter(None, (repo.url, repo.tag))) for repo in record.repos)
    without = f"; held exports: {', '.join(held)}" if held else ""
    leave(Ending(step="publish", result="published", text=f"{urls}{without}"))
    return record


@contextlib.contextmanager
def _scratch_in(directory: Path) -> Iterator[str]:
    """Create a temporary directory for the body; a directory made for it is removed if left empty.

    Raises:
        StorageError: `directory` is not writable.
    """
    is_new = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=directory, prefix=".publish.")
    except OSError as error:
        raise StorageError(
            f"{directory}, where the repositories are staged, is not writable "
            f"({error.strerror}). Name another directory in publish_to, with a writable parent"
        ) from error
    try:
        with scratch as path:
            yield path
    finally:
        if is_new:
            with contextlib.suppress(OSError):
                directory.rmdir()


def read_token(target: str) -> str:
    """Return the Hub token. No message may contain it.

    Raises:
        CredentialsError: the variable is empty, or holds something else than a token.
    """
    # A secret made from a file ends in a line break. HTTP clients refuse a header with a line break
    # in a message that quotes it.
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if not token:
        raise CredentialsError(
            f"publishing to {target} needs a token with write access in the environment variable "
            f"{TOKEN_VARIABLE}. Set it (on a cluster: the secret placement.hub_token_secret), or "
            "publish to dir:PATH"
        )
    if not re.fullmatch(r"[!-~]+", token):
        raise CredentialsError(
            f"{TOKEN_VARIABLE} is not a valid token: it contains white space or characters that "
            "are not ASCII. Set it to the token alone, as huggingface.co/settings/tokens shows it"
        )
    return token
