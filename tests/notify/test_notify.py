"""Messages reach a webhook in its shape, and no failure of it is more than a sentence."""

import logging
from typing import Any

import pytest
from small_records import new_comparison
from tests.notify.webhook_server import WebhookServer

from tuneline.errors import RecipeError
from tuneline.notify import NotifyConfig
from tuneline.notify.message import (
    Message,
    decode_scores,
    encode_scores,
    payload,
    scores_of,
)
from tuneline.notify.send import send
from tuneline.runtime import retries
from tuneline.runtime.termination import MAX_BYTES, Ending, decode, encode

GAIN = new_comparison(base=0.26, tuned=0.64, difference=0.38, num_changed=90)
MESSAGE = Message(
    event="promoted",
    run="demo-1",
    recipe="demo",
    text="Right answers rose from 26 % to 64 % & more <b>.",
    scores=scores_of([GAIN, new_comparison(role="control")]),
    links={"report": "/runs/demo-1/report.html"},
)
FAILURE = Message(
    event="failed",
    run="demo-2",
    recipe="demo",
    text="The GPU ran out of memory.",
    step="train",
    cause="The GPU ran out of memory.",
    advice="Set train.micro_batch_size to 1.",
)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "MAX_PAUSE_SECONDS", 0.01)


def test_json_has_every_field() -> None:
    assert (
        payload(MESSAGE, "json").items()
        >= {
            "event": "promoted",
            "run": "demo-1",
            "recipe": "demo",
            "title": "demo-1: promoted",
            "text": MESSAGE.text,
            "links": {"report": "/runs/demo-1/report.html"},
            "scores": [
                {
                    "task": "heldout_choice",
                    "metric": "acc",
                    "base": 0.26,
                    "tuned": 0.64,
                    "text": "26 % -> 64 % (+38)",
                }
            ],
        }.items()
    )
    failed = payload(FAILURE, "json")
    assert (failed["step"], failed["title"]) == ("train", "demo-2: failed at train")
    assert failed["advice"] == "Set train.micro_batch_size to 1."


def test_slack_gets_text_and_blocks_without_control_sequences() -> None:
    message = Message(event="held", run="<!channel>", recipe="r", text="a & b", scores=[])
    body = payload(message, "slack")
    assert set(body) == {"text", "blocks"}
    (block,) = body["blocks"]
    assert (block["type"], block["text"]["type"]) == ("section", "mrkdwn")
    assert block["text"]["text"] == "*&lt;!channel&gt;: on hold*\na &amp; b"
    assert "<" not in body["text"]
    long = payload(Message(event="failed", run="r", recipe="r", text="x" * 9000), "slack")
    assert len(long["blocks"][0]["text"]["text"]) <= 3000


def test_teams_gets_an_adaptive_card() -> None:
    body = payload(FAILURE, "teams")
    (attachment,) = body["attachments"]
    assert body["type"] == "message"
    assert attachment["contentType"] == "application/vnd.microsoft.card.adaptive"
    card = attachment["content"]
    assert (card["type"], card["version"]) == ("AdaptiveCard", "1.4")
    assert [item["text"] for item in card["body"]] == [
        "demo-2: failed at train",
        "The GPU ran out of memory.",
        "Set train.micro_batch_size to 1.",
    ]
    facts = payload(MESSAGE, "teams")["attachments"][0]["content"]["body"][-1]
    assert facts["facts"][0] == {"title": "heldout_choice", "value": "26 % -> 64 % (+38)"}


def webhook(**values: Any) -> NotifyConfig:
    return NotifyConfig.model_validate({"webhook": "MY_WEBHOOK", **values})


def test_a_message_is_posted_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    with WebhookServer() as server:
        monkeypatch.setenv("MY_WEBHOOK", server.url)
        assert send([webhook(), webhook(format="slack", events=["failed"])], MESSAGE) == []
        assert send([webhook(format="slack", events=["failed"])], FAILURE) == []
    assert [set(body) >= {"blocks"} for body in server.bodies] == [False, True]
    assert server.headers[0]["Content-Type"] == "application/json"


def test_a_busy_server_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with WebhookServer([503, 429, 200]) as server:
        monkeypatch.setenv("MY_WEBHOOK", server.url)
        assert send([webhook()], MESSAGE) == []
    assert len(server.bodies) == 3


@pytest.mark.parametrize(
    ("statuses", "num_requests", "words"),
    [
        ((404,), 1, "The webhook in MY_WEBHOOK was not told: the server answered 404."),
        ((302,), 1, "the server answered 302."),
        ((500,), 4, "the server answered 500, after 4 attempts"),
    ],
)
def test_a_refusal_is_a_sentence_without_the_url(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    statuses: tuple[int, ...],
    num_requests: int,
    words: str,
) -> None:
    caplog.set_level(logging.INFO)
    with WebhookServer(statuses) as server:
        monkeypatch.setenv("MY_WEBHOOK", server.url)
        (problem,) = send([webhook()], MESSAGE)
    assert words in problem and len(server.bodies) == num_requests
    assert server.secret not in problem + caplog.text


def test_a_server_that_is_away_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("MY_WEBHOOK", "http://127.0.0.1:1/services/s3cr3tpath")
    (problem,) = send([webhook()], MESSAGE)
    assert "after 4 attempts" in problem and "s3cr3tpath" not in problem + caplog.text


@pytest.mark.parametrize("value", ["", "hooks.slack.com/services/x", "file:///etc/passwd"])
def test_a_variable_without_a_url_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("MY_WEBHOOK", value)
    (problem,) = send([webhook()], MESSAGE)
    assert "MY_WEBHOOK is not set" in problem or "no URL" in problem


def test_a_url_in_a_recipe_is_refused_without_being_repeated() -> None:
    url = "https://hooks.slack.com/services/T012/B345/s3cr3tpath"
    with pytest.raises(RecipeError) as refused:
        NotifyConfig.parse({"webhook": url})
    assert "the name of an environment variable" in str(refused.value)
    assert "s3cr3tpath" not in str(refused.value)


def test_scores_travel_in_a_termination_message() -> None:
    scores = scores_of([GAIN] * 12)
    ending = Ending(step="report", result="promote", text="x" * 600, scores=encode_scores(scores))
    read = decode(encode(ending))
    assert read is not None and decode_scores(read.scores) == scores[:8]
    long = decode(encode(Ending(step="report", text="x" * 5000, scores=encode_scores(scores))))
    assert long is not None and decode_scores(long.scores) == []
    assert len(encode(ending).encode()) <= MAX_BYTES
