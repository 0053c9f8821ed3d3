"""Download a published repository from the Hub."""

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from tuneline.errors import UserError
from tuneline.fetch import hub


def download(repo: str, is_wanted: Callable[[str], bool]) -> Path:
    """Download a checkpoint, or one GGUF file of a repository; return its directory in the cache.

    Args:
        repo: Hub ID of the repository.
        is_wanted: whether a GGUF file of this name is of the format that the user chose.

    Raises:
        ModelError: there is no such repository, or it has no model.
        CredentialsError: the repository is gated or private.
        HubError: the Hub could not be reached, or answered with an error.
        UserError: the repository has several GGUF files, and none of them was chosen.
    """
    with hub.translated_errors(repo, None):
        names = [each.rfilename for each in HfApi().model_info(repo).siblings or []]
    files = [name for name in names if name.endswith(".gguf")]
    if not files or any(name.endswith(".safetensors") for name in names):
        return hub.download(repo, revision=None, with_code=False).path
    chosen = [name for name in files if is_wanted(name)]
    if len(chosen) != 1:
        raise UserError(
            f"{repo} has {', '.join(files)}: name the end of one file's name with --format, e.g. "
            "--format q4_k_m"
        )
    with hub.translated_errors(repo, None):
        return Path(snapshot_download(repo, allow_patterns=chosen))
