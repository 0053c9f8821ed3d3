"""What the next run to the same target finds: the model published last, and earlier attempts."""

import json
import shutil
from pathlib import Path

import pytest
from gate_scores import accuracies, gate, write_scores
from publish_cases import TOKEN, publish, to_hub, write_again

from tuneline.artifacts import Decision
from tuneline.publish.config import PublishConfig
from tuneline.publish.earlier import look_up
from tuneline.records.earlier import RUNS_VARIABLE, EarlierRuns
from tuneline.seals import broken_seal
from tuneline.verify import verify

CONFIG = PublishConfig(max_attempts=2)


@pytest.fixture
def evaluated_run(run_dir: Path, tmp_path: Path) -> Path:
    """A run whose decision has the scores of its targets."""
    measured = tmp_path / "measured"
    write_scores(measured / "base", "base", {"quiz": accuracies(1, 0.3)})
    write_scores(measured / "tuned", "tuned", {"quiz": accuracies(2, 0.7)})
    gate(measured)
    shutil.copy(measured / "decision/evaluated.json", run_dir / "decision")
    write_again(run_dir)
    return run_dir


def found(path: Path, target: str) -> EarlierRuns:
    result = look_up(CONFIG, target=target, name="mine", earlier_path=str(path / "earlier"))
    text = (path / "earlier").read_text()
    assert broken_seal(text) == ""
    assert EarlierRuns.parse(text).published == result.published
    return result


def test_of_a_directory(evaluated_run: Path, tmp_path: Path) -> None:
    target = f"dir:{tmp_path}/out"
    assert found(tmp_path, target) == EarlierRuns()
    assert publish(evaluated_run, target, "one").returncode == 0
    earlier = found(tmp_path, target)
    assert earlier.published is not None
    # In the order of the IDs.
    assert sorted(earlier.published.targets["quiz"].scores) == sorted(accuracies(2, 0.7))
    assert all(checked.differences == [] for checked in verify(tmp_path / "out"))
    # Only the repository of the merged model has the scores.
    others = [
        path for path in (tmp_path / "out").rglob("tuneline.json") if "quiz" in path.read_text()
    ]
    assert [path.parent.name for path in others] == ["mine"]


def test_of_the_hub(
    evaluated_run: Path, tmp_path: Path, hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert found(tmp_path, "me/mine") == EarlierRuns()
    assert to_hub(evaluated_run, hub, "one").returncode == 0
    published = found(tmp_path, "me/mine").published
    assert published is not None and len(published.targets["quiz"].scores) == 200
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    refused = found(tmp_path, "me/mine")
    assert refused.published is None
    assert refused.remark.startswith("The model published last to mine could not be read, so it")


def test_a_changed_bundle_is_not_compared_with(evaluated_run: Path, tmp_path: Path) -> None:
    target = f"dir:{tmp_path}/out"
    assert publish(evaluated_run, target, "one").returncode == 0
    path = tmp_path / "out/mine/tuneline.json"
    bundle = json.loads(path.read_text())
    bundle["evaluated"]["targets"]["quiz"]["scores"] = [0.0] * 200
    path.write_text(json.dumps(bundle, indent=2) + "\n")
    earlier = found(tmp_path, target)
    assert earlier.published is None
    assert "tuneline.json was changed after it was written" in earlier.remark


def test_of_an_older_tuneline_nothing_is_known(run_dir: Path, tmp_path: Path) -> None:
    assert publish(run_dir, f"dir:{tmp_path}/out", "one").returncode == 0
    assert found(tmp_path, f"dir:{tmp_path}/out") == EarlierRuns()


def test_decisions_of_other_runs_on_this_machine_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        root = tmp_path / f"runs/demo-{number}/artifacts/line/gate"
        write_scores(root / "base", "base", {"quiz": accuracies(1, 0.3)})
        write_scores(root / "tuned", "tuned", {"quiz": accuracies(1 + number, 0.3)})
        assert gate(root).verdict == "hold"
    broken = tmp_path / "runs/demo-3/artifacts/line/gate/decision"
    broken.mkdir(parents=True)
    (broken / "evaluated.json").write_text("{")
    target = f"dir:{tmp_path}/out"
    assert found(tmp_path, target).attempts == []
    monkeypatch.setenv(RUNS_VARIABLE, str(tmp_path / "runs"))
    attempts = found(tmp_path, target).attempts
    assert len({attempt.model for attempt in attempts}) == len(attempts) == 2


def test_a_changed_file_of_the_decision_is_not_published(
    evaluated_run: Path, tmp_path: Path
) -> None:
    path = evaluated_run / "decision/evaluated.json"
    path.write_text(path.read_text().replace("1.0", "0.0"))
    assert Decision.read(evaluated_run / "decision").files
    done = publish(evaluated_run, f"dir:{tmp_path}/out", "one")
    assert done.returncode != 0 and "evaluated.json was changed after it was made" in done.stderr
