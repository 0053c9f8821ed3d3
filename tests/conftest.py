"""Fixtures that several areas share."""

import inspect
import json
import os
import shutil
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from tiny_llama import write_tiny_llama

from tuneline.artifacts import DatasetManifest, LengthStatistics, MergeProof
from tuneline.images import LOCAL

if not torch.cuda.is_available():
    # Triton reads it when a kernel is defined, so before any test imports a kernel's module.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tests that load a model, interpret kernels, or start many processes and servers.
HEAVY_FIXTURES = {"smollm2_dir", "tiny_model_dir"}
HEAVY_PATHS = tuple(
    Path(__file__).parent / name
    for name in (
        *("kernels", "evaluate", "train/ranks", "train/trainjob", "quantize/test_pieces.py"),
        *("publish/test_card.py", "publish/test_publish.py"),
        *("gate/test_error_rates.py", "gate/test_power.py"),
        *("pipelines/chat", "pipelines/cli", "pipelines/kfp_client", "pipelines/init/test_init.py"),
        *("pipelines/test_gitops.py", "pipelines/test_kube_server.py"),
    )
)


def stack(context: int = 1) -> list[inspect.FrameInfo]:
    """Return the callers as inspect.stack() does, without their files' names in full and lines."""
    return [
        inspect.FrameInfo(frame, frame.f_code.co_filename, line, frame.f_code.co_name, None, None)
        for frame, line in traceback.walk_stack(sys._getframe(1))
    ]


# Every setting of a task of KFP asks for the name of its caller. Python's own function looks for
# each frame's file among all modules: in a worker of xdist, that takes seconds per pipeline.
inspect.stack = stack


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the end-to-end tests (tests/cluster)."""
    group = parser.getgroup("cluster", "end-to-end tests on a cluster (-m cluster)")
    add = group.addoption
    add("--kfp-host", metavar="URL", help="URL of the KFP API")
    add("--kubeconfig", metavar="FILE", help="kubeconfig; default: that of kubectl")
    add("--kfp-namespace", metavar="NAME", help="your namespace, if your Kubeflow uses profiles")
    add("--kfp-registry", metavar="NAME", default=LOCAL, help="placement.registry of the runs")
    add("--kfp-account", metavar="NAME", default="tuneline-runner", help="service account")
    add("--kfp-claim", metavar="NAME", default="tuneline-model-cache", help="cache claim")
    add("--kfp-shared-claim", metavar="NAME", default="tuneline-shared", help="shared claim")
    add(
        "--kfp-set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override a key of every recipe, e.g. placement.profile=small; can be repeated",
    )
    add("--kfp-session", metavar="NAME", help="share KFP's cache with the session of this name")
    add("--kfp-figures", metavar="FILE", help="Markdown file for the demo's times and pod sizes")


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker of the end-to-end tests that need Kubeflow Trainer."""
    config.addinivalue_line("markers", "trainer: needs Kubeflow Trainer on the cluster")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that `make test-fast` leaves out, and put their files first.

    The workers of xdist take files in this order. A long file that is begun last would leave the
    other workers idle until its end.
    """
    heavy_files = set()
    for item in items:
        uses_model = not HEAVY_FIXTURES.isdisjoint(getattr(item, "fixturenames", ()))
        if uses_model or any(item.path.is_relative_to(path) for path in HEAVY_PATHS):
            item.add_marker("heavy")
            heavy_files.add(item.path)
    sizes = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path not in heavy_files, -sizes[item.path], item.path))


def shared_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a run of pytest, in which each of xdist's workers has its own."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def smollm2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model as the fetch step writes it, once for all test processes."""
    path = shared_dir(tmp_path_factory) / "smollm2"
    with FileLock(path.with_suffix(".lock")):
        if not path.is_dir():
            subprocess.run(
                [
                    *(sys.executable, "-m", "tuneline.fetch"),
                    *("--source", "builtin:smollm2-135m", "--base-model", str(path)),
                ],
                check=True,
            )
    return path


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with two layers and SmolLM2's tokenizer, as the fetch step writes it."""
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def merged_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as merge would leave it, once for all test processes."""
    from tuneline.models.tokenizer.files import copy_tokenizer

    path = shared_dir(tmp_path_factory) / "merged"
    with FileLock(path.with_suffix(".lock")):
        if path.is_dir():
            return path
        shutil.copytree(tiny_model_dir, path, ignore=shutil.ignore_patterns("origin.json"))
        copy_tokenizer(tiny_model_dir, path)
        MergeProof(
            base="dequantized",
            dtype="float32",
            num_bytes=(path / "model.safetensors").stat().st_size,
            num_shards=1,
            num_merged_modules=14,
            num_prompts=8,
            max_logit_difference=0.01,
            mean_kl=1e-4,
            top1_agreement=1.0,
            max_mean_kl=0.01,
        ).write(path)
    return path


@pytest.fixture(scope="session")
def f16_dir(merged_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The conversion that all formats share, once for all test processes."""
    from tuneline.quantize.run import convert

    path = shared_dir(tmp_path_factory) / "f16"
    with FileLock(path.with_suffix(".lock")):
        if not path.is_dir():
            convert(merged_dir=str(merged_dir), gguf_dir=str(path))
    assert json.loads((path / "quantized.json").read_text())["format"] == "f16"
    return path


@pytest.fixture(scope="session")
def new_dataset() -> Callable[..., DatasetManifest]:
    """Create a dataset's record; values that a test does not name do not matter to it."""

    def make(**values: Any) -> DatasetManifest:
        plain = {
            "source": "rows.jsonl",
            "method": "sft",
            "format": "messages",
            "template": "tokenizer",
            "loss_on": "answers",
            "num_train_rows": 16,
            "num_eval_rows": 0,
            "num_heldout_rows": 0,
            "num_rejected_rows": 0,
            "num_tokens": 160,
            "num_loss_tokens": 100,
            "lengths": LengthStatistics(mean=10, median=10, p95=11, p99=11, max=12),
            "max_seq_length": 64,
            "recommended_max_seq_length": 64,
            "truncated_token_share": 0.0,
            "sha256": "d" * 64,
        }
        return DatasetManifest(**(plain | values))

    return make


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB; the test is skipped if this process may not mount one."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield path
    subprocess.run(["umount", str(path)], check=True)
