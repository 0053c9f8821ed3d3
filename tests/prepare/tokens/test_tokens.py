"""Token rows against the template written out by hand, and the loss mask against the answer."""

import re
from typing import Any, get_args

import pytest

from tuneline.errors import DataError
from tuneline.prepare.config import PrepareConfig
from tuneline.prepare.formats.example import BadRowError, Example
from tuneline.prepare.tokens import templates
from tuneline.prepare.tokens.render import Answer, Piece, Renderer
from tuneline.prepare.tokens.tokenise import answer_spans, tokenise

SMOLLM_SYSTEM = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n"
)


def chat(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def learnt(tokenizer: Any, row: Any) -> list[str]:
    """The runs of tokens that the loss counts, decoded."""
    runs: list[list[int]] = []
    previous = 0
    for token, mask in zip(row.input_ids, row.loss_mask, strict=True):
        if mask and not previous:
            runs.append([])
        if mask:
            runs[-1].append(token)
        previous = mask
    return [tokenizer.decode(run) for run in runs]


@pytest.fixture
def fresh(tokenizer: Any) -> Any:
    """A tokenizer whose template a test may change."""
    import copy

    return copy.deepcopy(tokenizer)


def rows_of(tokenizer: Any, messages: list[dict[str, str]], loss_on: str = "answers") -> list[Any]:
    rendered = Renderer(tokenizer).render(Example(messages=messages))
    return list(tokenise(tokenizer, [rendered], loss_on=loss_on))


def test_row_is_the_template_written_by_hand(prepare, tokenizer) -> None:
    row = prepare([{"prompt": "How much is 2 + 2?", "completion": "It is 4."}]).rows()[0]
    before = (
        SMOLLM_SYSTEM + "<|im_start|>user\nHow much is 2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    )
    by_hand = before + "It is 4.<|im_end|>\n"
    assert row["input_ids"] == tokenizer(by_hand, add_special_tokens=False)["input_ids"]
    num_before = len(tokenizer(before, add_special_tokens=False)["input_ids"])
    num_answer = len(tokenizer("It is 4.<|im_end|>", add_special_tokens=False)["input_ids"])
    # The line feed behind <|im_end|> is not learnt: nothing is generated behind an end of turn.
    assert row["loss_mask"] == [0] * num_before + [1] * num_answer + [0]


@pytest.mark.parametrize(
    "answer",
    [
        "4",
        "  indented\n\n\tand more",
        "\ud55c\uad6d\uc5b4 \ub2f5",
        "\U0001f600 ok",
        "a\n\n\n",
        "x <|im_end|> y",
    ],
)
def test_mask_covers_exactly_the_answer_and_its_end(tokenizer, answer: str) -> None:
    (row,) = rows_of(tokenizer, chat("Question 12?", answer))
    assert learnt(tokenizer, row) == [answer + "<|im_end|>"]
    # And before it stands what the model is given at inference, token by token.
    prompt = tokenizer.apply_chat_template(
        chat("Question 12?"), add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert row.input_ids[: len(ids)] == ids
    assert row.loss_mask[: len(ids)] == [0] * len(ids)


def test_every_turn_of_a_conversation_is_learnt(tokenizer) -> None:
    (row,) = rows_of(tokenizer, chat("One?", "First.", "Two?", "Second answer.", "Three?", "3"))
    assert learnt(tokenizer, row) == ["First.<|im_end|>", "Second answer.<|im_end|>", "3<|im_end|>"]
    (everything,) = rows_of(tokenizer, chat("One?", "First."), loss_on="all")
    assert everything.loss_mask == [1] * len(everything.input_ids)


TEMPLATE_FIELD = PrepareConfig.model_fields["template"]


@pytest.mark.parametrize("name", sorted(set(get_args(TEMPLATE_FIELD.annotation)) - {"tokenizer"}))
def test_every_template_that_a_recipe_may_name_learns_every_turn(fresh, name: str) -> None:
    template = templates.TEMPLATES[name]
    assert f"{name}: {template.summary}." in TEMPLATE_FIELD.description
    end = template.end_of_turn or fresh.eos_token
    fresh.add_tokens([end, *template.other_tokens], special_tokens=True)
    templates.use_template(fresh, name)
    written = rows_of(fresh, chat("One?", "First."))[0]
    assert all(
        fresh.convert_tokens_to_ids(token) in written.input_ids for token in template.other_tokens
    )
    system = {"role": "system", "content": "Be brief."}
    turns = chat("One?", "First.", "Two?", "First.", "Three?", "3")
    (row,) = rows_of(fresh, [system, *turns])
    assert learnt(fresh, row) == ["First." + end, "First." + end, "3" + end]
    text = fresh.decode(row.input_ids)
    assert text.count(system["content"]) == 1
    assert text.index(system["content"]) < text.index("One?")


MARKER = re.compile(r"<\|.+?\|>|<[a-z_/]+>|\[/?[A-Z_]+\]")


def test_what_is_a_marker() -> None:
    text = "<|im_start|>a<start_of_turn>[INST] b [/INST]</s>{{ messages[0]['role'] + c }}"
    assert MARKER.findall(text) == ["<|im_start|>", "<start_of_turn>", "[INST]", "[/INST]", "</s>"]


@pytest.mark.parametrize("name", templates.TEMPLATES)
def test_a_template_declares_the_markers_that_it_writes(name: str) -> None:
    template = templates.TEMPLATES[name]
    declared = {*template.other_tokens, *filter(None, [template.end_of_turn])}
    assert set(MARKER.findall(template.text)) == declared


def test_a_template_whose_end_of_turn_the_tokenizer_lacks(fresh) -> None:
    with pytest.raises(DataError, match=r"llama3 needs the tokens .*<\|eot_id\|>.* alpaca or tok"):
        templates.use_template(fresh, "llama3")
    fresh.eos_token = None
    with pytest.raises(DataError, match="template alpaca ends an answer with the end-of-sequence"):
        templates.use_template(fresh, "alpaca")


def test_heldout_row_asks_for_the_last_answer(tokenizer) -> None:
    messages = chat("One?", "First.", "Two?", "Second.")
    row = (
        Renderer(tokenizer)
        .render(Example(messages=messages, choices=["Third.", "Second."]))
        .heldout_row()
    )
    assert row == {
        "prompt": SMOLLM_SYSTEM + "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\nFirst."
        "<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n",
        "answer": "Second.",
        "end": "<|im_end|>",
        "choices": ["Third.", "Second."],
        "label": 1,
        "question": "Two?",
    }


def test_template_that_rewrites_earlier_turns_gets_a_row_an_answer(fresh) -> None:
    # Like the reasoning models: what was thought in earlier turns is left out.
    fresh.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
        "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}"
        "{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    rows = rows_of(fresh, chat("One?", "<think>a</think>First.", "Two?", "<think>b</think>Second."))
    assert [learnt(fresh, row) for row in rows] == [
        ["<think>a</think>First.<|im_end|>"],
        ["<think>b</think>Second.<|im_end|>"],
    ]
    # The second row has the first answer as the model will see it then.
    assert "assistant\nFirst.<|im_end|>" in fresh.decode(rows[1].input_ids)


def test_generation_prompt_that_opens_reasoning_is_kept_and_closed(fresh) -> None:
    fresh.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] }}"
        "{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
    )
    (row,) = rows_of(fresh, chat("One?", "First."))
    assert fresh.decode(row.input_ids) == (
        "<|im_start|>user\nOne?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nFirst.<|im_end|>\n"
    )
    assert learnt(fresh, row) == ["First.<|im_end|>"]


