"""What is known of a base model without its weights: whether it can be fetched; its tokenizer."""

from pathlib import Path

from tuneline.fetch import builtin, directory, gguf, hub
from tuneline.fetch.config import FetchConfig
from tuneline.fetch.gguf_header import check_header
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


def tokenizer_of(config: FetchConfig, *, source: str, target: Path) -> Path:
    """Return a directory with a model's tokenizer and config.

    Args:
        config: the `fetch` section of the recipe.
        source: a Hub ID, a directory, a .gguf file or builtin:NAME.
        target: an empty directory, which is used if the source is a GGUF file.

    Raises:
        ModelError: there is no such model or revision, or its tokenizer cannot be read.
        HubError: the Hub could not be reached.
        CredentialsError: the Hub requires a token with access.
    """
    match kind_of(source):
        case "builtin":
            gguf.write_tokenizer(builtin.locate(builtin_name(source) or ""), target)
        case "gguf":
            gguf.write_tokenizer(path_of(source), target)
        case "directory":
            return path_of(source)
        case "hub":
            return hub.download_tokenizer(source, revision=config.revision)
    return target
