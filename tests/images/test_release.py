"""`make release`: what is refused, what is stated, and that a second build has the same bytes.

The whole of it runs with the marker slow, because it installs tools from the package index; the
images are pushed with the marker docker, to CNCF Distribution's `registry` if it is on the PATH.
"""

import datetime
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from release import bills, containers, packages, provenance, signing
from release.__main__ import DIST, main
from release.source import Source, read_source

from tuneline import images
from tuneline.errors import ProofError, ToolError, UserError
from tuneline.version import VERSION

ROOT = Path(__file__).parents[2]
STARTED = datetime.datetime(2026, 11, 23, 10, 15, tzinfo=datetime.UTC)


def git(where: Path, *arguments: str) -> str:
    who = {f"GIT_{role}_{part}": "test@example.com" for role in ("AUTHOR", "COMMITTER")
           for part in ("NAME", "EMAIL")}  # fmt: skip
    alone = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    return subprocess.run(
        ["git", *arguments], cwd=where, env={**os.environ, **who, **alone}, check=True,
        capture_output=True, text=True,
    ).stdout  # fmt: skip


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A repository with one commit and the changelog of a version 1.2.0."""
    root = tmp_path / "clone"
    root.mkdir()
    (root / "CHANGELOG.md").write_text("# Changelog\n\n## 1.2.0\n\n- All.\n\n## [1.1.0] 2026\n")
    git(root, "init", "--quiet", "--initial-branch=main")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message", "first", "--date", "2026-11-23T10:00:00Z")
    return root


def test_a_clean_clone_is_described_by_its_commit(clone: Path) -> None:
    source = read_source(clone, "1.2.0")
    assert source.commit == git(clone, "rev-parse", "HEAD").strip()
    assert source.epoch == int(git(clone, "log", "-1", "--format=%ct"))
    assert (source.uri, source.notes) == (None, ())
    git(clone, "remote", "add", "origin", "https://user:secret@git.example.com:8443/team/a.git")
    assert read_source(clone, "1.2.0").uri == "git+https://git.example.com:8443/team/a.git"


def test_what_is_not_committed_is_not_released(clone: Path) -> None:
    for number in range(7):
        (clone / f"new-{number}").write_text("")
    (clone / "CHANGELOG.md").write_text("# Changelog\n\n## 1.2.0\n")
    says = "CHANGELOG.md, new-0, new-1, new-2, new-3 and 3 more: not committed"
    with pytest.raises(UserError, match=re.escape(says)):
        read_source(clone, "1.2.0")


def test_a_version_has_an_entry_in_the_changelog(clone: Path) -> None:
    with pytest.raises(UserError, match=r"no entry for 1\.3\.0, .*\(it has 1\.2\.0, 1\.1\.0\)"):
        read_source(clone, "1.3.0")
    (note,) = read_source(clone, "1.1.0").notes
    assert note.startswith("CHANGELOG.md has 1.2.0 above 1.1.0: those changes are in this release")


def test_a_version_is_released_from_one_commit(clone: Path) -> None:
    git(clone, "tag", "--annotate", "--message", "released", "v1.2.0")
    assert read_source(clone, "1.2.0").version == "1.2.0"
    git(clone, "commit", "--quiet", "--allow-empty", "--message", "second")
    with pytest.raises(UserError, match="the tag v1.2.0 is at [0-9a-f]{12} and not at"):
        read_source(clone, "1.2.0")


def test_a_directory_without_git(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="is not a checkout of git: release from a clone"):
        read_source(tmp_path, "1.2.0")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--images=maybe"], "IMAGES is 'maybe': write yes or no"),
        (["--torch=rocm"], "TORCH is 'rocm': write cuda or cpu"),
        (["--registry=team"], "REGISTRY is 'team', which names no host"),
        (["--sets=light heavy"], "SETS has heavy: choose among light, train"),
    ],
)
def test_mistakes(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert says in capsys.readouterr().err


def test_without_an_engine_there_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/absent.sock")
    with pytest.raises(ToolError) as refused:
        containers.engine_version()
    assert str(refused.value).startswith("no container engine answers (")
    assert str(refused.value).endswith("or release without images by `make release IMAGES=no`")


def test_another_build_with_other_bytes_is_an_error(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for made in (first, second):
        (made / "copy").mkdir(parents=True)
        (made / "a.whl").write_bytes(b"wheel")
        (made / "a.tar.gz").write_bytes(b"sdist")
    assert packages.compare(first, second) == [first / "a.tar.gz", first / "a.whl"]
    (second / "a.whl").write_bytes(b"Wheel")
    with pytest.raises(ProofError, match="a.whl has other bytes when it is built again"):
        packages.compare(first, second)
    (second / "a.whl").unlink()
    with pytest.raises(ProofError, match="the second"):
        packages.compare(first, second)


DPKG = (
    "adduser\t3.134\tall\tadduser\tinstalled\n"
    "libc6\t2.36-9+deb12u14\tamd64\tglibc\tinstalled\n"
    "gone\t1\tamd64\tgone\tconfig-files\n"
    "login\t1:4.13+dfsg1-1+b1\tamd64\tshadow\tinstalled\n"
)
SYSTEM = 'PRETTY_NAME="Debian GNU/Linux 12"\nID=debian\nVERSION_ID="12"\n'


def test_the_bill_of_an_image_has_both_kinds_of_packages() -> None:
    python = {
        "type": "library",
        "name": "numpy",
        "version": "2.2.6",
        "purl": "pkg:pypi/numpy@2.2.6",
    }
    subject = {"type": "container", "name": "host.example/light"}
    own = {"bomFormat": "CycloneDX", "metadata": {"timestamp": "t"}, "components": [python]}
    bill = bills.with_debian(own, DPKG, SYSTEM, subject)
    assert bill["metadata"] == {"timestamp": "t", "component": subject}
    assert bill["components"][0] == python
    assert bill["components"][1]["type"] == "operating-system"
    debian = {each["name"]: each for each in bill["components"][2:]}
    assert list(debian) == ["adduser", "libc6", "login"]
    assert debian["login"]["version"] == "1:4.13+dfsg1-1+b1"
    # As the specification of package URLs quotes a version with an epoch.
    assert debian["login"]["purl"] == (
        "pkg:deb/debian/login@1%3A4.13%2Bdfsg1-1%2Bb1?arch=amd64&distro=debian-12"
    )
    assert debian["libc6"]["properties"] == [{"name": "debian:source-package", "value": "glibc"}]
    assert "properties" not in debian["adduser"]
    assert own["components"] == [python], "the image's own bill is not changed"


def statement(files: list[Path], **values: Any) -> dict[str, Any]:
    source = Source(ROOT, "1.2.0", "c" * 40, 1_790_000_000, "git+https://git.example.com/a.git")
    lock = ROOT / "images" / "light" / "requirements.lock"
    given: dict[str, Any] = {
        "images": [], "locks": [lock], "materials": [], "parameters": {"torch": "cpu"},
        "tools": {"container engine": "28"}, "started": STARTED,
    }  # fmt: skip
    return provenance.statement(source, files=files, **{**given, **values})


def test_the_provenance_names_files_images_commit_and_locks(tmp_path: Path) -> None:
    (tmp_path / "a.whl").write_bytes(b"wheel")
    pushed = containers.Image("light", "host.example/light:1.2.0", "sha256:1", "sha256:" + "2" * 64)
    kept = containers.Image("train", "localhost/tuneline/train:1.2.0", "sha256:3", None)
    assert (pushed.reference, kept.reference) == ("host.example/light@sha256:" + "2" * 64, None)
    base = {"name": "debian:12", "digest": {"sha256": "4" * 64}}
    made = statement([tmp_path / "a.whl"], images=[pushed, kept], materials=[base])
    assert made["_type"] == "https://in-toto.io/Statement/v1"
    assert made["predicateType"] == "https://slsa.dev/provenance/v1"
    assert made["subject"] == [
        {"name": "a.whl", "digest": {"sha256": hashlib.sha256(b"wheel").hexdigest()}},
        {"name": "host.example/light:1.2.0", "digest": {"sha256": "2" * 64}},
    ]
    build = made["predicate"]["buildDefinition"]
    assert build["externalParameters"] == {"version": "1.2.0", "torch": "cpu"}
    source, lock, material = build["resolvedDependencies"]
    assert source == {
        "name": "source", "digest": {"gitCommit": "c" * 40},
        "uri": "git+https://git.example.com/a.git",
    }  # fmt: skip
    text = (ROOT / "images/light/requirements.lock").read_bytes()
    assert lock["name"] == "images/light/requirements.lock"
    assert lock["digest"] == {"sha256": hashlib.sha256(text).hexdigest()}
    assert material == base


def test_the_builder_is_the_workflow_or_some_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SERVER_URL", "WORKFLOW_REF", "REPOSITORY", "RUN_ID", "RUN_ATTEMPT"):
        monkeypatch.delenv(f"GITHUB_{name}", raising=False)
    details = statement([])["predicate"]["runDetails"]
    assert details["builder"]["id"] == "urn:tuneline:builder:local"
    assert details["metadata"]["startedOn"] == "2026-11-23T10:15:00Z"
    monkeypatch.setenv("GITHUB_SERVER_URL", "https://ci.example.com")
    monkeypatch.setenv("GITHUB_WORKFLOW_REF", "team/a/.github/workflows/release.yml@refs/tags/v1")
    monkeypatch.setenv("GITHUB_REPOSITORY", "team/a")
    monkeypatch.setenv("GITHUB_RUN_ID", "7")
    details = statement([])["predicate"]["runDetails"]
    workflow = "team/a/.github/workflows/release.yml@refs/tags/v1"
    assert details["builder"]["id"] == f"https://ci.example.com/{workflow}"
    invocation = details["metadata"]["invocationId"]
    assert invocation == "https://ci.example.com/team/a/actions/runs/7/attempts/1"


def test_the_sums_are_those_that_sha256sum_checks(tmp_path: Path) -> None:
    (tmp_path / "a.whl").write_bytes(b"wheel")
    (tmp_path / "b.json").write_bytes(b"{}")
    sums = signing.write_sums(tmp_path)
    check = ["sha256sum", "--check", "--strict", sums.name]
    done = subprocess.run(check, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "a.whl: OK\nb.json: OK\n"
    (tmp_path / "b.json").write_bytes(b"[]")
    assert subprocess.run(check, cwd=tmp_path, capture_output=True, check=False).returncode == 1


def test_a_key_without_cosign_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolError, match="COSIGN_KEY is set, but there is no program cosign"):
        signing.check_cosign()


@pytest.mark.slow
def test_a_clean_clone_makes_a_release_that_installs(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    git(ROOT, "clone", "--quiet", "--no-hardlinks", str(ROOT), str(clone))
    make = ["make", "release", "IMAGES=no", f"PYTHON={sys.executable}"]
    done = subprocess.run(make, cwd=clone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "nothing is signed, because COSIGN_KEY names no key" in done.stdout
    dist = clone / DIST.relative_to(ROOT)
    subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=dist, check=True)
    bill = json.loads((dist / "sbom-light.cdx.json").read_text())
    lock = (ROOT / "images" / "light" / "requirements.lock").read_text()
    pinned = set(re.findall(r"^([a-z0-9-]+)==([^ ]+)", lock, re.M))
    assert {(part["name"], part["version"]) for part in bill["components"]} == pinned
    again = subprocess.run(make, cwd=clone, capture_output=True, text=True, check=False)
    assert again.returncode and "has files, and nothing is overwritten" in again.stderr
    (wheel,) = dist.glob("*.whl")
    python = tmp_path / "fresh" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "fresh"], check=True)
    subprocess.run([python, "-m", "pip", "-q", "install", f"{wheel}[pipelines]"], check=True)
    tuneline = str(python.parent / "tuneline")
    for arguments, says in (
        (["--version"], f"tuneline {VERSION}"),
        (["recipes"], "llama3-8b-instruct"),
        (["compile", "demo"], "demo.pipeline.yaml"),
    ):
        done = subprocess.run(
            [tuneline, *arguments], cwd=tmp_path, env={**os.environ, "COLUMNS": "200"},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert says in done.stdout


@pytest.mark.docker
def test_a_pushed_image_has_the_registrys_digest_and_a_bill(tmp_path: Path) -> None:
    program = shutil.which("registry")
    if program is None:
        pytest.skip("the program registry of CNCF Distribution is not on the PATH")
    inspect = ["docker", "image", "inspect", images.LIGHT]
    if subprocess.run(inspect, capture_output=True, check=False).returncode:
        pytest.skip(f"{images.LIGHT} is not built: make images SETS=light")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{free.getsockname()[1]}"
    config = tmp_path / "registry.yml"
    config.write_text(f"version: 0.1\nstorage: {{inmemory: {{}}}}\nhttp: {{addr: '{host}'}}\n")
    process = subprocess.Popen([program, "serve", config], stderr=subprocess.DEVNULL)
    try:
        time.sleep(2)
        image = containers.push("light", f"{host}/team")
        assert image.reference and image.reference.startswith(f"{host}/team/light@sha256:")
        # What the registry has under the digest is the image.
        subprocess.run(["docker", "pull", image.reference], check=True, capture_output=True)
    finally:
        process.terminate()
        process.wait()
    bill, debian, system = containers.contents(image)
    parts = bills.with_debian(bill, debian, system, image.subject)["components"]
    names = {part["name"] for part in parts}
    assert {"kfp", "tuneline", "libc6", "debian"} <= names
