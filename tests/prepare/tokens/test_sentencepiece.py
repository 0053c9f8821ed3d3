"""Rows of SentencePiece tokenizers, token by token, against transformers.

The tokenizers are trained here, with the pipelines that Llama 2, Mistral 7B v0.1 and Gemma have:
white space becomes a mark that may be put before a text, and rare characters become bytes.
"""

import io
from dataclasses import dataclass
from typing import Any

import pytest
import sentencepiece
from template_families import TEMPLATES, answer, user
from tokenizers import normalizers
from transformers import GemmaTokenizer, LlamaTokenizer
from transformers.convert_slow_tokenizer import generate_merges

from tuneline.prepare.formats.example import Example
from tuneline.prepare.tokens.byte_level import find_byte_level
from tuneline.prepare.tokens.heads import Heads
from tuneline.prepare.tokens.render import Renderer
from tuneline.prepare.tokens.tokenise import tokenise

LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}{% else %}"
    "{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}"
    "{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Model:
    template: str
    end: str
    tokenizer_class: Any
    prefix: bool
    """Whether a mark of white space is put before a text."""
    legacy: bool = False
    """Whether the normalizer does that, as in the published tokenizer.json of Llama 2."""


MODELS = {
    "llama-2": Model(LLAMA2, "</s>", LlamaTokenizer, prefix=True, legacy=True),
    "mistral-v0.1": Model(MISTRAL, "</s>", LlamaTokenizer, prefix=True),
    "gemma": Model(
        (TEMPLATES / "gemma.jinja").read_text(encoding="utf-8"),
        "<end_of_turn>",
        GemmaTokenizer,
        prefix=False,
    ),
}
ANSWERS = [
    "It is 4.",
    "48/2 = 24, so Natalia sold 24 clips in May.\n#### 72",
    "두 수의 합은 4입니다.",
    "def add(a, b):\n    return a + b\n\n\tdone",
    "a  b   c \U0001f600 caf\u00e9 cafe\u0301",
    "x",
    "[INST] is not a token here",
]
CORPUS = [
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many in May.",
    "[INST] How many clips did she sell? [/INST] She sold 48/2 = 24 clips in May.",
    "user\nHow much is 2 + 2?\nmodel\nIt is 4.\n#### 72",
    "def add(a, b):\n    return a + b",
]


@pytest.fixture(scope="module", params=MODELS)
def trained(request: pytest.FixtureRequest) -> tuple[Model, Any]:
    model, file = MODELS[request.param], io.BytesIO()
    symbols = [] if model.prefix else ["<start_of_turn>", "<end_of_turn>"]
    marks = {} if model.prefix else {"bos_piece": "<bos>", "eos_piece": "<eos>"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_writer=file,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.999,
        add_dummy_prefix=model.prefix,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=symbols,
        num_threads=1,
        minloglevel=2,
        **marks,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())
    names = [pieces.id_to_piece(number) for number in range(len(pieces))]
    vocab = {name: number for number, name in enumerate(names)}
    scores = {name: pieces.get_score(number) for number, name in enumerate(names)}
    tokenizer = model.tokenizer_class(vocab=vocab, merges=generate_merges(vocab, scores))
    tokenizer.add_tokens(symbols, special_tokens=True)
    if model.legacy:
        tokenizer.backend_tokenizer.pre_tokenizer = None
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    tokenizer.chat_template = model.template
    return model, tokenizer


@pytest.mark.parametrize("text", ANSWERS)
def test_rows_are_those_of_apply_chat_template(trained: tuple[Model, Any], text: str) -> None:
    model, tokenizer = trained
    assert find_byte_level(tokenizer, Heads(tokenizer)) is None
    messages = [
        user("How much is 2 + 2?"),
        answer("It is 4."),
        user("How many clips did  she sell?\n"),
        answer(text),
    ]
    rendered = Renderer(tokenizer).render(Example(messages=messages))
    (row,) = tokenise(tokenizer, [rendered], loss_on="answers")
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert tokenizer.apply_chat_template(messages)["input_ids"] == ids
    assert row.input_ids == ids[: len(row.input_ids)]
    assert not tokenizer.decode(ids[len(row.input_ids) :]).strip()
    # The model is asked with exactly the tokens before an answer, and learns exactly the rest.
    for index in (1, 3):
        prompt = tokenizer.apply_chat_template(
            messages[:index], tokenize=False, add_generation_prompt=True
        )
        before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert row.input_ids[: len(before)] == before
        assert row.loss_mask[len(before) - 1 : len(before) + 1] == [0, 1]
    learnt = [n for n, bit in enumerate(row.loss_mask) if bit and n >= len(before)]
    assert learnt == list(range(len(before), learnt[-1] + 1))
    last = tokenizer.decode([row.input_ids[n] for n in learnt])
    assert last.removesuffix(model.end).strip() == text.strip()
    assert last.endswith(model.end)
