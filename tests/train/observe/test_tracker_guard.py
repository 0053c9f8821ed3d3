"""A tracker that fails after training has begun is switched off; the run goes on."""

import logging
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import integration_utils

from tuneline.train.observe.tracker_guard import guard_trackers


class Tracker(TrainerCallback):
    """A tracker whose server is gone from some event on."""

    fails_on = ""

    def __init__(self) -> None:
        self.events: list[str] = []

    def _event(self, name: str) -> None:
        self.events.append(name)
        if name == self.fails_on:
            raise ConnectionError("no route to the tracker\nmore")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._event("begin")

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._event("log")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._event("end")


@pytest.fixture
def train(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Train two steps with transformers' trainer and the tracker; return the tracker's events."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": (self.weight * x).sum()}

    def run(fails_on: str) -> tuple[list[str], int]:
        monkeypatch.setattr(Tracker, "fails_on", fails_on)
        monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", Tracker)
        trainer = Trainer(
            model=Model(),
            args=TrainingArguments(
                output_dir=str(tmp_path),
                max_steps=2,
                logging_steps=1,
                report_to=["wandb"],
                use_cpu=True,
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=[{"x": torch.ones(1)}] * 8,
        )
        tracker = next(c for c in trainer.callback_handler.callbacks if type(c) is Tracker)
        guard_trackers(trainer)
        trainer.train()
        return tracker.events, trainer.state.global_step

    return run


def test_a_tracker_that_works_gets_all_events(train: Any) -> None:
    assert train("") == (["begin", "log", "log", "log", "end"], 2)


def test_a_tracker_that_fails_is_switched_off(train: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert train("log") == (["begin", "log"], 2)
    (message,) = (r.getMessage() for r in caplog.records if "tracker" in r.name)
    assert message == (
        "Tracker has failed and gets no more values, but training goes on: "
        "ConnectionError: no route to the tracker"
    )


def test_a_failure_after_the_last_step_does_not_lose_the_run(train: Any) -> None:
    assert train("end") == (["begin", "log", "log", "log", "end"], 2)


def test_a_tracker_that_cannot_begin_ends_the_run_at_once(train: Any) -> None:
    with pytest.raises(ConnectionError):
        train("begin")
