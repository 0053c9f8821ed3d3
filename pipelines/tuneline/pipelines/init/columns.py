"""Which training method and row format fit rows, and which column holds what.

A column is recognised by its name, in English or Korean and a few others, and by what is in it:
text, messages, or judgements. Where that leaves two readings, the user is asked, not the dice.
"""

import json
import re
import shlex
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tuneline.artifacts import Method
from tuneline.errors import DataError
from tuneline.prepare.formats.checks import has_value
from tuneline.prepare.formats.conversation import find_messages
from tuneline.prepare.formats.reading import Row

NUM_ROWS = 256
"""Number of rows by whose values the content of a column is recognised."""

Content = Literal["text", "messages", "truth", "other"]

_NAMES: dict[str, tuple[str, ...]] = {
    "prompt": (
        *("prompt", "question", "instruction", "query", "user", "request", "inquiry", "problem"),
        *("customer", "human", "input", "ask", "q", "질문", "질문내용", "문의", "문의내용", "질의"),
        *("고객문의", "지시", "지시문", "명령", "명령어", "프롬프트", "문제", "입력", "사용자"),
        *("質問", "問題", "问题", "提问", "指令", "输入"),
    ),
    "completion": (
        *("completion", "answer", "response", "output", "reply", "assistant", "target", "solution"),
        *("gpt", "bot", "a", "답변", "답변내용", "답", "응답", "대답", "정답", "회신", "출력"),
        *("해결", "回答", "答案", "回复", "答复", "输出"),
    ),
    "input": ("input", "context", "passage", "background", "문맥", "지문", "배경", "입력", "본문"),
    "system": ("system", "system_prompt", "시스템", "시스템프롬프트"),
    "chosen": (
        *("chosen", "preferred", "accepted", "better", "winner", "good_answer", "chosen_response"),
        *("선택", "선호", "선택답변", "선호답변", "좋은답변", "채택"),
    ),
    "rejected": (
        *("rejected", "dispreferred", "worse", "loser", "bad_answer", "rejected_response"),
        *("거부", "거절", "비선호", "거절답변", "비선호답변", "나쁜답변", "탈락"),
    ),
    "label": (
        *("label", "kto_tag", "desirable", "is_desirable", "is_good", "good", "thumbs_up"),
        *("liked", "helpful", "라벨", "레이블", "평가", "좋음", "만족", "만족여부", "도움됨"),
    ),
    "text": (
        *("text", "content", "document", "body", "article", "passage", "page"),
        *("본문", "내용", "텍스트", "문서", "글", "원문", "正文", "文本", "本文"),
    ),
}
"""What a column holds -> names of such columns, the best first."""
_CLASSES = ("label", "class", "sentiment", "intent", "라벨", "레이블", "감정", "분류")
"""Names of columns beside a text that may be what the model should answer."""
_MAX_CHARACTERS_REPEATED = 40
"""Longest name of a column, e.g. a question of a form, that a message repeats in every example."""
_YES, _NO = ("true", "1", "1.0"), ("false", "0", "0.0")


@dataclass(frozen=True)
class Proposal:
    """How rows should be read."""

    method: Method
    format: str
    """Name of a row format that is for the method."""
    columns: dict[str, str] = field(default_factory=dict)
    """Column that tuneline reads -> column of the rows, where the names differ."""


