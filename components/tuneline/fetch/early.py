"""What is known of a base model without its weights: whether it can be fetched; its tokenizer."""

from pathlib import Path

from tuneline.fetch import builtin, directory, hub
from tuneline.fetch.config import FetchConfig
from tuneline.fetch.gguf.header import check_header
from tuneline.fetch.kinds import kind_of, path_of
from tuneline.runtime.source_names import builtin_name


def check(config: FetchConfig, *, source: str) -> str:
    """Return what is known about a recipe's base model, in a few words.

    Args:
        config: the `fetch` section of the recipe.
        source: a Hub ID, a directory, a .gguf file or builtin:NAME.

    Raises:
        ModelError: there is no such model or revision, or it cannot be tuned.
        HubError: the Hub could not be reached.
        CredentialsError: the Hub requires a token with access.
    """
    match kind_of(source):
        case "builtin":
            path: Path = builtin.locate(builtin_name(source) or "")
            return f"{source}, in {path.name}"
        case "directory":
            trusted = config.trust_remote_code is not None
            facts = directory.check(path_of(source), source=source, trusted=trusted)
            return f"{source}: {facts.architecture}, {facts.num_parameters / 1e6:,.0f} M parameters"
        case "gguf":
            check_header(path_of(source))
            return f"{source} is a whole GGUF file"
        case "hub":
            commit = hub.commit_of(source, revision=config.revision)
            return f"{source} at {config.revision or 'main'} is commit {commit[:12]}"


def gguf_of(source: str) -> Path | None:
    """Return the GGUF file that a source names; None if it names none.

    Raises:
        ModelError: there is no such model, or its package is not installed.
    """
    match kind_of(source):
        case "builtin":
            return builtin.locate(builtin_name(source) or "")
        case "gguf":
            return path_of(source)
        case _:
            return None


def tokenizer_of(config: FetchConfig, *, source: str) -> Path:
    """Return a directory with the tokenizer and the config of a model that is no GGUF file.

    Args:
        config: the `fetch` section of the recipe.
        source: a Hub ID or a directory.

    Raises:
        ModelError: there is no such model or revision.
        HubError: the Hub could not be reached.
        CredentialsError: the Hub requires a token with access.
    """
    if kind_of(source) == "directory":
        return path_of(source)
    return hub.download_tokenizer(source, revision=config.revision)
