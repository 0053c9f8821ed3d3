"""Masks, token by token, against the {% generation %} marks of the templates that have them.

Rows of every format are written with every family's template, by tuneline from positions and by
transformers from the marks. The masks are equal except for the deviations that `Family` names.
"""

import datetime
from itertools import accumulate
from typing import Any

import pytest
from template_families import FAMILIES, FORMATS, Family

from tuneline.prepare.formats.example import BadRowError, Example
from tuneline.prepare.tokens.render import Renderer
from tuneline.prepare.tokens.tokenise import TokenRow, tokenise

TODAY = datetime.date.today()
Runs = list[tuple[int, int]]


renderers: dict[str, Renderer] = {}


def rows_of(tokenizer: Any, template: str, example: Example) -> list[TokenRow]:
    tokenizer.chat_template = template
    if template not in renderers:
        renderers[template] = Renderer(tokenizer, date=TODAY)
    return list(tokenise(tokenizer, [renderers[template].render(example)], loss_on="answers"))


def runs(mask: list[int]) -> Runs:
    """First token and end of each run of learnt tokens."""
    starts = [n for n, bit in enumerate(mask) if bit and not (n and mask[n - 1])]
    ends = [n + 1 for n, bit in enumerate(mask) if bit and not (mask + [0])[n + 1]]
    return list(zip(starts, ends, strict=True))


def by_marks(tokenizer: Any, family: Family, example: Example, last: int) -> tuple[list[int], Runs]:
    """Token IDs of the conversation up to the answer `last`, and the runs that the marks enclose.

    The runs are corrected by the deviations of the family. White space after the end of turn is
    never learnt, because nothing is generated after the end.
    """
    tokenizer.chat_template = family.marked_text
    encoded = tokenizer.apply_chat_template(
        for_transformers(example, family)[: last + 1],
        tools=example.tools,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids, found = encoded["input_ids"], []
    for start, end in runs(encoded["assistant_masks"]):
        for lead in family.unlearnt_before:
            cut = [n for n in range(start, end) if tokenizer.decode(ids[start:n]) == lead]
            if cut:
                start = cut[-1]
                break
        tail = [
            n for n in range(start, end) if tokenizer.decode(ids[n:end]) == family.unlearnt_after
        ]
        end = tail[0] if tail else end
        while not tokenizer.decode(ids[end - 1]).strip():
            end -= 1
        if family.learnt_after_call and ids[end] == tokenizer.convert_tokens_to_ids(
            family.learnt_after_call
        ):
            end += 1
        before = tokenizer.decode(ids[:start])
        if family.learnt_after_result and before.endswith(
            "<tool_response|>" + family.learnt_after_result
        ):
            start -= len(
                tokenizer(family.learnt_after_result, add_special_tokens=False)["input_ids"]
            )
        found.append((start, end))
    return ids, found


def for_transformers(example: Example, family: Family) -> list[dict[str, Any]]:
    """The messages as transformers takes them."""
    messages = []
    for message in example.messages or []:
        message = dict(message)
        reasoning = message.pop("reasoning", None)
        if reasoning is not None and family.is_inline:
            message["content"] = f"<think>\n{reasoning}\n</think>\n\n{message['content']}"
        elif reasoning is not None:
            message["reasoning_content"] = reasoning
        messages.append(message)
    return messages


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_masks_are_those_of_the_marks(marked: Any, family: Family, name: str) -> None:
    example = FORMATS[name]
    if name in family.refused:
        with pytest.raises(BadRowError):
            rows_of(marked, family.text, example)
        return
    if name in family.unmarked:
        pytest.skip("the template with the marks leaves a part out")
    messages = example.messages or []
    answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    wanted = [by_marks(marked, family, example, last) for last in answers]
    # The template of the models, which may rewrite earlier turns, teaches the same answers.
    own = rows_of(marked, family.text, example)
    assert [marked.decode(row.input_ids[a:b]) for row in own for a, b in runs(row.loss_mask)] == [
        marked.decode(ids[slice(*found[-1])]) for ids, found in wanted
    ]
    if name in family.rewritten:
        return
    # The template with the marks gives the same tokens, and learns the same of them.
    rows = rows_of(marked, family.marked_text, example)
    counts = [len(runs(row.loss_mask)) for row in rows]
    for row, count, total in zip(rows, counts, accumulate(counts), strict=True):
        ids, found = wanted[total - 1]
        assert row.input_ids == ids
        assert runs(row.loss_mask) == found[-count:]
    assert sum(counts) == len(answers)
