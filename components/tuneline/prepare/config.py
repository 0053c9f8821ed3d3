"""The recipe's part for preparing a data set."""

from typing import Literal, Self

from pydantic import Field, model_validator

from tuneline.artifacts import Method
from tuneline.strict_model import StrictModel

Format = Literal[
    "auto", "alpaca", "messages", "sharegpt", "prompt-completion", "preference", "text"
]
Template = Literal["tokenizer", "alpaca", "chatml", "llama3"]


class HeldoutConfig(StrictModel):
    """Rows that training never sees and that the benchmark is made of."""

    source: str | None = None
    """Another source in the same format; default: rows split off the data set itself."""
    split: str | None = None
    """Hub sources only: the split's name."""
    max_rows: int = Field(default=200, ge=0)
    """How many rows; 0 for none. With a source of its own: its first rows."""


class GeneralConfig(StrictModel):
    """A general data set, some rows of which are trained on beside the recipe's own."""

    source: str
    """A Hub id, a file, a directory, a glob of files or a built-in; rows of the same method."""
    share: float = Field(default=0.2, gt=0, le=0.9)
    """Share of the training rows that are general."""
    format: Format = "auto"
    """What its rows look like."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Our column name -> the source's."""
    split: str = "train"
    """Hub sources only: the split's name."""
    subset: str | None = None
    """Hub sources only: the name of one of several subsets."""
    revision: str | None = None
    """Hub sources only: branch, tag or commit."""


class PrepareConfig(StrictModel):
    """How rows become token ids; the rows' source is the recipe's `dataset`."""

    method: Method = "sft"
    """sft: answers to prompts; dpo: preferences; cpt: continued pre-training on raw text."""
    format: Format = "auto"
    """What the rows look like; auto reads it off the columns of the first row."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Our column name -> the source's, e.g. {prompt: question, completion: answer}."""
    split: str = "train"
    """Hub sources only: the split's name."""
    subset: str | None = None
    """Hub sources only: the name of one of several subsets, e.g. main of openai/gsm8k."""
    revision: str | None = None
    """Hub sources only: branch, tag or commit."""
    template: Template = "tokenizer"
    """The chat template: the tokenizer's own, or a named one that replaces it."""
    system_prompt: str | None = None
    """A system message for rows that bring none. An empty string asks for an empty one."""
    loss_on: Literal["answers", "all"] = "answers"
    """answers: completion or assistant tokens only, end of turn included; all: every token."""
    max_seq_length: int | Literal["auto"] = 2048
    """Tokens a row is cut to; auto: the length that 99 % of the rows fit in."""
    eval_share: float = Field(default=0.05, ge=0, le=0.5)
    """Share of the rows kept for the evaluation loss during training."""
    max_eval_rows: int = Field(default=500, ge=0)
    heldout: HeldoutConfig = HeldoutConfig()
    general: GeneralConfig | None = None
    """Mixed into the training rows, so that the model forgets less of what it could do before."""
    max_rows: int | None = Field(default=None, ge=1)
    """Take only so many rows, drawn by the seed; default: all."""
    max_rejected_share: float = Field(default=0.01, ge=0, le=1)
    """The step fails when a larger share of the rows is not usable."""
    seed: int = 3407
    """Decides the splits and the order."""
    licence: str | None = None
    """Licence of the data, for the model card."""

    @model_validator(mode="after")
    def _method_and_loss_agree(self) -> Self:
        if isinstance(self.max_seq_length, int) and self.max_seq_length < 8:
            raise ValueError("max_seq_length must be at least 8 tokens, or 'auto'")
        return self
