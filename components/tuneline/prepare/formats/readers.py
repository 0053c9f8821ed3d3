"""One reader function per row format; each checks a row and returns an `Example`."""

from tuneline.prepare.formats import tools
from tuneline.prepare.formats.checks import (
    as_list,
    check_unicode,
    describe_type,
    has_value,
    is_blank,
    parse_json,
    read_string,
    read_text,
)
from tuneline.prepare.formats.conversation import (
    assistant,
    check_conversation,
    find_messages,
    read_messages,
    take_excluded,
    user,
    with_system,
)
from tuneline.prepare.formats.example import BadRowError, Example, Message
from tuneline.prepare.formats.message import EXCLUDED, add_reasoning
from tuneline.prepare.formats.reading import REASONING, Reading, Row
from tuneline.prepare.formats.refusals import is_reasoning


def read_alpaca(row: Row, reading: Reading) -> Example:
    """Read an instruction with an optional input and earlier turns, and its output."""
    question = user(read_instruction(row, reading))
    answer = _answer_text(row, "output", reading)
    return _conversation(row, reading, [*read_history(row), question, answer])


def read_prompt_completion(row: Row, reading: Reading) -> Example:
    """Read a prompt and its completion: texts or lists of messages. The prompt is not learnt."""
    prompt = [*read_history(row), *read_prompt(row, reading)]
    return _conversation(row, reading, [*prompt, *read_completion(row, reading)])


def read_conversation(row: Row, reading: Reading) -> Example:
    """Read a list of messages under `messages`."""
    return _conversation(row, reading, read_messages(row, "messages", reading))


def read_sharegpt(row: Row, reading: Reading) -> Example:
    """Read a list of messages under `conversations`."""
    return _conversation(row, reading, read_messages(row, "conversations", reading))


def read_document(row: Row, reading: Reading) -> Example:
    """Read a text for continued pre-training."""
    return Example(text=read_text(row, "text"))


def read_instruction(row: Row, reading: Reading) -> str:
    """Return the question of the alpaca format: the instruction, and the input if there is one."""
    extra = "" if row.get("input") is None else read_string(row, "input")
    if is_blank(extra):
        return read_text(row, "instruction")
    if not has_value(row.get("instruction")):
        return extra
    return read_text(row, "instruction") + reading.input_heading + extra


def read_history(row: Row) -> list[Message]:
    """Return the earlier turns of the alpaca format: a list of pairs of a question and an answer.

    Like LLaMA-Factory, tuneline learns the answers of these turns.
    """
    value = row.get("history")
    if isinstance(value, str) and value.strip():
        value = parse_json(value, "history")
    if not has_value(value):
        return []
    messages = []
    for number, pair in enumerate(as_list(value) or [None], 1):
        turn = as_list(pair)
        if turn is None or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            shown = describe_type(value if as_list(value) is None else pair)
            raise BadRowError(
                f"history {number} is {shown}, not a pair of a question and an answer, both text"
            )
        messages += [user(turn[0]), assistant(turn[1])]
    return messages


def read_prompt(row: Row, reading: Reading) -> list[Message]:
    """Return the messages of the column `prompt`; answers in it are not learnt."""
    if _is_text(row, "prompt"):
        return [user(read_text(row, "prompt"))]
    messages = read_messages(row, "prompt", reading)
    for message in messages:
        if message["role"] == "assistant":
            message[EXCLUDED] = True
    return messages


def read_completion(row: Row, reading: Reading) -> list[Message]:
    """Return the messages of the column `completion`, with the reasoning in another column."""
    if _is_text(row, "completion"):
        return [_answer_text(row, "completion", reading)]
    messages = read_messages(row, "completion", reading)
    _add_reasoning(row, messages[-1], "completion", reading)
    return messages


def _is_text(row: Row, name: str) -> bool:
    """Return whether a column is to be read as text, not as messages.

    JSON text of a list of messages is read as messages only if prompt and completion both are
    messages, because a plain question can have such a text as its answer.
    """
    if not isinstance(row.get(name), str):
        return find_messages(row.get(name)) is None
    return any(find_messages(row.get(column)) is None for column in ("prompt", "completion"))


def _answer_text(row: Row, name: str, reading: Reading) -> Message:
    """Return the answer in a column of text, with the reasoning in another column."""
    message = assistant(read_text(row, name))
    _add_reasoning(row, message, name, reading)
    return message


def _add_reasoning(row: Row, message: Message, name: str, reading: Reading) -> None:
    thoughts = [message["reasoning"]] if "reasoning" in message else []
    for key in REASONING:
        if is_reasoning(row.get(key)):
            thoughts.append(row[key])
        elif has_value(row.get(key)):
            reading.leave(key)
    if message["role"] == "assistant":
        add_reasoning(message, thoughts, name)


def read_system(row: Row, messages: list[Message], reading: Reading) -> list[Message]:
    """Return the messages with the row's or the recipe's system message, unless they have one."""
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise BadRowError(f"system is {describe_type(system)}, not text")
    if system and messages[0]["role"] == "system" and messages[0]["content"] != system:
        reading.leave("system", "the messages begin with another system message")
    return with_system(messages, system or reading.system_prompt)


def _conversation(row: Row, reading: Reading, messages: list[Message]) -> Example:
    messages = read_system(row, messages, reading)
    check_conversation(messages)
    not_learnt = take_excluded(messages)
    answers = {index for index, message in enumerate(messages) if message["role"] == "assistant"}
    if answers <= not_learnt:
        raise BadRowError("every answer is excluded from the loss (weight 0 or train false)")
    return Example(
        messages=messages,
        not_learnt=not_learnt,
        tools=tools.read_tools(row, messages, reading),
        choices=_choices(row, messages[-1]["content"], reading),
    )


def _choices(row: Row, answer: str, reading: Reading) -> list[str] | None:
    """Return the column `choices` if it lists answers; some datasets use that name differently."""
    if not has_value(row.get("choices")):
        return None
    choices = as_list(row["choices"])
    if not choices or answer not in choices or not all(isinstance(text, str) for text in choices):
        reading.leave("choices", "does not list the answer")
        return None
    for choice in choices:
        check_unicode(choice, "a choice")
    return choices
