"""What earlier runs measured on their questions, so that the gate can compare with it.

The gate writes an `Evaluated` beside its decision. Publish puts it into tuneline.json of the merged
model, and the next run to the same target gets it from there. Runs of one machine also find those
of each other's decisions.
"""

from pydantic import Field

from tuneline.seals import sealed_json
from tuneline.strict_model import StrictModel

EVALUATED_FILE = "evaluated.json"
"""Name of the file in a decision."""
EVALUATED_KEY = "evaluated"
"""Key of the same in tuneline.json of the merged model."""
RUNS_VARIABLE = "TUNELINE_RUNS"
"""Environment variable with the directory of the runs on this machine; unset on a cluster."""
MODEL_CHARACTERS = 16
"""Number of characters of a hash that identify a measured model."""


class TaskSamples(StrictModel):
    """The scores of one model on the samples of a target, without the samples themselves."""

    metric: str
    higher_is_better: bool
    ids_sha256: str
    """SHA-256 over the IDs of the samples, in the order of the scores."""
    scores: list[float]
    weights: list[float] = Field(default_factory=list)
    """Weights of the samples; empty if all are 1."""


class Attempt(StrictModel):
    """A tuned model that was measured."""

    model: str
    """Beginning of the SHA-256 of its scores."""
    ids_sha256: dict[str, str]
    """SHA-256 over the IDs of the samples, by target."""


class Evaluated(StrictModel):
    """The scores of a tuned model on the targets, and the models measured before it."""

    targets: dict[str, TaskSamples]
    attempts: list[Attempt]
    """Models that were measured on the same samples, the last of which is this one."""


class EarlierRuns(StrictModel):
    """What is known of earlier runs to the same target, and of earlier runs on this machine."""

    record_sha256: str = ""
    """SHA-256 of the text with this value empty."""
    published: Evaluated | None = None
    """Scores of the model that was published last; null if there is none."""
    attempts: list[Attempt] = Field(default_factory=list)
    """Models measured by other runs on this machine."""
    remark: str = ""
    """Why the model that was published last is not known; empty if it is, or if there is none."""

    def sealed(self) -> str:
        """Return the text of the file."""
        return sealed_json(self.model_dump(mode="json"))
