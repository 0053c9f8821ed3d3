"""Advice that was given once and could not help. Each case holds what is said today.

Advice on bounds and on more bits is in tests/merge/test_proof.py, tests/merge/test_exact.py and
tests/quantize/gguf/test_proof.py, on what a Hub answers to a push in tests/publish/test_manners.py,
and on messages of platforms and libraries in tests/runtime/test_causes.py.
"""

import errno
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from tuneline.errors import DataError
from tuneline.pipelines.catalog import find_recipe
from tuneline.pipelines.cli.run import cause
from tuneline.prepare.tokens.templates import OWN_TEMPLATE, use_template
from tuneline.runtime.events import StepRun
from tuneline.runtime.failures.causes import explain
from tuneline.runtime.step import step


def named_templates() -> str:
    """Hermes 3 and Command R have a list of templates, which was taken for none."""
    both = {"default": "d", "tool_use": "t"}
    assert use_template(SimpleNamespace(chat_template=both), OWN_TEMPLATE) == "dt"
    with pytest.raises(DataError) as raised:
        use_template(SimpleNamespace(chat_template={"tool_use": "t"}), OWN_TEMPLATE)
    return str(raised.value)


def full_account() -> str:
    """The Hub's 403 for a full account was taken for a token without permission."""
    found = explain(
        StepRun("publish", 0),
        "HfHubHTTPError: 403 Forbidden: Private repository storage limit reached, please upgrade",
    )
    return f"{found.cause} {found.advice}"


def full_disk() -> str:
    """A copy names two files, and the one that was read was called full."""
    with pytest.raises(SystemExit), step("fetch"):
        # As shutil raises it: with the file that it read, and the file that it wrote.
        raise OSError(errno.ENOSPC, "No space left on device", "/base/a.bin", None, "/out/a.bin")
    return ""


def failed_step() -> str:
    """A failed run was said to have ended with exit code 1, and no step was named."""
    ran = [StepRun("prepare", 0, status="finished"), StepRun("merge", 1)]
    failed = StepRun("train", 2, status="failed", kind="DataError", message="no rows")
    return f"{cause(ran, 1)} {cause([*ran, failed], 1)}"


@pytest.mark.parametrize(
    ("case", "says", "absent"),
    [
        (named_templates, ["none of them is named default"], ["no chat template", "base model"]),
        (full_account, ["storage", "publish.private"], ["HF_TOKEN", "token with", "renew"]),
        (full_disk, ["the disk is full while writing /out/a.bin"], ["/base/a.bin"]),
        (failed_step, ["step merge failed: ", "step train failed: no rows"], ["exit code 1"]),
    ],
)
def test_the_cause_is_the_cause(
    case: Callable[[], str],
    says: list[str],
    absent: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = case() + capsys.readouterr().err
    assert [words for words in says if words not in text] == []
    assert [words for words in absent if words in text] == []


def test_a_group_of_tasks_can_be_the_target() -> None:
    """The recipe took it, and the gate refused it after everything ran; see tests/gate."""
    found = find_recipe("demo", ["evaluate.tasks=[kobest]", "gate.target_tasks=[kobest]"])
    assert found.gate.target_tasks == ("kobest",)
