"""The recipe's part for fetching a base model."""

from tuneline.strict_model import StrictModel


class FetchConfig(StrictModel):
    """How the base model is fetched; the model itself is the recipe's `base_model`."""

    revision: str | None = None
    """Hub only: branch, tag or commit; resolved to a commit and recorded. Default: main."""
    trust_remote_code: str | None = None
    """Hub id or directory whose own Python code may be run; must equal `base_model`.

    Off by default, and by name, so that changing the model does not carry the trust along."""
