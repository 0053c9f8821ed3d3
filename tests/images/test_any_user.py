"""The steps under a user of OpenShift's: a high number, group 0, no entry in /etc/passwd.

The environment is that of the images (images/Dockerfile), with another directory for /tmp. The
user is a real one of the kernel, so the tests need root, and a Python that all users can read.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tuneline.steps import IMAGE_SETS

ROOT = Path(__file__).parents[2]
USER = {"user": 1000730000, "group": 0, "extra_groups": []}
FAST = {"light", "publish"}
"""Sets whose check loads no torch."""


def of_the_images(temporary: str) -> dict[str, str]:
    """Return the variables that the Dockerfile sets, except PATH and the image's name."""
    text = (ROOT / "images" / "Dockerfile").read_text(encoding="utf-8")
    (block,) = re.findall(r"^ENV (.*?[^\\])$", text, re.M | re.S)
    found = dict(re.findall(r"(\w+)=(\S+)", block))
    return {
        name: value.replace("/tmp", temporary)
        for name, value in found.items()
        if name not in ("PATH", "TUNELINE_IMAGE")
    }


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory as /tmp is in a pod; pytest's own can be read by root only."""
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o777)
    yield directory
    shutil.rmtree(directory)


def as_user(home: Path, *arguments: str) -> Any:
    if os.geteuid() != 0:
        pytest.skip("only root can start processes of another user")
    environment = {**of_the_images(str(home)), "PATH": os.defpath, "OMP_NUM_THREADS": "1"}

    def run(*words: str) -> Any:
        return subprocess.run(
            [sys.executable, *words],
            env=environment,
            cwd=home,
            capture_output=True,
            text=True,
            **USER,  # type: ignore[call-overload]
        )

    try:
        usable = run("-c", "import tuneline").returncode == 0
    except PermissionError:
        usable = False
    if not usable:
        pytest.skip(f"other users cannot read {sys.executable} or the packages")
    return run(*arguments)


def test_the_user_has_no_name(home: Path) -> None:
    program = "import os, pwd; print(os.getuid(), os.getgid()); pwd.getpwuid(os.getuid())"
    done = as_user(home, "-c", program)
    assert done.stdout == "1000730000 0\n"
    assert "uid not found" in done.stderr


@pytest.mark.parametrize(
    "name",
    [pytest.param(each, marks=[pytest.mark.slow] * (each not in FAST)) for each in IMAGE_SETS],
)
def test_each_image_works_for_any_user(name: str, home: Path) -> None:
    done = as_user(home, "-m", "tuneline.selfcheck", name)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"^user 1000730000:0, ", done.stdout, re.M)
    assert f"HOME: {home} can be written" in done.stdout
