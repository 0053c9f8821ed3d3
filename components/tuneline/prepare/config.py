"""The `prepare` section of a recipe."""

import codecs
import datetime
from typing import Literal, Self

from pydantic import Field, model_validator

from tuneline.artifacts import Method
from tuneline.prepare.formats.table import AUTO, FormatName
from tuneline.prepare.formats.table import DESCRIPTION as FORMAT_DESCRIPTION
from tuneline.prepare.tokens.templates import DESCRIPTION as TEMPLATE_DESCRIPTION
from tuneline.prepare.tokens.templates import OWN_TEMPLATE, TemplateName
from tuneline.prepare.tokens.thinking import Thinking
from tuneline.strict_model import StrictModel


class HeldoutConfig(StrictModel):
    """Rows that are never trained on; the benchmark of the evaluate step is made of them."""

    source: str | None = None
    """Another source of rows in the same format. Default: rows split off the dataset itself."""
    split: str | None = None
    """Split of `source`. Default: the only split, or the value of prepare.split."""
    max_rows: int = Field(default=200, ge=0)
    """Maximum number of held-out rows; 0 holds out none.

    Rows of `source` are taken from its beginning. Otherwise the seed selects the rows, and at most
    20 % of the dataset are held out."""


class GeneralConfig(StrictModel):
    """A general dataset, part of which is mixed into the training rows."""

    source: str
    """A source as in `dataset`, with rows for the same method."""
    share: float = Field(default=0.2, gt=0, le=0.9)
    """Fraction of the training rows that are general rows."""
    format: FormatName = Field(default=AUTO, description=FORMAT_DESCRIPTION)
    columns: dict[str, str] = Field(default_factory=dict)
    """Column that tuneline reads -> column of the source, as in prepare.columns."""
    split: str | None = None
    """Split to read, as in prepare.split. Default: train."""
    subset: str | None = None
    """Subset to read, as in prepare.subset. Default: the dataset's default subset."""
    revision: str | None = None
    """Branch, tag or commit if the source is a Hub dataset. Default: the default branch."""


class DatasetConfig(StrictModel):
    """One of several datasets to train on."""

    source: str
    """A source as in `dataset`."""
    weight: float = Field(default=1.0, gt=0, le=100)
    """How often its training rows are used per epoch: 2 uses each row twice, and 0.5 a half that
    the seed draws. With prepare.mixing temperature, the number of its rows counts this many times.
    Evaluation and held-out rows are not repeated."""
    format: FormatName | None = None
    """Row format. Default: prepare.format."""
    columns: dict[str, str] | None = None
    """Column that tuneline reads -> column of the source. Default: prepare.columns."""
    split: str | None = None
    """Split to read. Default: prepare.split."""
    subset: str | None = None
    """Subset to read. Default: the dataset's default subset."""
    revision: str | None = None
    """Branch, tag or commit if the source is a Hub dataset. Default: the default branch."""
    licence: str | None = None
    """Licence of its rows, for the record. Default: none is stated."""


