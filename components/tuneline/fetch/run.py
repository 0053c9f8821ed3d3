"""Put a base model, checked and with its origin recorded, into a directory."""

import logging
import time
from pathlib import Path
from typing import Literal

from tuneline.artifacts import ModelOrigin, new_directory, sha256_of
from tuneline.errors import ModelError
from tuneline.fetch import builtin, directory, gguf, hub
from tuneline.fetch.config import FetchConfig
from tuneline.hub_id import HUB_ID

logger = logging.getLogger(__name__)

Kind = Literal["builtin", "directory", "gguf", "hub"]


def run(config: FetchConfig, *, source: str, base_model_dir: str) -> ModelOrigin:
    """Fetch the model that `source` names and record where it came from.

    Args:
        config: the recipe's part.
        source: a Hub id, a directory, a .gguf file or builtin:NAME.
        base_model_dir: where the model is put; must not exist or be empty.

    Raises:
        ModelError: the source is not a model that can be tuned.
        HubError: the Hub could not be reached.
        CredentialsError: the Hub asks for a token with access.
    """
    started = time.monotonic()
    kind = kind_of(source)
    trusted = config.trust_remote_code is not None
    if trusted and config.trust_remote_code != source:
        raise ModelError(
            f"trust_remote_code names '{config.trust_remote_code}', and the base model is "
            f"'{source}': trust is given by name, so write the same in both, or leave it out"
        )
    if config.revision and kind != "hub":
        logger.warning("revision '%s' is ignored: %s is not on the Hub", config.revision, source)
    if trusted and kind in ("builtin", "gguf"):
        logger.warning("trust_remote_code is ignored: %s brings no code", source)

    with new_directory(base_model_dir) as target:
        revision = licence = None
        if kind == "hub":
            snapshot = hub.download(source, revision=config.revision, with_code=trusted)
            revision, licence = snapshot.commit, snapshot.licence
            directory.take(snapshot.path, target, source=source, trusted=trusted)
        elif kind == "directory":
            path = Path(source).expanduser()
            directory.take(path, target, source=source, trusted=trusted)
            licence = directory.licence_of(path)
        elif kind == "gguf":
            licence = gguf.convert(Path(source).expanduser(), target)
        else:
            licence = builtin.unpack(source.removeprefix("builtin:"), target)
        facts = directory.check(target, source=source, trusted=trusted)
        for path in facts.weights:
            if not path.stat().st_mode & 0o044:
                path.chmod(0o644)  # safetensors writes 0600, which another pod could not read
        origin = ModelOrigin(
            source=source,
            revision=revision,
            licence=licence,
            architecture=facts.architecture,
            num_parameters=facts.num_parameters,
            num_bytes=sum(path.stat().st_size for path in facts.weights),
            sha256=sha256_of(facts.weights),
            runs_own_code=facts.runs_own_code,
            seconds=round(time.monotonic() - started, 3),
        )
        origin.write(target, config)
    logger.info(
        "fetched %s: %s, %.1f M parameters, licence %s, %.1f s",
        source,
        origin.architecture,
        origin.num_parameters / 1e6,
        licence or "unknown",
        origin.seconds,
    )
    return origin


def kind_of(source: str) -> Kind:
    """Say what kind of source a recipe's `base_model` is. What exists on disk comes first.

    Raises:
        ModelError: it is none of the kinds.
    """
    if source.startswith("builtin:"):
        return "builtin"
    path = Path(source).expanduser()
    if path.is_dir():
        return "directory"
    if path.is_file():
        if path.suffix == ".gguf":
            return "gguf"
        raise ModelError(
            f"{source} is a file of another kind: a base model is a directory with safetensors, "
            "a .gguf file, a Hub id or builtin:smollm2-135m"
        )
    looks_like_a_path = source.startswith(("/", ".", "~")) or source.endswith(".gguf")
    if looks_like_a_path or not HUB_ID.fullmatch(source):
        raise ModelError(
            f"there is no directory or file '{source}', and it is not a Hub id like "
            "'HuggingFaceTB/SmolLM2-135M-Instruct' either"
        )
    return "hub"
