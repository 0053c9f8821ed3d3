"""The records of an evaluation and of the gate's decision."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from tuneline.dataset_record import DatasetManifest
from tuneline.record import BASE_MODEL, Record
from tuneline.records.exports import MergeProof, QuantizedModel
from tuneline.strict_model import StrictModel

Verdict = Literal["promote", "hold"]
ComparisonRole = Literal["target", "guard", "member", "control", "prompted", "published", "export"]
"""What a comparison decides. A target has to improve, a guard must not get worse, a member is part
of a group that is compared as a whole and decides nothing, and a control shows whether the tuned
model still reads its prompts. In two roles, the tuned model is not compared with the base model as
it is: prompted is the base model with training rows in its prompt, which decides nothing, and
published is the model that was published last, which must not be better. In the role export, an
export is compared with the merged model, which decides whether that export is published."""


HELDOUT_PREFIX = "heldout_"
"""How the names of the tasks over held-out rows begin."""


class TaskScore(StrictModel):
    """One metric of one task."""

    metric: str
    higher_is_better: bool
    value: float
    stderr: float | None = None
    num_samples: int


class Scores(Record):
    """Results of the evaluation of one model."""

    filename: ClassVar[str] = "scores.json"
    role: ClassVar[str] = "scores"

    model: str
    """Which model was evaluated: base, tuned or the format of an export."""
    tasks: dict[str, TaskScore]
    """Scores by task name. samples/<task>.jsonl holds the scores of the samples as rows {"id": str,
    "score": float}, with "weight": int in addition if the score is a ratio, and "cluster": str if
    the sample depends on others, with the same question or passage. The `value` of a task is the
    weighted mean of the scores."""
    groups: dict[str, list[str]] = Field(default_factory=dict)
    """Names in evaluate.tasks that stand for several tasks (kobest, mmlu), with these tasks."""
    harness: str
    """Name and version of the evaluation program."""
    num_examples: int = 0
    """Number of training rows in the prompt when the values of `prompted` were measured."""
    prompted: dict[str, TaskScore] = Field(default_factory=dict)
    """Scores of the tasks over held-out rows with training rows in the prompt, by task; base model
    only. prompted/<task>.jsonl holds the scores of the samples."""

    def missing_ancestors(self) -> list[str]:
        """Return the artifacts that the lineage should name: the data, and the model."""
        model = {"base": BASE_MODEL, "tuned": MergeProof.role}
        names = (DatasetManifest.role, model.get(self.model, QuantizedModel.role))
        return [name for name in names if name not in self.made_from]

    def called(self) -> str:
        """Return "base_scores" or "tuned_scores", because a decision is made from both."""
        return f"{self.model}_scores"


class SignedChange:
    """A difference of two scores that is positive if the second is better, and its interval."""

    if TYPE_CHECKING:
        difference: float
        interval: tuple[float, float]
        higher_is_better: bool

    @property
    def change(self) -> float:
        """Return the second minus the first score, with the sign of that subtraction."""
        return self.difference if self.higher_is_better else -self.difference

    @property
    def change_interval(self) -> tuple[float, float]:
        """Return the 95 % interval of `change`."""
        low, high = self.interval
        return (low, high) if self.higher_is_better else (-high, -low)


class TaskComparison(SignedChange, StrictModel):
    """Comparison of the tuned and another model on the same samples of one task.

    The other model is the base model, unless the role is prompted or published.
    """

    task: str
    metric: str
    higher_is_better: bool
    base: float
    """Score of the model that the tuned model is compared with."""
    tuned: float
    difference: float
    """Mean over the samples of tuned minus base score; negated if lower scores are better, so that
    a positive difference is an improvement."""
    interval: tuple[float, float]
    """95 % interval of the difference; `tuneline.gate.estimate` computes it."""
    lower: float
    """Bound above which the true difference lies with a probability of 95 %."""
    num_samples: int
    num_clusters: int
    """Number of clusters: samples with the same question or passage count as one."""
    effective_samples: float
    """Number of independent samples of equal weight that would determine the mean as well."""
    num_changed: int | None = None
    """Clusters with an answer that only one of the models got right; null for other scores than 0
    and 1."""
    outcome: Literal["better", "worse", "undecided"]
    role: ComparisonRole
    num_examples: int = 0
    """Number of training rows in the prompts of the base model; role prompted only."""

    @property
    def title(self) -> str:
        """Return the task, with the other model if that is not the base model as it is."""
        if self.role == "prompted":
            return f"{self.task}, base model with {self.num_examples} training rows in its prompt"
        return f"{self.task}, model published last" if self.role == "published" else self.task


class ExportVerdict(StrictModel):
    """Verdict on publishing one export, if the tuned model is published.

    `tuneline.verdict` computes verdict and reason from the comparison.
    """

    format: str
    verdict: Verdict
    reason: str
    comparison: TaskComparison | None = None
    """Comparison with the merged model (as `base`) on the rows that both answered; null if the
    export was not scored."""
    sealed: str
    """`record_sha256` of the export's record."""

    @property
    def is_held(self) -> bool:
        """Return whether the export is not published."""
        return self.verdict == "hold"


class Decision(Record):
    """Verdict on publishing the tuned model, with its reason and the comparisons.

    `tuneline.verdict` computes verdict and reason from the comparisons and from the settings.
    """

    filename: ClassVar[str] = "decision.json"
    role: ClassVar[str] = "decision"
    required_ancestors: ClassVar[tuple[str, ...]] = ("base_scores", "tuned_scores")

    verdict: Verdict
    reason: str
    remarks: list[str] = Field(default_factory=list)
    """Sentences that do not decide: what prompting alone gives, and repeated attempts."""
    comparisons: list[TaskComparison]
    exports: list[ExportVerdict] = Field(default_factory=list)
    """Verdicts on the exports, which do not depend on the verdict on the model."""

    def held_exports(self) -> dict[str, str]:
        """Return the reason of each export that is held, by format."""
        return {item.format: item.reason for item in self.exports if item.is_held}

    def kept(self, exports: Iterable[QuantizedModel]) -> list[QuantizedModel]:
        """Return the exports that are not held."""
        held = self.held_exports()
        return [export for export in exports if export.format not in held]
