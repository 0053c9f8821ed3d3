"""Named chat templates, for models that have none and for data that needs another than the model's.

`TEMPLATES` is the only list of named templates. The values of `prepare.template`, their description
in the JSON Schema, the checks of the tokenizer and the tests are derived from `TEMPLATES`.

Rendered text is tokenised without adding special tokens. For a tokenizer that by default adds a BOS
token, `{{ bos_token }}` is therefore put in front of the template.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tuneline.errors import DataError

_CHATML = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' or message['content'] %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_LLAMA3 = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' or message['content'] %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{% endif %}"
)

# Text that separates an instruction from its input. The template below searches for this text.
_ALPACA_INPUT = "\n\n### Input:\n"

# Wording of the Stanford Alpaca dataset, for instructions with and without an input. A system
# message replaces the first paragraph.
_ALPACA = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set opening = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% elif '\\n\\n### Input:\\n' in messages[0]['content'] %}"
    "{% set opening = 'Below is an instruction that describes a task, paired with an input that "
    "provides further context. Write a response that appropriately completes the request.' %}"
    "{% set turns = messages %}"
    "{% else %}"
    "{% set opening = 'Below is an instruction that describes a task. Write a response that "
    "appropriately completes the request.' %}"
    "{% set turns = messages %}"
    "{% endif %}"
    "{% if opening %}{{ opening + '\\n\\n' }}{% endif %}"
    "{% for message in turns %}"
    "{% if message['role'] == 'user' %}"
    "{% if not loop.first %}{{ '\\n\\n' }}{% endif %}"
    "{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
    "{% else %}"
    "{{ '### Response:\\n' + message['content'] + eos_token }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class ChatTemplate:
    """A named chat template, and the tokens that a tokenizer needs to use it."""

    text: str
    """The Jinja template."""
    summary: str
    """What the template writes, for the description of `prepare.template`."""
    end_of_turn: str | None
    """Token that ends an answer; None: the end-of-sequence token of the tokenizer."""
    other_tokens: tuple[str, ...] = ()
    """Further tokens that the vocabulary has to contain."""
    input_heading: str = "\n\n"
    """Text between the instruction and the input of a row in the alpaca format."""


TEMPLATES = {
    "alpaca": ChatTemplate(
        _ALPACA,
        "the wording of Stanford Alpaca, for base models (needs no special tokens)",
        end_of_turn=None,
        input_heading=_ALPACA_INPUT,
    ),
    "chatml": ChatTemplate(
        _CHATML,
        "ChatML, as Qwen and SmolLM use it",
        end_of_turn="<|im_end|>",
        other_tokens=("<|im_start|>",),
    ),
    "llama3": ChatTemplate(
        _LLAMA3,
        "the header tokens of Llama 3",
        end_of_turn="<|eot_id|>",
        other_tokens=("<|start_header_id|>", "<|end_header_id|>"),
    ),
}

OWN_TEMPLATE = "tokenizer"
"""Value of `prepare.template` that stands for the chat template of the model's tokenizer."""

if TYPE_CHECKING:
    TemplateName = str
else:
    TemplateName = Literal[OWN_TEMPLATE, *TEMPLATES]

DESCRIPTION = (
    f"Chat template. {OWN_TEMPLATE}: the chat template of the model's tokenizer. "
    + " ".join(f"{name}: {template.summary}." for name, template in TEMPLATES.items())
)
"""Description of `prepare.template`."""


def read_templates(tokenizer: Any) -> dict[str, str]:
    """Return the tokenizer's chat templates by name; a single template is named "default"."""
    templates: str | dict[str, str] | None = tokenizer.chat_template
    if isinstance(templates, dict):
        return templates
    return {} if templates is None else {"default": templates}


def use_template(tokenizer: Any, name: str) -> str:
    """Set the chat template `name` on the tokenizer and return the template's text.

    A tokenizer may have several templates: "default" is used, and "tool_use" for rows with tools.
    The returned text then consists of all of them.

    Raises:
        DataError: `name` is `OWN_TEMPLATE` but the tokenizer has no chat template, or the
            vocabulary lacks a token that the named template needs.
    """
    if name == OWN_TEMPLATE:
        own = read_templates(tokenizer)
        named = ", ".join(list(TEMPLATES)[:-1]) + f" or {list(TEMPLATES)[-1]}"
        if not own:
            raise DataError(
                "the model's tokenizer has no chat template, so the model is a base model rather "
                f"than a chat model: set prepare.template to {named}"
            )
        if "default" not in own:
            raise DataError(
                f"the model's tokenizer has the chat templates {', '.join(sorted(own))} and none "
                f"of them is named default: set prepare.template to {named}, or add the template "
                "to use to the model's files as chat_template.jinja"
            )
        return "".join(own[key] for key in sorted(own))
    template = TEMPLATES[name]
    _check_tokens(tokenizer, name, template)
    text = template.text
    if tokenizer.bos_token and tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id:
        text = "{{ bos_token }}" + text
    tokenizer.chat_template = text
    return text


def _check_tokens(tokenizer: Any, name: str, template: ChatTemplate) -> None:
    """Check that each marker that the template writes is a single token of the vocabulary.

    If the end-of-turn marker consisted of several tokens, the model would learn to write them, but
    no server would stop there, because a server stops at a single token.
    """
    if template.end_of_turn is None and not tokenizer.eos_token:
        raise DataError(
            f"template {name} ends an answer with the end-of-sequence token, but the model's "
            "tokenizer defines none: set prepare.template to a template with an end of turn of "
            "its own"
        )
    vocabulary = tokenizer.get_vocab()
    needed = (*template.other_tokens, *filter(None, [template.end_of_turn]))
    missing = [token for token in needed if token not in vocabulary]
    if missing:
        without = [other for other, entry in TEMPLATES.items() if entry.end_of_turn is None]
        raise DataError(
            f"template {name} needs the tokens {', '.join(missing)}, which the model's tokenizer "
            f"does not have: set prepare.template to {' or '.join([*without, OWN_TEMPLATE])}"
        )
