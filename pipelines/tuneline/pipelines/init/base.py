"""Which base model a machine can tune, and how long rows are in its tokens."""

import contextlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tuneline.dataset_record import LengthStatistics
from tuneline.errors import CredentialsError, DataError, HubError, ModelError
from tuneline.fetch import builtin, early
from tuneline.fetch.config import FetchConfig
from tuneline.fetch.gguf.tokenizer import read_tokenizer
from tuneline.pipelines.init.machine import Machine
from tuneline.pipelines.init.rows import Rows, texts_of
from tuneline.pipelines.init.scripts import LATIN, WORDY
from tuneline.prepare.config import PrepareConfig
from tuneline.prepare.formats.example import BadRowError, Example
from tuneline.prepare.tokens import lengths
from tuneline.prepare.tokens.render import Rendered, Renderer
from tuneline.prepare.tokens.templates import OWN_TEMPLATE, TEMPLATES, read_templates, use_template
from tuneline.prepare.tokens.tokenise import tokenise
from tuneline.prepare.tokens.tokenizer import load_tokenizer
from tuneline.runtime.source_names import builtin_name

EMBEDDED = "builtin:smollm2-135m"
"""Base model that needs no network; small enough for a CPU."""
EMBEDDED_ON_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
_LARGE, _SMALL = "Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct"
_MULTILINGUAL = "Qwen/Qwen2.5-0.5B-Instruct"
_GIB_FOR_LARGE = 14
"""GPU memory, in GiB, with which a 7B model can be tuned in 4 bits."""
TEMPLATE_OF_EMBEDDED = "chatml"
_NUM_MEASURED, _CHARACTERS_MEASURED = 1000, 4_000_000
"""Number of rows that are rendered and tokenised, and number of characters that end it earlier."""
_LETTERS_PER_TOKEN = 4
_TOKENS_PER_TEMPLATE = 16
_LONGEST = 1 << 15
"""Longest context in tokens that is proposed if the model's is not known."""


@dataclass(frozen=True)
class Base:
    """A base model."""

    source: str
    why: str
    """Why it was chosen; "" if it was given."""
    is_reachable: bool
    """Whether it was found."""
    remarks: tuple[str, ...] = ()

    @property
    def is_embedded(self) -> bool:
        """Whether it is the small model for CPUs."""
        return self.source in (EMBEDDED, EMBEDDED_ON_HUB)


@dataclass(frozen=True)
class Lengths:
    """Lengths of rows in tokens."""

    statistics: LengthStatistics
    recommended: int
    """Length that 99 % of the rows fit in, rounded up, and not above the model's context."""
    template: str
    """Value of `prepare.template`."""
    is_estimated: bool
    """Whether the lengths are estimated from the characters, because there is no tokenizer."""
    refused: dict[str, int] = field(default_factory=dict)
    """Why the chat template refuses rows -> number of rows."""
    num_tried: int = 0
    """Number of rows that were rendered or refused."""
    answer_p99: int = 0
    """Length that 99 % of the answers fit in; 0 if there is no tokenizer."""


def choose_base(given: str | None, machine: Machine, rows: Rows) -> Base:
    """Return the base model: the given one, or what fits the machine.

    Raises:
        ModelError: the given model does not exist, or cannot be tuned.
        CredentialsError: the Hub requires a token with access to the given model.
    """
    if given is not None:
        try:
            early.check(FetchConfig(), source=given)
        except HubError as error:
            return Base(given, "", False, (str(error),))
        return Base(given, "", True)
    if machine.gpu is None:
        return _embedded("small enough for a CPU, and it needs no network", rows)
    source = _LARGE if machine.gpu_memory_gib >= _GIB_FOR_LARGE else _SMALL
    why = f"fits {machine.gpu}; Apache-2.0; many languages"
    try:
        early.check(FetchConfig(), source=source)
        return Base(source, why, True)
    except (HubError, ModelError, CredentialsError) as error:
        if machine.is_elsewhere:
            return Base(source, why, False, (f"{source} could not be looked up: {error}",))
        remark = f"{source} would fit the GPU, but it could not be looked up: {error}"
        return _embedded("the Hub cannot be reached, and it needs no network", rows, (remark,))


