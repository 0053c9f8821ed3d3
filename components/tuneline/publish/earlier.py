"""Look up what earlier runs measured, so that the gate can compare with it.

The model published last is known from tuneline.json at the target. Of runs on this machine, the
decisions are read too: a model that was held back was measured on the same questions as well.

Nothing here stops a run: what cannot be read is said in the decision.
"""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from tuneline.errors import ProofError, TunelineError
from tuneline.publish.config import PublishConfig
from tuneline.publish.previous import MARKER_FILE, read_bundle
from tuneline.publish.target import Target, parse_targets, short_name
from tuneline.publish.targets.every import open_place
from tuneline.records.earlier import (
    EVALUATED_FILE,
    EVALUATED_KEY,
    RUNS_VARIABLE,
    Attempt,
    EarlierRuns,
    Evaluated,
)
from tuneline.seals import broken_seal

logger = logging.getLogger(__name__)


def look_up(config: PublishConfig, *, target: str, name: str, earlier_path: str) -> EarlierRuns:
    """Write what earlier runs measured.

    Args:
        config: the `publish` section of the recipe.
        target: one target, or a JSON list of them.
        name: name of the recipe, which names the merged model if no target is on the Hub.
        earlier_path: the JSON file to write.

    Raises:
        RecipeError: a target has no known form.
    """
    targets = parse_targets(target)
    name = short_name(targets, name)
    published, remark = None, ""
    try:
        published = _published(targets, name, config)
    except (TunelineError, OSError) as error:
        remark = (
            f"The model published last to {targets[0].text.rsplit('/', 1)[-1]} could not be "
            f"read, so it was not compared with this one: {' '.join(str(error).split())[:300]}"
        )
        logger.warning("%s", remark)
    earlier = EarlierRuns(published=published, attempts=list(_attempts_here()), remark=remark)
    path = Path(earlier_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(earlier.sealed(), encoding="utf-8")
    return earlier


def _published(targets: list[Target], name: str, config: PublishConfig) -> Evaluated | None:
    """Return what the model published last measured; None if there is none, or it does not say.

    The first target that has a model is read.

    Raises:
        TunelineError: the target cannot be read, or its tuneline.json was changed.
    """
    text = None
    for place in (open_place(each, config) for each in targets):
        if (text := place.read_last(name)) is not None:
            break
    found = read_bundle(text).get(EVALUATED_KEY)
    if text is None or found is None:
        return None
    if difference := broken_seal(text):
        raise ProofError(f"{MARKER_FILE} {difference}")
    return Evaluated.parse(json.dumps(found), where=MARKER_FILE)


def _attempts_here() -> Iterator[Attempt]:
    """Yield the models that the runs beside this one measured."""
    runs = os.environ.get(RUNS_VARIABLE)
    for path in sorted(Path(runs).glob(f"*/artifacts/**/{EVALUATED_FILE}")) if runs else ():
        try:
            text = path.read_text(encoding="utf-8")
            yield from Evaluated.parse(text, where=str(path)).attempts[-1:]
        except (TunelineError, OSError, UnicodeDecodeError) as error:
            logger.warning("%s is not counted among earlier runs: %s", path, error)
