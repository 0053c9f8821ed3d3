"""The record of the `dataset` artifact. `artifacts.py` exports its classes."""

from typing import ClassVar, Literal

from pydantic import Field

from tuneline.record import Ancestor, Record
from tuneline.strict_model import StrictModel

Method = Literal["sft", "dpo", "kto", "cpt"]


class LengthStatistics(StrictModel):
    """Lengths of the rows before truncation, in tokens."""

    mean: float
    median: float
    p95: float
    p99: float
    max: int
    histogram: list[tuple[int, int, int]] = Field(default_factory=list)
    """One tuple per bin: its lowest length, the lowest length above it, its number of rows."""


class Contamination(StrictModel):
    """How many questions of a benchmark are in the training rows."""

    num_questions: int = 0
    num_checked: int = 0
    """Number of questions that are long enough to be searched for."""
    num_found: int = 0
    examples: list[str] = Field(default_factory=list)
    """The beginnings of the first questions that were found."""

    @property
    def share(self) -> float:
        """Fraction of the benchmark's questions that are in the training rows."""
        return self.num_found / self.num_questions if self.num_questions else 0.0


class DatasetSource(StrictModel):
    """One of the datasets that a prepared dataset was made from."""

    source: str
    """The source as the recipe names it, without secrets."""
    revision: str | None = None
    """Commit on the Hub that was read; the recipe's revision if the commit was not looked up."""
    weight: float = 1.0
    format: str
    num_rows: int
    """Number of rows that were read."""
    num_rejected_rows: int
    num_train_rows: int
    """Number of different rows that are trained on."""
    num_repeated_rows: int = 0
    """Number of further training rows that repeat these rows because of the weight."""
    licence: str | None = None
    remarks: list[str] = Field(default_factory=list)
    """Sentences on how it was read: guessed encodings, files that were left out."""


class DatasetManifest(Record):
    """Contents of a prepared dataset."""

    filename: ClassVar[str] = "dataset.json"
    role: ClassVar[str] = "dataset"

    source: str
    method: Method
    format: str
    """Format of the rows, a key of `prepare.formats.table.FORMATS`."""
    template: str
    """Name of the chat template: a value of `prepare.template`; "none" for the method cpt."""
    loss_on: str
    """Which tokens count in the loss: "answers" or "all"."""
    num_train_rows: int
    num_eval_rows: int
    num_heldout_rows: int
    num_rejected_rows: int
    num_tokens: int
    """Number of tokens in train.parquet."""
    num_loss_tokens: int
    """Number of tokens in train.parquet that count in the loss."""
    num_desirable_rows: int | None = None
    """Number of training rows whose answer is desirable; null for other methods than kto."""
    num_undesirable_heldout_rows: int = 0
    """Number of rows left out because their answer is undesirable, so that a benchmark of held-out
    rows cannot use them. Method kto only."""
    lengths: LengthStatistics
    max_seq_length: int
    recommended_max_seq_length: int
    truncated_token_share: float
    """Fraction of all tokens that truncation to max_seq_length removes, 0 to 1."""
    num_overlong_rows: int = 0
    """Number of examples left out because truncation would leave no token that counts in the
    loss."""
    num_general_rows: int = 0
    """Number of training rows that come from the general dataset."""
    num_leaking_rows: int = 0
    """Number of rows left out because they are equal or similar to a row that is held out, or to an
    evaluation row."""
    unused: dict[str, int] = {}
    """Column that is not used, or key of messages such as `messages[].name` -> number of usable
    rows with a value in it. Rejected rows and `prepare.ignore_columns` are not counted."""
    num_unfolded_conversations: int = 0
    """Number of conversations that became several training or evaluation rows, because the template
    writes an earlier answer differently from the last one."""
    num_unfolded_rows: int = 0
    """Number of rows that these conversations became."""
    leaking_rows: dict[str, int] = Field(default_factory=dict)
    """The leaking rows by reason: "equal" text or tokens, the same "prompt", "near" duplicates."""
    num_same_answer_rows: int = 0
    """Number of preferences left out because both answers are equal after truncation."""
    num_repeated_heldout_rows: int = 0
    """Number of rows of prepare.heldout.source left out because an earlier one is the same."""
    num_rows_in_large_groups: int = 0
    """Number of training rows in groups of similar rows that are too large to be held out."""
    num_unselected_rows: int = 0
    """Number of usable rows that prepare.max_rows left out."""
    contamination: dict[str, Contamination] = Field(default_factory=dict)
    """Questions found in the training rows, by benchmark: "heldout" or a task of evaluate.tasks."""
    benchmarks_sha256: str | None = None
    """SHA-256 of the file with the questions of the benchmarks; null if there was none."""
    end_of_turn: str = ""
    """Text that the template puts after an answer, e.g. <|im_end|>; generation stops there."""
    template_date: str | None = None
    """Date that the template shows, YYYY-MM-DD; None: the template shows no date."""
    licence: str | None = None
    sources: list[DatasetSource] = Field(default_factory=list)
    """The datasets, with their weights and numbers of rows."""
    hub_ids: list[str] | None = None
    """Hub IDs of the datasets that came from the Hub; null in the record of an older tuneline."""
    sha256: str
    """SHA-256 over the checked rows in order, the template and the split."""

    def as_ancestor(self) -> Ancestor:
        """Return the entry with the hash of the rows instead of the hash of the files.

        The hash of the rows does not depend on file names and compression.
        """
        return super().as_ancestor().model_copy(update={"sha256": self.sha256})
