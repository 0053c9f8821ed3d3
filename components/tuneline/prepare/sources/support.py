"""Rows of a shop's customer service, generated from a seed, in English and in Korean.

The shipped recipes support-answers, support-preferences and support-documents use them. Order
numbers, products and wordings are drawn for every row. Each answer names its question's order, so a
model has to read the question, and no held-out question is in the training rows.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_LANGUAGES = ("en", "ko")


@dataclass(frozen=True)
class _Topic:
    """What customers ask about, with {order} and {product} in the texts; by language."""

    questions: dict[str, tuple[str, ...]]
    answer: dict[str, str]


_PRODUCTS = {
    "en": (
        "kettle",
        "toaster",
        "rice cooker",
        "air fryer",
        "blender",
        "desk lamp",
        "fan",
        "heater",
    ),
    "ko": ("주전자", "토스터", "밥솥", "튀김기", "믹서기", "스탠드", "선풍기", "난로"),
}
_OPENINGS = {
    "en": ("", "Hello. ", "Good morning. ", "Hi, a question: ", "Dear team, "),
    "ko": ("", "안녕하세요. ", "문의드립니다. ", "질문이 있어요. ", "수고 많으십니다. "),
}
_TOPICS = {
    "delivery": _Topic(
        {
            "en": ("Where is order {order}?", "When will order {order} with the {product} come?"),
            "ko": ("주문 {order} 어디쯤 왔나요?", "주문 {order} {product} 언제 도착하나요?"),
        },
        {
            "en": "Order {order} is on its way. Follow it under My orders, Track.",
            "ko": "주문 {order} 배송 중입니다. 내 주문의 배송 조회에서 확인해 주세요.",
        },
    ),
    "cancel": _Topic(
        {
            "en": ("Please cancel order {order}.", "I no longer need the {product} of {order}."),
            "ko": ("주문 {order} 취소해 주세요.", "{order} {product} 이제 필요 없어요."),
        },
        {
            "en": "Order {order} is cancelled. The money is back within three days.",
            "ko": "주문 {order} 취소했습니다. 환불은 사흘 안에 됩니다.",
        },
    ),
    "return": _Topic(
        {
            "en": ("How do I send back the {product} of {order}?", "Return of order {order}?"),
            "ko": ("{order} {product} 반품하고 싶어요.", "주문 {order} 반품은 어떻게 하나요?"),
        },
        {
            "en": "Print the label for order {order} under Returns within 30 days.",
            "ko": "30일 안에 반품 메뉴에서 주문 {order} 라벨을 출력해 주세요.",
        },
    ),
    "broken": _Topic(
        {
            "en": ("The {product} of order {order} is broken.", "Order {order} came damaged."),
            "ko": ("주문 {order} {product} 고장 났어요.", "주문 {order} 파손되어 왔어요."),
        },
        {
            "en": "We are sorry. A replacement for order {order} leaves today.",
            "ko": "죄송합니다. 주문 {order} 교환품을 오늘 보내 드립니다.",
        },
    ),
    "invoice": _Topic(
        {
            "en": ("I need the invoice of {order}.", "Can you send a receipt for order {order}?"),
            "ko": ("주문 {order} 영수증 보내 주세요.", "{order} 세금계산서가 필요합니다."),
        },
        {
            "en": "The invoice of order {order} is under My orders, Documents.",
            "ko": "주문 {order} 영수증은 내 주문의 서류에 있습니다.",
        },
    ),
    "address": _Topic(
        {
            "en": ("Order {order} has the wrong address.", "I moved. What about order {order}?"),
            "ko": ("주문 {order} 주소가 틀렸어요.", "이사했어요. 주문 {order} 어떻게 되나요?"),
        },
        {
            "en": "Change the address of order {order} under My orders before it ships.",
            "ko": "발송 전에 내 주문에서 주문 {order} 주소를 바꿔 주세요.",
        },
    ),
}
_REJECTED = {
    "en": (
        "That is on the website.",
        "I do not know. Call somebody else.",
        "You should have read the terms before you ordered.",
    ),
    "ko": (
        "홈페이지에 다 나와 있습니다.",
        "모르겠네요. 다른 데 전화해 보세요.",
        "주문하기 전에 약관을 읽으셨어야죠.",
    ),
}
_PARAGRAPHS = {
    "en": (
        "The {product}, model {order}, comes with a warranty of {years} years.",
        "Before the first use of model {order}, rinse the {product} with warm water.",
        "If model {order} does not start, unplug the {product} for {minutes} minutes.",
        "Clean the {product} every {weeks} weeks, and never put model {order} into water.",
        "Spare parts of model {order} are sent within {weeks} weeks.",
        "Customers may return the {product} within 30 days, with the invoice.",
        "Model {order} needs {minutes} minutes until it is warm.",
        "Service calls about the {product} are answered within {years} working days.",
    ),
    "ko": (
        "{product} {order} 모델의 보증 기간은 {years}년입니다.",
        "{order} 모델을 처음 쓰기 전에 {product} 안쪽을 따뜻한 물로 헹구십시오.",
        "{order} 모델이 켜지지 않으면 {product} 전원을 {minutes}분 동안 뽑아 두십시오.",
        "{product} 청소는 {weeks}주마다 하고 {order} 모델을 물에 담그지 마십시오.",
        "{order} 모델의 부품은 {weeks}주 안에 보내 드립니다.",
        "{product} 반품은 영수증과 함께 30일 안에 가능합니다.",
        "{order} 모델은 예열에 {minutes}분이 걸립니다.",
        "{product} 수리 문의는 영업일 {years}일 안에 답변드립니다.",
    ),
}

NUM_ANSWERS, NUM_PREFERENCES, NUM_DOCUMENTS = 600, 400, 240
NUM_HELDOUT = 120
"""Number of rows at the end of each dataset that are meant to be held out."""


def answers(seed: int = 3407) -> Iterator[dict[str, Any]]:
    """Yield questions of customers with the shop's answers, in equal parts English and Korean.

    Yields:
        {"question": text, "answer": text, "language": "en" or "ko"}.
    """
    for question in _questions(random.Random(seed), NUM_ANSWERS + NUM_HELDOUT):
        yield {
            "question": question.text,
            "answer": question.answer,
            "language": question.language,
        }


def preferences(seed: int = 3408) -> Iterator[dict[str, Any]]:
    """Yield questions with a helpful answer and one that is rude or in the wrong language.

    Yields:
        {"prompt": question, "chosen": text, "rejected": text}.
    """
    rng = random.Random(seed)
    for question in _questions(rng, NUM_PREFERENCES + NUM_HELDOUT):
        yield {
            "prompt": question.text,
            "chosen": question.answer,
            "rejected": rng.choice((*_REJECTED[question.language], question.in_other_language)),
        }


def documents(seed: int = 3409) -> Iterator[dict[str, Any]]:
    """Yield pages of the shop's handbook: five sentences about a model, in one language.

    Yields:
        {"text": page}.
    """
    rng = random.Random(seed)
    for index in range(NUM_DOCUMENTS + NUM_HELDOUT):
        language = _LANGUAGES[index % 2]
        values = {
            "product": rng.choice(_PRODUCTS[language]),
            "order": rng.randrange(10000, 100000),
            "years": rng.randrange(2, 6),
            "weeks": rng.randrange(2, 9),
            "minutes": rng.randrange(2, 30),
        }
        sentences = rng.sample(_PARAGRAPHS[language], 5)
        yield {"text": " ".join(sentence.format(**values) for sentence in sentences)}


@dataclass(frozen=True)
class _Question:
    text: str
    answer: str
    language: str
    in_other_language: str
    """The answer in the language that the customer did not use."""


def _questions(rng: random.Random, count: int) -> Iterator[_Question]:
    """Yield questions about different orders, so that no two are the same."""
    orders = rng.sample(range(10000, 100000), count)
    for index, order in enumerate(orders):
        language, other = _LANGUAGES if index % 2 == 0 else _LANGUAGES[::-1]
        topic = rng.choice(list(_TOPICS.values()))
        values = {"order": order, "product": rng.choice(_PRODUCTS[language])}
        opening = rng.choice(_OPENINGS[language])
        yield _Question(
            text=opening + rng.choice(topic.questions[language]).format(**values),
            answer=topic.answer[language].format(**values),
            language=language,
            in_other_language=topic.answer[other].format(**values),
        )
