"""Config of the publish step."""

from pydantic import Field

from tuneline.strict_model import StrictModel


class PublishConfig(StrictModel):
    """How the repositories are published. `publish_to` of the recipe names the target."""

    private: bool | None = None
    """Whether Hub repositories are private. true: new ones are private, and the step refuses to
    push to one that is public. false: new ones are public. null: new ones are private, and existing
    ones keep their visibility."""
    licence: str | None = None
    """Licence of the published weights. Default: the licence of the base model."""
    tags: tuple[str, ...] = ()
    """Tags that the model cards have besides tuneline and the method."""
    max_attempts: int = Field(default=5, ge=1)
    """Attempts per request when the Hub answers 429 or 5xx or is unreachable. The pauses between
    them are ten minutes altogether at most."""
