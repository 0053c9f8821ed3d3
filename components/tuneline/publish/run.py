"""Stage the repositories, then put them on the Hub or into a directory.

One staged tree feeds both targets, so that `dir:PATH` shows exactly what a push would send.
"""

import logging
import os
import re
import tempfile
import time
from pathlib import Path

from tuneline.artifacts import Decision, Published, PublishedRepo, new_directory
from tuneline.errors import CredentialsError, StorageError, UserError
from tuneline.publish.config import PublishConfig
from tuneline.publish.target import DIRECTORY_PREFIX, check_target

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
    gguf_dirs: list[str],
    gptq_dirs: list[str],
    decision_dir: str | Path,
    published_dir: str | Path,
) -> Published:
    """Publish a promoted model.

    Args:
        config: the recipe's part.
        target: `namespace/name` on the Hub, or `dir:PATH`. The repositories are named after it:
            NAME (merged), NAME-lora, NAME-gguf, NAME-gptq-4bit.
        recipe: the whole recipe as JSON, for the model card.
        base_model_dir: what fetch made.
        dataset_dir: what prepare made.
        adapter_dir: what train made.
        merged_dir: what merge made.
        gguf_dirs: the GGUF exports; they share one repository.
        gptq_dirs: the GPTQ exports; a repository each.
        decision_dir: what the gate decided.
        published_dir: new; gets published.json.

    Raises:
        UserError: the gate said hold, or a repository of that name was not made by tuneline.
        RecipeError: the target is neither a Hub name nor `dir:PATH`.
        CredentialsError: the token is missing or refused; nothing was touched.
        HubError: the Hub did not take it after all tries.
        StorageError: the target directory or its parent cannot be written.
        ProofError: a file is not the one that its step proved, or was made from another artifact.
    """
    # A recipe is made of the steps' configs, this one's included, so it is imported late.
    from tuneline.publish.staging import Sources, stage
    from tuneline.recipe import Recipe

    started = time.monotonic()
    decision = Decision.read(decision_dir)
    if decision.verdict != "promote":
        raise UserError(
            f"the gate said {decision.verdict} ({decision.reason}), and only a promoted model is "
            "published; mend the cause and run again"
        )
    local = target.startswith(DIRECTORY_PREFIX)
    check_target(target)
    # Checked before hours of files are read: a push that cannot start should say so at once.
    token = None if local else _read_token(target)
    sources = Sources.read(
        Recipe.parse(recipe),
        base_model_dir=Path(base_model_dir),
        dataset_dir=Path(dataset_dir),
        adapter_dir=Path(adapter_dir),
        merged_dir=Path(merged_dir),
        gguf_dirs=[Path(path) for path in gguf_dirs],
        gptq_dirs=[Path(path) for path in gptq_dirs],
        decision=decision,
    )
    name = sources.recipe.name if local else target
    with new_directory(published_dir) as record_dir:
        parent = Path(target.removeprefix(DIRECTORY_PREFIX)).resolve() if local else record_dir
        # Beside the directory target, so that files can be hard links and one rename ends it.
        with _scratch_in(parent.parent) as scratch:
            staged = stage(sources, name=name, config=config, directory=Path(scratch, "staged"))
            repos: list[PublishedRepo]
            if local:
                from tuneline.publish.directory import write_tree

                repos = write_tree(Path(scratch, "staged"), staged, parent)
            else:
                from tuneline.publish.hub import push

                assert token is not None
                repos = push(staged, token=token, config=config)
        record = Published(
            target=target,
            private=config.private,
            repos=repos,
            seconds=round(time.monotonic() - started, 3),
        )
        record.write(record_dir, config, parents=(sources.merge, decision))
    for repo in record.repos:
        logger.info("published %s: %d files, %d bytes", repo.url, repo.num_files, repo.num_bytes)
    return record


def _scratch_in(directory: Path) -> tempfile.TemporaryDirectory[str]:
    """Make a directory that is gone in the end.

    Raises:
        StorageError: there is no place for it.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=directory, prefix=".publish.")
    except OSError as error:
        raise StorageError(
            f"{directory}, where the repositories are laid out first, cannot be written "
            f"({error.strerror}): name another directory in publish_to, whose parent can"
        ) from error


def _read_token(target: str) -> str:
    """Read the Hub's token, which no message may hold.

    Raises:
        CredentialsError: there is none, or it is not one.
    """
    # A secret made from a file ends in a line break, and HTTP refuses that, quoting the header.
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if not token:
        raise CredentialsError(
            f"publishing to {target} needs a token with write access in the environment variable "
            f"{TOKEN_VARIABLE} (on a cluster: the secret placement.hub_token_secret), "
            "or use dir:PATH"
        )
    if not re.fullmatch(r"[!-~]+", token):
        raise CredentialsError(
            f"{TOKEN_VARIABLE} holds more than a token: white space or characters that are not "
            "ASCII; set it to the token alone, as huggingface.co/settings/tokens shows it"
        )
    return token
