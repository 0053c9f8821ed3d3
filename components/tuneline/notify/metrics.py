"""The end of a run as metrics of Prometheus, for a Pushgateway.

A run that has ended cannot be scraped, so its exit handler pushes. Metrics of a recipe are one
group of the Pushgateway, and each run replaces those of the last one. Only a run whose model was
promoted pushes the time of the promotion, so the gateway keeps the time of the last one.
"""

import time
from typing import get_args

from prometheus_client import CollectorRegistry, Gauge

from tuneline.notify.config import Event
from tuneline.notify.message import Message

JOB = "tuneline"
"""Value of the label `job`."""


def registry_of(message: Message) -> CollectorRegistry:
    """Return the metrics of a run that ends now."""
    registry = CollectorRegistry()

    def gauge(name: str, words: str, *labels: str) -> Gauge:
        return Gauge(f"tuneline_run_{name}", words, labels, registry=registry)

    now = time.time()
    gauge("ended_timestamp_seconds", "Time at which the last run ended.").set(now)
    if message.event == "promoted":
        gauge(
            "promoted_timestamp_seconds",
            "Time at which the last run ended whose model the gate promoted.",
        ).set(now)
    outcome = gauge("outcome", "1 for the way in which the last run ended, else 0.", "outcome")
    for event in get_args(Event):
        outcome.labels(event).set(event == message.event)
    gauge("info", "Name of the last run.", "run").labels(message.run).set(1)
    if message.seconds is not None:
        gauge("duration_seconds", "Time from the start of its first step to its end.").set(
            message.seconds
        )
    if message.scores:
        labels = ("task", "metric", "model")
        score = gauge("score", "Scores of the base model and of the tuned model.", *labels)
        for each in message.scores:
            score.labels(each.task, each.metric, "base").set(each.base)
            score.labels(each.task, each.metric, "tuned").set(each.tuned)
    return registry