def test_template_that_puts_a_space_before_the_answer(fresh) -> None:
    fresh.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"
    )
    example = Example(messages=chat("One?", "First. "), choices=["First. ", "No."])
    rendered = Renderer(fresh).render(example)
    assert rendered.heldout_row() == {
        "prompt": "[INST] One? [/INST]",
        "answer": " First.",
        "end": "<|im_end|>",
        "choices": [" First. ", " No."],
        "label": 0,
        "question": "One?",
    }
    (row,) = tokenise(fresh, [rendered], loss_on="answers")
    assert learnt(fresh, row) == [" First.<|im_end|>"]


def test_template_that_refuses_a_role_rejects_the_row(fresh) -> None:
    fresh.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    messages = [{"role": "system", "content": "x"}, *chat("One?", "First.")]
    with pytest.raises(BadRowError, match="refuses the row: System role not supported"):
        Renderer(fresh).render(Example(messages=messages))


def test_answers_with_trimmed_offsets_and_split_characters() -> None:
    # "Q: ab" + " cd" + end: tokens "Q:", " ab" (trimmed), " " alone (trimmed to nothing), "c",
    # one character as two tokens, end.
    piece = Piece("Q: ab  c\u20ac!\n", [Answer(start=5, content_end=9, end=10)])
    offsets = [(0, 2), (3, 5), (6, 6), (7, 8), (8, 9), (8, 9), (9, 10), (10, 11)]
    assert answer_spans(piece, len(offsets), offsets.__getitem__) == [(2, 7)]
    # A token over the border of prompt and answer.
    offsets = [(0, 2), (3, 6), (7, 10), (10, 11)]
    assert answer_spans(piece, len(offsets), offsets.__getitem__) is None


ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\nAdd.\n\n{}### Response:\n"
)


