"""Which method, format and columns are proposed for rows; and what is asked instead."""

import json
from typing import Any

import pytest

from tuneline.errors import DataError
from tuneline.pipelines.init.columns import Proposal, propose

CHAT = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Hello"}]
SHAREGPT = [{"from": "human", "value": "Hi there"}, {"from": "gpt", "value": "Hello"}]


def rows(values: dict[str, Any], **second: Any) -> list[dict[str, Any]]:
    """Two rows; the second one has other values in some columns."""
    return [values, values | second]


QUESTION = {"prompt": "question", "completion": "answer"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # Questions and answers under other names, in cases and languages that people write.
        (
            rows({"id": "7", "question": "Where is it?", "answer": "There."}),
            Proposal("sft", "prompt-completion", QUESTION),
        ),
        (
            rows({"Question": "Where?", "Answer": "There."}),
            Proposal("sft", "prompt-completion", {"prompt": "Question", "completion": "Answer"}),
        ),
        (
            rows({"문의 내용": "언제 오나요?", "답변": "내일요."}),
            Proposal("sft", "prompt-completion", {"prompt": "문의 내용", "completion": "답변"}),
        ),
        (
            rows({"질문": "언제?", "정답": "내일", "시스템": "친절하게 답하세요."}),
            Proposal(
                "sft",
                "prompt-completion",
                {"prompt": "질문", "completion": "정답", "system": "시스템"},
            ),
        ),
        (
            rows({"prompt": "Where?", "completion": "There."}),
            Proposal("sft", "prompt-completion"),
        ),
        (
            rows({"instruction": "Translate", "input": "Hi", "output": "Salut"}),
            Proposal("sft", "alpaca"),
        ),
        (rows({"instruction": "Greet", "output": "Hi"}), Proposal("sft", "alpaca")),
        (
            rows({"instruction": "Sum up", "context": "A long text", "response": "Short"}),
            Proposal("sft", "alpaca", {"input": "context", "output": "response"}),
        ),
        (
            rows({"input": "What is it?", "output": "A lamp"}),
            Proposal("sft", "prompt-completion", {"prompt": "input", "completion": "output"}),
        ),
        # Answers that are numbers, as in a table of sums, are answers all the same.
        (
            rows({"question": "0 + 1?", "answer": "1"}, answer="0"),
            Proposal("sft", "prompt-completion", QUESTION),
        ),
        # Conversations, by their content.
        (rows({"messages": CHAT, "tools": [{"name": "search"}]}), Proposal("sft", "messages")),
        (rows({"conversations": SHAREGPT}), Proposal("sft", "sharegpt")),
        (
            rows({"대화": json.dumps(CHAT), "id": "1"}),
            Proposal("sft", "messages", {"messages": "대화"}),
        ),
        # Preferences and judgements.
        (
            rows({"prompt": "Hi there", "chosen": "Hello", "rejected": "What?"}),
            Proposal("dpo", "preference"),
        ),
        (
            rows({"질문": "언제?", "선택": "내일요", "거절": "몰라요"}),
            Proposal("dpo", "preference", {"prompt": "질문", "chosen": "선택", "rejected": "거절"}),
        ),
        (rows({"chosen": CHAT, "rejected": CHAT}), Proposal("dpo", "preference")),
        (
            rows({"prompt": "Hi", "completion": "Hello", "label": True}, label=False),
            Proposal("kto", "kto"),
        ),
        (
            rows({"question": "Hi", "answer": "Hello", "만족여부": "1"}, 만족여부="0"),
            Proposal("kto", "kto", QUESTION | {"label": "만족여부"}),
        ),
        # A label that is a topic is no judgement.
        (
            rows({"question": "Where?", "answer": "There.", "label": "delivery"}),
            Proposal("sft", "prompt-completion", QUESTION),
        ),
        # Documents.
        (rows({"text": "A page of text."}), Proposal("cpt", "text")),
        (rows({"제목": "표지", "본문": "긴 글입니다."}), Proposal("cpt", "text", {"text": "본문"})),
        (
            rows({"no": "12", "handbook_page": "A page of text."}),
            Proposal("cpt", "text", {"text": "handbook_page"}),
        ),
    ],
)
def test_rows_are_proposed_to_be_read_as_they_are_meant(
    given: list[dict[str, Any]], expected: Proposal
) -> None:
    assert propose(given, "rows.csv") == expected


@pytest.mark.parametrize(
    ("given", "asks"),
    [
        (
            rows({"before": "Some words here", "after": "Other words here"}),
            r"rows.csv: the columns before, after do not say what to learn. Name them, e.g. "
            r"--columns prompt=before,completion=after for questions and answers, or",
        ),
        (rows({"question": "Where is it?"}), "--columns prompt=question,completion=COLUMN"),
        (
            rows({"text": "It works very well", "label": "1"}, label="0"),
            "label may be what the model should answer to text. To teach that: --columns "
            "prompt=text,completion=label. To continue pre-training on text alone: --columns "
            "text=text",
        ),
        (
            rows({"prompt": "Hi", "completion": "Hello", "label": True}),
            r"by label, all answers are desirable.*--set 'prepare.ignore_columns=\[label\]'",
        ),
        (rows({"x y": "Some words", "z": "Other words"}), "--columns 'prompt=x y,completion=z'"),
        (
            rows({"Well, what?": "Some words", "It's": "Other words"}),
            """--set 'prepare.columns={"prompt": "Well, what.", "completion": "It'"'"'s"}' for""",
        ),
        (
            rows(
                {"What, if anything, would you like to ask?": "a b", "Which reply helped?": "c d"}
            ),
            'columns "What, .*", Which .*"completion": "Which reply helped."}. for questions and '
            "answers, or --columns prompt=COLUMN,chosen=COLUMN,rejected=COLUMN for preferences, or "
            "--columns text=COLUMN for documents",
        ),
        (rows({"chosen": "Hello to you", "rejected": "What is it"}), "chosen=rejected|chosen=COL"),
    ],
)
def test_what_is_not_clear_is_asked(given: list[dict[str, Any]], asks: str) -> None:
    with pytest.raises(DataError, match=asks):
        propose(given, "rows.csv")


def test_a_method_that_is_given_is_kept() -> None:
    both = rows({"prompt": "Hi", "completion": "Hello", "text": "A page of text"})
    assert propose(both, "rows.csv") == Proposal("sft", "prompt-completion")
    assert propose(both, "rows.csv", method="cpt") == Proposal("cpt", "text")
    with pytest.raises(DataError, match="do not say what method dpo should read. Name them, e.g."):
        propose(both, "rows.csv", method="dpo")
