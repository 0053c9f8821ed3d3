"""A chat template that is compiled once and rendered often."""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import _compile_jinja_template

from tuneline.errors import DataError
from tuneline.models.tokenizer.chat_templates import REFUSALS
from tuneline.prepare.formats.example import BadRowError

Messages = Sequence[Mapping[str, Any]]
"""Messages with the keys that templates of transformers read."""


class CompiledTemplate:
    """A chat template with the special tokens of its tokenizer and with a fixed date.

    The wrapper `apply_chat_template` copies every message before it renders them, which takes
    longer than rendering most templates. Therefore the compiled template is called directly.
    """

    def __init__(
        self, tokenizer: Any, text: str, date: datetime.date | None, *, content_in_parts: bool
    ):
        """Compile a template.

        Args:
            tokenizer: the tokenizer, for its special tokens.
            text: the template.
            date: the date that the template shows; None: the current date.
            content_in_parts: whether the template reads a content as a list of parts, as templates
                of models that see images do, and not as text.
        """
        try:
            self._template = _compile_jinja_template(text)
        except TemplateError as error:
            raise DataError(
                f"the chat template of the model's tokenizer is not valid Jinja ({error}): set "
                "prepare.template to another template, or repair the model's chat_template.jinja"
            ) from None
        self.text = text
        self._content_in_parts = content_in_parts
        self._variables: dict[str, Any] = {"documents": None, **tokenizer.special_tokens_map}
        if date is not None:
            # A variable takes precedence over the global function, which tells the current time.
            self._variables["strftime_now"] = datetime.datetime.combine(
                date, datetime.time()
            ).strftime

    @property
    def shows_date(self) -> bool:
        """Whether the template asks for the current date."""
        return "strftime_now" in self.text

    def render(
        self,
        messages: Messages,
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        prompt: bool = False,
        **variables: Any,
    ) -> str:
        """Return the messages as text.

        Args:
            messages: the messages.
            tools: definitions of the tools that the conversation may call.
            prompt: whether the text ends with the generation prompt, so that an answer follows.
            variables: further variables of the template, e.g. enable_thinking.

        Raises:
            BadRowError: the template refuses the messages.
        """
        if self._content_in_parts:
            messages = [
                {**message, "content": [{"type": "text", "text": message["content"]}]}
                for message in messages
            ]
        try:
            text: str = self._template.render(
                messages=messages,
                tools=tools,
                add_generation_prompt=prompt,
                **self._variables,
                **variables,
            )
        except REFUSALS as error:
            raise BadRowError(f"the chat template refuses the row: {error}") from None
        return text

    def attempt(
        self,
        messages: Messages,
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        prompt: bool = False,
    ) -> str:
        """Return the messages as text, as `render` does; "" if the template refuses them."""
        try:
            return self.render(messages, tools, prompt=prompt)
        except BadRowError:
            return ""
