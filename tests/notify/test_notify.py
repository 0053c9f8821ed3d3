"""Messages reach a webhook in its shape, and no failure of it is more than a sentence."""

import logging
import shutil
import socket
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import urllib3
from prometheus_client.parser import text_string_to_metric_families
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


def families(text: str) -> dict[str, dict[tuple[str, ...], float]]:
    """The metrics of a text, by name and values of labels, as Prometheus's client reads them."""
    return {
        family.name: {tuple(each.labels.values()): each.value for each in family.samples}
        for family in text_string_to_metric_families(text)
    }


def test_a_pushgateway_gets_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    before = time.time()
    with WebhookServer() as server:
        monkeypatch.setenv("MY_WEBHOOK", f"{server.url}/")
        timed = replace(MESSAGE, run='a "quoted" \\ run', seconds=72.5)
        assert send([webhook(format="prometheus")], timed) == []
        assert send([webhook(format="prometheus")], FAILURE) == []
    assert server.paths == [f"/services/{server.secret}/metrics/job/tuneline/recipe/demo"] * 2
    assert server.headers[0]["Content-Type"].startswith("text/plain; version=0.0.4")
    good, failed = map(families, server.bodies)
    outcomes = {("promoted",): 1.0, ("held",): 0.0, ("failed",): 0.0, ("cancelled",): 0.0}
    assert good["tuneline_run_outcome"] == outcomes
    assert good["tuneline_run_info"] == {('a "quoted" \\ run',): 1.0}
    assert good["tuneline_run_duration_seconds"] == {(): 72.5}
    assert good["tuneline_run_score"] == {
        ("acc", "base", "heldout_choice"): 0.26,
        ("acc", "tuned", "heldout_choice"): 0.64,
    }
    ended = good["tuneline_run_ended_timestamp_seconds"][()]
    assert before <= ended <= time.time()
    assert good["tuneline_run_promoted_timestamp_seconds"] == {(): ended}
    # A run that fails leaves the time of the last promotion, and the scores, as they are.
    assert set(good) - set(failed) == {
        "tuneline_run_promoted_timestamp_seconds",
        "tuneline_run_duration_seconds",
        "tuneline_run_score",
    }
    assert failed["tuneline_run_outcome"][("failed",)] == 1.0


PUSHGATEWAY = shutil.which("pushgateway")


@pytest.mark.slow
@pytest.mark.skipif(
    PUSHGATEWAY is None,
    reason="no pushgateway on the PATH: go install github.com/prometheus/pushgateway@latest",
)
def test_a_real_pushgateway_keeps_the_last_promotion(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert PUSHGATEWAY is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [PUSHGATEWAY, f"--web.listen-address={address}"], stdout=log, stderr=log
        )
    try:
        monkeypatch.setenv("MY_WEBHOOK", f"http://{address}")
        for _ in range(100):
            if not send([webhook(format="prometheus")], MESSAGE):
                break
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        read = lambda: families(urllib3.request("GET", f"http://{address}/metrics").data.decode())  # noqa: E731
        promoted = read()["tuneline_run_promoted_timestamp_seconds"]
        assert send([webhook(format="prometheus")], FAILURE) == []
        found = read()
    finally:
        process.terminate()
        process.wait(30)
    assert found["tuneline_run_promoted_timestamp_seconds"] == promoted
    ((labels, ended),) = found["tuneline_run_ended_timestamp_seconds"].items()
    assert set(labels) == {"", "tuneline", "demo"} and ended > next(iter(promoted.values()))
    assert [v for labels, v in found["tuneline_run_outcome"].items() if "failed" in labels] == [1.0]
    assert len(found["tuneline_run_info"]) == 1


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