class _Table:
    """The columns of rows: their names, and what is in them."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.values: dict[str, list[Any]] = {}
        for row in rows[:NUM_ROWS]:
            for name, value in row.items():
                self.values.setdefault(name, [])
                if has_value(value):
                    self.values[name].append(value)
        self.contents = {name: _content(values) for name, values in self.values.items()}

    def find(self, role: str, *contents: Content, beside: Sequence[str | None] = ()) -> str | None:
        """Return the column that holds what a role names; None if there is none.

        Args:
            role: a key of `_NAMES`.
            contents: what the column may contain.
            beside: columns that hold something else.
        """
        able = [
            name
            for name, content in self.contents.items()
            if content in contents and name not in beside
        ]
        if role in able:
            return role
        plain = {name: _plain(name) for name in able}
        for known in map(_plain, _NAMES[role]):
            found = [name for name in able if plain[name] == known]
            if found:
                return found[0]
        return None

    def texts(self) -> list[str]:
        """Return the columns that contain text of several words, and not e.g. numbers or dates."""
        return [
            name
            for name, content in self.contents.items()
            if content == "text"
            and sum(map(_has_words, self.values[name])) > len(self.values[name]) / 2
        ]


def propose(rows: Sequence[Row], source: str, *, method: Method | None = None) -> Proposal:
    """Return how rows should be read.

    Args:
        rows: the first rows, of which at least one has a value.
        source: name of the source, for messages.
        method: the training method, if it is given.

    Raises:
        DataError: the columns have several meanings, or none; the message asks what is meant.
    """
    table = _Table(rows)
    for readings in (_preferences(table), _judged(table, source), _answers(table)):
        for proposal in readings:
            if method in (None, proposal.method):
                return proposal
    if method in (None, "cpt"):
        for proposal in _documents(table, source):
            return proposal
    raise DataError(_question(table, source, method))


def _preferences(table: _Table) -> Iterator[Proposal]:
    chosen = table.find("chosen", "text", "messages")
    rejected = table.find("rejected", "text", "messages")
    if chosen is None or rejected is None:
        return
    used = (chosen, rejected)
    prompt = table.find("prompt", "text", "messages", beside=used)
    has_prompt = all(table.contents[name] == "messages" for name in used)
    if prompt is None and not has_prompt:
        return
    columns = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    system = table.find("system", "text", beside=(*used, prompt))
    yield Proposal("dpo", "preference", _mapped(columns | {"system": system}))


def _judged(table: _Table, source: str) -> Iterator[Proposal]:
    label = table.find("label", "truth")
    answered = next(_answers(table, beside=(label,)), None) if label is not None else None
    if label is None or answered is None:
        return
    judgements = {str(value).strip().lower() in _YES for value in table.values[label]}
    if len(judgements) < 2:
        kind = "desirable" if judgements.pop() else "undesirable"
        raise DataError(
            f"{source}: by {label}, all answers are {kind}, but KTO needs desirable and "
            f"undesirable ones. To learn the answers as they are: --set "
            f"'prepare.ignore_columns=[{label}]'"
        )
    format = "kto-tag" if label == "kto_tag" else "kto"
    columns = (
        answered.columns if format == "kto-tag" else answered.columns | _mapped({"label": label})
    )
    yield Proposal("kto", format, columns)


def _answers(table: _Table, beside: Sequence[str | None] = ()) -> Iterator[Proposal]:
    """Yield how conversations, and questions with answers, should be read."""
    lists = [name for name, content in table.contents.items() if content == "messages"]
    for name, format in (("messages", "messages"), ("conversations", "sharegpt")):
        if name in lists:
            yield Proposal("sft", format)
            return
    prompt = table.find("prompt", "text", "messages", beside=beside)
    answer = table.find("completion", "text", "messages", "truth", beside=(*beside, prompt))
    if prompt is None or answer is None:
        if len(lists) == 1:
            yield Proposal("sft", "messages", {"messages": lists[0]})
        return
    used = (*beside, prompt, answer)
    system = table.find("system", "text", beside=used)
    extra = table.find("input", "text", beside=used)
    if extra is not None or (prompt, answer) == ("instruction", "output"):
        columns = {"instruction": prompt, "input": extra, "output": answer, "system": system}
        yield Proposal("sft", "alpaca", _mapped(columns))
    else:
        columns = {"prompt": prompt, "completion": answer, "system": system}
        yield Proposal("sft", "prompt-completion", _mapped(columns))


def _documents(table: _Table, source: str) -> Iterator[Proposal]:
    texts = table.texts()
    text = table.find("text", "text")
    if text is None and len(texts) == 1:
        # A lone column of questions, or of answers, is half of a pair, and no document.
        if not any(table.find(role, "text") for role in ("prompt", "completion", "chosen")):
            text = texts[0]
    if text is None:
        return
    classes = [name for name in table.contents if name != text and _plain(name) in _CLASSES]
    if classes:
        raise DataError(
            f"{source}: {classes[0]} may be what the model should answer to {text}. To teach that: "
            f"{_option(prompt=text, completion=classes[0])}. To continue pre-training on {text} "
            f"alone: {_option(text=text)}"
        )
    yield Proposal("cpt", "text", _mapped({"text": text}))


def _question(table: _Table, source: str, method: Method | None) -> str:
    names = [f'"{name}"' if "," in name else name for name in table.contents]
    texts = table.texts()
    first, second, third = (*texts, "COLUMN", "COLUMN", "COLUMN")[:3]
    sft = f"{_option(prompt=first, completion=second)} for questions and answers"
    if method is None and max(map(len, (first, second, third))) > _MAX_CHARACTERS_REPEATED:
        first = second = third = "COLUMN"
    examples = {
        "sft": sft,
        "dpo": f"{_option(prompt=first, chosen=second, rejected=third)} for preferences",
        "kto": f"{_option(prompt=first, completion=second, label='COLUMN')} for judged answers",
        "cpt": f"{_option(text=first)} for documents",
    }
    chosen = [examples[method]] if method else [examples["sft"], examples["dpo"], examples["cpt"]]
    what = f"what method {method} should read" if method else "what to learn"
    return (
        f"{source}: the columns {', '.join(names[:30]) or '(none)'} do not say {what}. Name them, "
        f"e.g. {', or '.join(chosen)}"
    )


def _option(**columns: str) -> str:
    if any(separator in name for name in columns.values() for separator in ",="):
        mapping = json.dumps(columns, ensure_ascii=False)
        return f"--set {shlex.quote(f'prepare.columns={mapping}')}"
    text = ",".join(f"{ours}={theirs}" for ours, theirs in columns.items())
    return f"--columns '{text}'" if re.search(r"[^\w,=.-]", text) else f"--columns {text}"


def _mapped(columns: dict[str, str | None]) -> dict[str, str]:
    return {ours: theirs for ours, theirs in columns.items() if theirs not in (None, ours)}


def _content(values: Sequence[Any]) -> Content:
    """Return what most values of a column are."""
    counts: dict[Content, int] = {
        "truth": sum(str(value).strip().lower() in (*_YES, *_NO) for value in values),
        "messages": sum(bool(find_messages(value)) for value in values),
        "text": sum(isinstance(value, str) for value in values),
    }
    return next((name for name, count in counts.items() if count > 0.9 * len(values)), "other")


def _has_words(value: Any) -> bool:
    return isinstance(value, str) and bool(re.search(r"[^\W\d_].*\s.*[^\W\d_]", value, re.DOTALL))


def _plain(name: str) -> str:
    """Return a column's name without case, white space and punctuation."""
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", str(name)).casefold())
