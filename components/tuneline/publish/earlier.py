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
from tuneline.publish.hub import MAX_READ_BYTES, look_up_files, new_api
from tuneline.publish.previous import MARKER_FILE, read_bundle
from tuneline.publish.run import TOKEN_VARIABLE
from tuneline.publish.target import DIRECTORY_PREFIX, check_target
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
        target: `namespace/name` on the Hub, or `dir:PATH`.
        name: name of the recipe, which is the name of the merged model's folder in a directory.
        earlier_path: the JSON file to write.

    Raises:
        RecipeError: the target is neither a Hub name nor `dir:PATH`.
    """
    target = check_target(target)
    published, remark = None, ""
    try:
        published = _published(target, name, config)
    except (TunelineError, OSError) as error:
        remark = (
            f"The model published last to {target.rsplit('/', 1)[-1]} could not be read, so it was "
            f"not compared with this one: {' '.join(str(error).split())[:300]}"
        )
        logger.warning("%s", remark)
    earlier = EarlierRuns(published=published, attempts=list(_attempts_here()), remark=remark)
    path = Path(earlier_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(earlier.sealed(), encoding="utf-8")
    return earlier


def _published(target: str, name: str, config: PublishConfig) -> Evaluated | None:
    """Return what the model published last measured; None if there is none, or it does not say.

    Raises:
        TunelineError: the target cannot be read, or its tuneline.json was changed.
    """
    if target.startswith(DIRECTORY_PREFIX):
        path = Path(target.removeprefix(DIRECTORY_PREFIX), name, MARKER_FILE)
        is_small = path.is_file() and path.stat().st_size <= MAX_READ_BYTES
        text = path.read_text(encoding="utf-8", errors="replace") if is_small else None
    else:
        text = _read_from_hub(target, config)
    found = read_bundle(text).get(EVALUATED_KEY)
    if text is None or found is None:
        return None
    if difference := broken_seal(text):
        raise ProofError(f"{MARKER_FILE} {difference}")
    return Evaluated.parse(json.dumps(found), where=MARKER_FILE)


def _read_from_hub(target: str, config: PublishConfig) -> str | None:
    api = new_api(os.environ.get(TOKEN_VARIABLE, "").strip())
    files = look_up_files(api, target, config.max_attempts)
    return None if files is None else files.read(MARKER_FILE)


def _attempts_here() -> Iterator[Attempt]:
    """Yield the models that the runs beside this one measured."""
    runs = os.environ.get(RUNS_VARIABLE)
    for path in sorted(Path(runs).glob(f"*/artifacts/**/{EVALUATED_FILE}")) if runs else ():
        try:
            text = path.read_text(encoding="utf-8")
            yield from Evaluated.parse(text, where=str(path)).attempts[-1:]
        except (TunelineError, OSError, UnicodeDecodeError) as error:
            logger.warning("%s is not counted among earlier runs: %s", path, error)
