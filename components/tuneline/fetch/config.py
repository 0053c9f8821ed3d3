"""The `fetch` section of a recipe."""

from tuneline.strict_model import StrictModel


class FetchConfig(StrictModel):
    """How the base model is fetched. The model itself is the recipe's `base_model`."""

    revision: str | None = None
    """Branch, tag or commit if the model is on the Hub; the commit it names is recorded. Default:
    the default branch."""
    trust_remote_code: str | None = None
    """Hub ID or directory whose own Python code may be run; must equal `base_model`.

    The permission names the model, so that a change of `base_model` does not extend it to another
    one. Default: no code of a model is run."""