def _embedded(why: str, rows: Rows, remarks: tuple[str, ...] = ()) -> Base:
    others = [script for script in rows.scripts if script != LATIN]
    foreign = sum(rows.scripts[script] for script in others)
    if 5 * foreign > rows.num_usable:
        remarks += (
            f"SmolLM2 was trained on English, and {foreign} of {rows.num_usable} rows are mostly "
            f"in {', '.join(others[:2])}: it learns their wording, but not the language. For good "
            f"answers, name a multilingual model with --base, e.g. {_MULTILINGUAL}",
        )
    try:
        builtin.locate(builtin_name(EMBEDDED) or "")
    except ModelError as error:
        return Base(EMBEDDED_ON_HUB, "small enough for a CPU", True, (*remarks, str(error)))
    return Base(EMBEDDED, why, True, remarks)


def measure(base: Base, rows: Rows, config: PrepareConfig) -> Lengths:
    """Return how long rows are in the tokens of a base model, and the chat template to use.

    Without the model's tokenizer, the lengths are estimated from the characters.

    Args:
        base: the base model.
        rows: the rows.
        config: what is given of the recipe's `prepare` section, with the method of the rows.
    """
    examples = _sample(rows.examples)
    if base.is_reachable:
        with contextlib.suppress(HubError, ModelError):
            tokenizer, longest = _tokenizer_of(base.source)
            return _measured(base, tokenizer, longest, examples, config)
    statistics = lengths.statistics([_estimate(example) for example in examples])
    template = config.template if "template" in config.model_fields_set else OWN_TEMPLATE
    recommended = lengths.recommend(statistics, _LONGEST)
    return Lengths(statistics, recommended, template, True)


def _tokenizer_of(source: str) -> tuple[Any, int]:
    """Return the tokenizer of a base model, and the largest number of tokens in its context."""
    file = early.gguf_of(source)
    if file is None:
        return load_tokenizer(str(early.tokenizer_of(FetchConfig(), source=source)))
    tokenizer, longest = read_tokenizer(file)
    return tokenizer, longest or _LONGEST


def _sample(examples: list[Example]) -> list[Example]:
    """Return rows from all parts of a dataset."""
    step = max(1, -(-len(examples) // _NUM_MEASURED))
    sampled = examples[::step]
    num_characters = sum(sum(map(len, texts_of(example))) for example in sampled)
    return sampled[:: max(1, -(-num_characters // _CHARACTERS_MEASURED))]


def _measured(
    base: Base, tokenizer: Any, longest: int, examples: Sequence[Example], config: PrepareConfig
) -> Lengths:
    template = OWN_TEMPLATE
    if config.method != "cpt":
        template = _use_template(base, tokenizer, config)
    renderer = Renderer(tokenizer, thinking=config.thinking, date=config.date)
    rendered: list[Rendered] = []
    refused: Counter[str] = Counter()
    for example in examples:
        try:
            rendered.append(renderer.render(example))
        except BadRowError as error:
            refused[str(error)] += 1
    if not rendered:
        reason, _ = refused.most_common(1)[0]
        raise DataError(
            f"the rows cannot be shown to {base.source}: {reason}. Name another model with --base, "
            f"e.g. {_MULTILINGUAL}, whose chat template knows tools and system messages"
        )
    statistics = lengths.statistics(
        [len(row) for row in tokenise(tokenizer, rendered, loss_on=config.loss_on)]
    )
    recommended = lengths.recommend(statistics, longest)
    answers = [tokenizer.encode(texts_of(example)[1]) for example in examples]
    answer = math.ceil(lengths.statistics([len(tokens) for tokens in answers]).p99)
    return Lengths(statistics, recommended, template, False, dict(refused), len(examples), answer)


def _use_template(base: Base, tokenizer: Any, config: PrepareConfig) -> str:
    """Set a chat template on the tokenizer, and return its name.

    Raises:
        DataError: the tokenizer lacks what the template needs.
    """
    if "template" in config.model_fields_set:
        names = [config.template]
    elif base.is_embedded:
        names = [TEMPLATE_OF_EMBEDDED]
    else:
        names = [OWN_TEMPLATE] if read_templates(tokenizer) else [TEMPLATE_OF_EMBEDDED, *TEMPLATES]
    for name in names[:-1]:
        with contextlib.suppress(DataError):
            use_template(tokenizer, name)
            return name
    use_template(tokenizer, names[-1])
    return names[-1]


def _estimate(example: Example) -> int:
    """Return the approximate number of tokens of a row."""
    prompt, answer = texts_of(example)
    text = prompt + answer
    num_letters = sum(len(pattern.findall(text)) for pattern in WORDY) + text.count(" ")
    num_others = len(text) - num_letters
    return num_letters // _LETTERS_PER_TOKEN + num_others + _TOKENS_PER_TEMPLATE