class PrepareConfig(StrictModel):
    """How rows become token IDs. The source of the rows is the recipe's `dataset`."""

    method: Method = "sft"
    """Training method. sft: supervised fine-tuning on answers to prompts; dpo: direct preference
    optimisation on pairs of answers; kto: Kahneman-Tversky optimisation on single answers that are
    labelled desirable or undesirable; cpt: continued pre-training on raw text."""
    format: FormatName = Field(default=AUTO, description=FORMAT_DESCRIPTION)
    columns: dict[str, str] = Field(default_factory=dict)
    """Column that tuneline reads -> column of the source, e.g. {prompt: question, completion:
    answer}. Default: the source's columns already have the format's names."""
    ignore_columns: list[str] = Field(default_factory=list)
    """Columns of the source to read nothing from, and keys of messages, e.g. [images,
    "messages[].weight"]. Columns that change what should be learnt, such as images, make a row
    unusable unless they are named here. Applies to all sources of the recipe."""
    split: str | None = None
    """Split to read. Datasets on the Hub have splits, and so have directories, by their dataset
    card or by names such as train.jsonl, test-00000.parquet and validation/. A source without the
    split is refused. Default: train."""
    subset: str | None = None
    """Subset to read of a Hub dataset, or of a directory with a dataset card, e.g. main for
    openai/gsm8k. Default: the dataset's default subset."""
    revision: str | None = None
    """Branch, tag or commit if the source is a Hub dataset. Default: the default branch."""
    encoding: str | None = None
    """Encoding of text files, e.g. cp949, utf-16 or shift_jis. Default: UTF-8, or what the bytes of
    a file look like, which the log and the record name."""
    mixing: Literal["epochs", "temperature"] = "epochs"
    """How several `datasets` share the training rows. epochs: `weight` says how often the rows of
    each are used. temperature: the share of each is proportional to its number of rows, times its
    weight, to the power of 1 / `mixing_temperature`; the sum of the rows stays the same."""
    mixing_temperature: float = Field(default=2.0, ge=1)
    """Temperature of mixing: 1 keeps the shares, and higher values make them more alike."""
    template: TemplateName = Field(default=OWN_TEMPLATE, description=TEMPLATE_DESCRIPTION)
    system_prompt: str | None = None
    """System message for rows without one; an empty string adds an empty system message. Default:
    none is added, so the chat template may insert its own."""
    date: datetime.date | None = None
    """Date that a chat template shows if it asks for the current one, e.g. 2026-01-31. Default: the
    dataset's own date, so that the same rows give the same tokens on every day: of the newest file,
    or of the commit on the Hub."""
    thinking: Thinking = "keep"
    """What to do with the reasoning of answers, under a key of a message or between <think> tags.
    keep: it stands where the chat template puts it, and a row whose reasoning the template cannot
    show is refused; strip: it is removed; require: a row with a learnt answer without reasoning is
    refused."""
    learn_empty_thinking: bool = False
    """Whether the model learns to write an empty block of reasoning before an answer without
    reasoning. By default, the block is a part of the prompt, as servers write it if thinking is
    disabled."""
    loss_on: Literal["answers", "all"] = "answers"
    """Tokens that contribute to the loss. answers: the completion or the assistant's messages, with
    their end of turn; all: every token."""
    max_seq_length: int | Literal["auto"] = 2048
    """Maximum length of an example in tokens, at least 8; longer ones are truncated. auto: the
    length that 99 % of the rows fit in, rounded up to a multiple of 64."""
    eval_share: float = Field(default=0.05, ge=0, le=0.5)
    """Fraction of the rows on which the evaluation loss is measured during training."""
    max_eval_rows: int = Field(default=500, ge=0)
    """Maximum number of evaluation rows; 0 evaluates none."""
    heldout: HeldoutConfig = Field(default=HeldoutConfig())
    """Rows that are never trained on, for the benchmark before and after tuning."""
    general: GeneralConfig | None = None
    """A general dataset to mix into the training rows, so that the model forgets fewer of its
    general abilities. Default: none."""
    max_rows: int | None = Field(default=None, ge=1)
    """Maximum number of rows of the dataset to use, selected by the seed. Default: all rows."""
    max_rejected_share: float = Field(default=0.01, ge=0, le=1)
    """Fraction of unusable rows above which the step fails."""
    max_contaminated_share: float | None = Field(default=0.05, ge=0, le=1)
    """Fraction of a benchmark's questions in the training rows above which the step fails. The
    benchmarks are the lm-eval tasks of evaluate.tasks and the rows of heldout.source. null: report
    the fraction only."""
    seed: int = 3407
    """Seed of the splits and of the order of the rows."""
    licence: str | None = None
    """Licence of the data, for the model card. Default: none is stated."""

    @model_validator(mode="after")
    def _encoding_is_known(self) -> Self:
        if self.encoding is not None:
            try:
                codecs.lookup(self.encoding)
            except LookupError:
                raise ValueError(
                    f"encoding '{self.encoding}' is unknown: use a name that Python knows, e.g. "
                    "utf-8, cp949, utf-16, shift_jis, gb18030 or cp1252"
                ) from None
        return self

    @model_validator(mode="after")
    def _length_is_usable(self) -> Self:
        if isinstance(self.max_seq_length, int) and self.max_seq_length < 8:
            raise ValueError("max_seq_length must be at least 8 tokens, or 'auto'")
        return self
