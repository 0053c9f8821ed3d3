"""Fetch a base model into a directory, check the model and record its origin."""

import logging
import time

from tuneline.artifacts import ModelOrigin, new_directory, sha256_of
from tuneline.errors import ModelError
from tuneline.fetch import directory
from tuneline.fetch.config import FetchConfig
from tuneline.fetch.kinds import KINDS, kind_of
from tuneline.fetch.trial import try_tokenizer
from tuneline.models.linear_layers import check_layers
from tuneline.models.tokenizer.files import append_no_token
from tuneline.models.whole import check_names

logger = logging.getLogger(__name__)


def run(
    config: FetchConfig, *, source: str, base_model_dir: str, version: str | None = None
) -> ModelOrigin:
    """Fetch the model `source` and record where it came from.

    Args:
        config: the `fetch` section of the recipe.
        source: a Hub ID, a directory, a .gguf file or builtin:NAME.
        base_model_dir: directory to write the model to; must be empty or not exist.
        version: what `fingerprint` returned; of a model on the Hub, this commit is fetched. None:
            the commit that the revision names now.

    Raises:
        ModelError: the source is not a model that can be tuned.
        HubError: the Hub could not be reached.
        CredentialsError: the Hub requires a token with access.
    """
    started = time.monotonic()
    kind = KINDS[kind_of(source)]
    trusted = config.trust_remote_code is not None
    if trusted and config.trust_remote_code != source:
        raise ModelError(
            f"trust_remote_code names '{config.trust_remote_code}', but the base model is "
            f"'{source}': write the same name in both, or remove trust_remote_code"
        )
    if config.revision and not kind.has_revisions:
        logger.warning("revision '%s' is ignored: %s is not on the Hub", config.revision, source)
    if trusted and not kind.may_bring_code:
        logger.warning("trust_remote_code is ignored: %s has no code of its own", source)

    with new_directory(base_model_dir) as target:
        provenance = kind.take(source, target, config, version)
        facts = directory.check(target, source=source, trusted=trusted)
        try_tokenizer(target, called=source)
        if append_no_token(target):
            logger.warning(
                "the tokenizer of %s appends an end-of-text token to each text, prompts included; "
                "this is switched off, because a model would answer after the end of its prompt",
                source,
            )
        if not facts.runs_own_code:
            check_names(target, called=source)
            check_layers(target, called=source)
        quantisation = provenance.quantisation
        origin = ModelOrigin(
            source=source,
            revision=provenance.revision,
            licence=provenance.licence,
            architecture=facts.architecture,
            num_parameters=facts.num_parameters,
            num_bytes=sum(path.stat().st_size for path in facts.weights),
            sha256=sha256_of(facts.weights),
            runs_own_code=facts.runs_own_code,
            quantization=quantisation.name if quantisation else None,
            dequantized=quantisation is not None and not quantisation.is_kept,
            seconds=round(time.monotonic() - started, 3),
        )
        origin.write(target, config)
    logger.info(
        "fetched %s: %s, %.1f M parameters%s, licence %s, %.1f s",
        source,
        origin.architecture,
        origin.num_parameters / 1e6,
        f", {origin.stored_as}" if origin.stored_as else "",
        provenance.licence or "unknown",
        origin.seconds,
    )
    return origin