@pytest.mark.parametrize(
    ("row", "before"),
    [
        ({"input": ""}, ALPACA.format("", "")),
        (
            {"input": "2, 2"},
            ALPACA.format(
                ", paired with an input that provides further context", "### Input:\n2, 2\n\n"
            ),
        ),
        ({"system": "Be brief."}, "Be brief.\n\n### Instruction:\nAdd.\n\n### Response:\n"),
    ],
)
def test_alpaca_template(prepare, tokenizer, row: dict, before: str) -> None:
    done = prepare([{"instruction": "Add.", "output": "4", **row}], template="alpaca")
    assert tokenizer.decode(done.rows()[0]["input_ids"]) == before + "4<|im_end|>"
    assert sum(done.rows()[0]["loss_mask"]) == 2
    assert (done.manifest.template, done.manifest.end_of_turn) == ("alpaca", "<|im_end|>")
    assert (done.path / "chat_template.jinja").read_text() == templates.TEMPLATES["alpaca"].text


def test_chatml_has_no_system_message_of_its_own(prepare, tokenizer) -> None:
    row = {"prompt": "One?", "completion": "First."}
    bare = "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\nFirst.<|im_end|>\n"
    for config in ({}, {"system_prompt": ""}):
        done = prepare([row], template="chatml", **config)
        assert tokenizer.decode(done.rows()[0]["input_ids"]) == bare
    with_system = prepare([row], template="chatml", system_prompt="Be brief.").rows()[0]
    assert tokenizer.decode(with_system["input_ids"]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n" + bare
    )


def test_empty_system_prompt_keeps_the_default_away(prepare, tokenizer) -> None:
    row = {"prompt": "One?", "completion": "First."}
    done = prepare([row], system_prompt="")
    assert tokenizer.decode(done.rows()[0]["input_ids"]).startswith(
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nOne?"
    )
    assert not (done.path / "chat_template.jinja").exists()


def test_llama3_template(fresh) -> None:
    fresh.add_special_tokens({"additional_special_tokens": ["<|eot_id|>", "<|begin_of_text|>"]})
    fresh.add_tokens(["<|start_header_id|>", "<|end_header_id|>"], special_tokens=True)
    templates.use_template(fresh, "llama3")
    (row,) = rows_of(fresh, chat("One?", " First.\n"))
    assert fresh.decode(row.input_ids) == (
        "<|start_header_id|>user<|end_header_id|>\n\nOne?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nFirst.<|eot_id|>"
    )
    assert learnt(fresh, row) == ["First.<|eot_id|>"]


def test_bos_stands_in_front_where_the_tokenizer_puts_it(fresh) -> None:
    from tokenizers.processors import TemplateProcessing

    fresh.bos_token = "<|endoftext|>"
    fresh.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", fresh.bos_token_id)]
    )
    templates.use_template(fresh, "alpaca")
    (row,) = rows_of(fresh, chat("One?", "First."))
    assert row.input_ids[0] == fresh.bos_token_id
    assert fresh.bos_token_id not in row.input_ids[1:]


def test_dpo_rows(prepare, tokenizer) -> None:
    done = prepare([{"prompt": "2 + 2?", "chosen": "It is 4.", "rejected": "5"}], method="dpo")
    before = SMOLLM_SYSTEM + "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    assert done.rows() == [
        {
            "prompt_ids": ids(before),
            "chosen_ids": ids("It is 4.<|im_end|>"),
            "rejected_ids": ids("5<|im_end|>"),
        }
    ]
    assert done.manifest.format == "preference"
    assert done.manifest.num_loss_tokens == len(ids("It is 4.<|im_end|>")) + 2


def test_cpt_documents_end_and_lose_nothing(prepare, tokenizer) -> None:
    text = "A longer document with number 12345. " * 10
    done = prepare([{"text": text}], method="cpt", max_seq_length=16)
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    pieces = [row["input_ids"] for row in done.rows()]
    assert [token for piece in pieces for token in piece] == ids[: sum(map(len, pieces))]
    assert len(ids) - sum(map(len, pieces)) <= 1
    assert all(len(piece) == 16 for piece in pieces[:-1])
    assert all(row["loss_mask"] == [1] * len(row["input_ids"]) for row in done.rows())
    assert done.manifest.template == "none"
