"""The recipe's part for publishing."""

from pydantic import Field

from tuneline.strict_model import StrictModel


class PublishConfig(StrictModel):
    """What is pushed where; the target is the recipe's `publish_to`."""

    private: bool = True
    licence: str | None = None
    """Licence of the published weights; default: the base model's."""
    tags: tuple[str, ...] = ()
    """Further tags in the model card."""
    max_attempts: int = Field(5, ge=1)
    """Tries of a request that the Hub answers with 429 or 5xx."""
