"""Publish one staged tree to every target of a run."""

import logging
from collections.abc import Sequence
from pathlib import Path

from tuneline.artifacts import PublishedRepo
from tuneline.errors import TunelineError
from tuneline.publish.config import PublishConfig
from tuneline.publish.staging import StagedRepo
from tuneline.publish.target import Target
from tuneline.publish.targets.in_registry import InRegistry
from tuneline.publish.targets.in_store import InStore
from tuneline.publish.targets.on_disk import OnDisk, fork
from tuneline.publish.targets.on_hub import OnHub
from tuneline.publish.targets.on_mlflow import OnMlflow
from tuneline.publish.targets.on_model_registry import OnModelRegistry
from tuneline.publish.targets.place import Place

logger = logging.getLogger(__name__)


def open_place(target: Target, config: PublishConfig) -> Place:
    """Return the place of a target; nothing is read or sent yet."""
    match target.kind:
        case "hub":
            return OnHub(target.text, config)
        case "store":
            return InStore(target.text, config)
        case "registry":
            return InRegistry(target.text, config)
        case "mlflow":
            return OnMlflow(target.text, config)
        case "model-registry":
            return OnModelRegistry(target.text, config)
        case "directory" | "claim":
            return OnDisk(target)


def publish_everywhere(
    staged: Sequence[StagedRepo],
    targets: Sequence[Target],
    *,
    config: PublishConfig,
    scratch: Path,
) -> list[PublishedRepo]:
    """Push the staged repositories to every target, after all targets were checked.

    A target that fails does not keep the others from getting the model.

    Args:
        staged: the repositories.
        targets: the targets, as `parse_targets` orders them.
        config: the `publish` section of the recipe.
        scratch: an empty directory on the file system of the staged repositories.

    Raises:
        TunelineError: a check failed, and nothing was sent; or a push failed, and the message names
            the targets that have the model and those that do not. The class is that of the first
            error.
    """
    places = {target: open_place(target, config) for target in targets}
    for place in places.values():
        place.check(staged)
    published: list[PublishedRepo] = []
    errors: dict[Target, TunelineError] = {}
    for number, (target, place) in enumerate(places.items()):
        # Each target gets a copy, because a repository keeps what people wrote into its card.
        copies = [fork(repo, scratch / str(number)) for repo in staged]
        try:
            repos = place.push(copies, published)
        except TunelineError as error:
            errors[target] = error
            logger.error("%s was not published: %s", target.text, error)
            continue
        published += [repo.model_copy(update={"target": target.text}) for repo in repos]
    if errors:
        raise _summary(targets, errors)
    return published


def _summary(targets: Sequence[Target], errors: dict[Target, TunelineError]) -> TunelineError:
    """Return the error of a push that failed at some targets."""
    first = next(iter(errors.values()))
    if len(targets) == 1:
        return first
    have = [target.text for target in targets if target not in errors]
    done = f"{', '.join(have)} {'has' if len(have) == 1 else 'have'} the model" if have else ""
    failed = "; ".join(f"{target.text} failed: {error}" for target, error in errors.items())
    again = "Run this step again: targets that have the model stay as they are" if have else ""
    return type(first)(". ".join(part for part in (done, failed, again) if part))
