"""Publish to MLflow: each repository is a registered model, each version a version of it.

    mlflow:NAME          models:/NAME/1, models:/NAME-lora/1, models:/NAME-gguf/1, ...

The files are artifacts of a run of MLflow, in the folder `model`. The version is created last, when
every file was read back and compared with the SHA-256 that was proven. Until then the run is
unfinished, and the next push of the same model continues it. Nothing is deleted.
"""

import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tuneline.artifacts import PublishedRepo
from tuneline.errors import (
    CredentialsError,
    DataError,
    HubError,
    ProofError,
    RecipeError,
    StorageError,
    TunelineError,
)
from tuneline.publish.config import PublishConfig
from tuneline.publish.previous import (
    MARKER_FILE,
    MAX_READ_BYTES,
    model_sha256,
    read_bundle,
    same_model,
)
from tuneline.publish.staging import StagedRepo
from tuneline.publish.target import MLFLOW_PREFIX
from tuneline.publish.targets.versions import check_versions, name_for
from tuneline.record import sha256_of_file
from tuneline.runtime.redaction import redacted
from tuneline.runtime.retries import http_status, passing_fault, retrying

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

T = TypeVar("T")

ADDRESS_VARIABLE = "MLFLOW_TRACKING_URI"
EXPERIMENT_VARIABLE = "MLFLOW_EXPERIMENT_NAME"
DEFAULT_EXPERIMENT = "tuneline"
KIND_TAG = "tuneline.kind"
"""Tag of a version that tuneline made, with the kind of its repository."""
_UPLOAD_TAG = "tuneline.upload"
"""Tag of a run, with the hash by which the next push of the same model continues it."""
_FOLDER = "model"
_SETTINGS = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}
_ADVICE = (
    "Check the network and MLFLOW_TRACKING_URI, and run the step again later; files that arrived "
    "are not sent again"
)
_CREDENTIALS = (
    "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, and the "
    "credentials of the artifact store if the server does not pass artifacts on. On a cluster, "
    "name the Kubernetes secret that holds them under placement.secrets"
)


@dataclass(frozen=True)
class _Version:
    """A version of a registered model that tuneline made."""

    number: int
    run: str
    text: str
    """Its tuneline.json."""


class OnMlflow:
    """A registered model of MLflow as a place."""

    def __init__(self, target: str, config: PublishConfig) -> None:
        self._target = target
        self._name = target.removeprefix(MLFLOW_PREFIX)
        self._max_attempts = config.max_attempts
        self._opened: MlflowClient | None = None

    def check(self, staged: Sequence[StagedRepo]) -> None:
        """Check that no registered model has versions of others alone; see `Place`."""
        self.check_access()
        for repo in staged:
            self._look_up(name_for(repo, staged, self._name), repo.kind)

    def check_access(self) -> None:
        """Check that the server answers, and that these credentials may look up models.

        Raises:
            TunelineError: it does not, or they may not.
        """
        self._call("look up models", lambda c: c.search_registered_models(max_results=1))

    def push(
        self, staged: Sequence[StagedRepo], elsewhere: Sequence[PublishedRepo] = ()
    ) -> list[PublishedRepo]:
        """Push every repository as a new version; see `Place`."""
        return [self._push_one(repo, name_for(repo, staged, self._name)) for repo in staged]

    def read_last(self, name: str) -> str | None:
        """Return tuneline.json of the newest version; see `Place`."""
        version = self._newest(self._versions(self._name))
        return version.text if version else None

    def _push_one(self, repo: StagedRepo, name: str) -> PublishedRepo:
        held = self._look_up(name, repo.kind)
        files = repo.files()
        text = files[MARKER_FILE].read_text(encoding="utf-8")
        bundle = read_bundle(text)
        same = held is not None and same_model(bundle, read_bundle(held.text))
        if held and same and self._is_whole(name, held, bundle):
            number = held.number
            logger.info("models:/%s/%d holds the same model already", name, number)
        else:
            number = self._new_version(repo, name, bundle)
        return PublishedRepo(
            repo=f"{MLFLOW_PREFIX}{name}",
            kind=repo.kind,
            url=f"models:/{name}/{number}",
            tag=f"v{number}",
            num_files=len(files),
            num_bytes=sum(path.stat().st_size for path in files.values()),
        )

    def _new_version(self, repo: StagedRepo, name: str, bundle: dict[str, Any]) -> int:
        """Send the files to a run, and make a version of it; return the version's number."""
        run, is_begun = self._begin_or_continue(name, bundle)
        there = self._list(run) if is_begun else set()
        # What an earlier push sent stays; the card has measured speeds, so it is sent again.
        kept = there & bundle["files"].keys()
        for relative, path in sorted(
            repo.files().items(), key=lambda it: (it[0] == MARKER_FILE, it)
        ):
            sha256 = bundle["files"].get(relative)
            self._send(run, relative, path, sha256, may_be_there=relative in kept)
        location = self._call("look up the run", lambda c: c.get_run(run)).info.artifact_uri
        self._register(name)
        version = self._call(
            f"create a version of {name}",
            lambda c: c.create_model_version(
                name,
                source=f"{location}/{_FOLDER}",
                run_id=run,
                tags={KIND_TAG: repo.kind},
                description=f"{repo.kind} by tuneline, recipe {bundle.get('recipe', '')}",
            ),
            verb="written",
        )
        self._call("end the run", lambda c: c.set_terminated(run), verb="written")
        return int(version.version)

    def _begin_or_continue(self, name: str, bundle: dict[str, Any]) -> tuple[str, bool]:
        """Return the ID of a run for the files, and whether an earlier push began it."""
        experiment = self._experiment()
        tags = {_UPLOAD_TAG: f"{name}/{model_sha256(bundle)}"}
        unfinished = f"tags.`{_UPLOAD_TAG}` = '{tags[_UPLOAD_TAG]}' and status = 'RUNNING'"
        runs = self._call(
            "look up unfinished uploads", lambda c: c.search_runs([experiment], unfinished)
        )
        if runs:
            run = str(runs[0].info.run_id)
            logger.info("the upload of %s in MLflow's run %s is continued", name, run)
            return run, True
        created = self._call(
            "begin a run",
            lambda c: c.create_run(experiment, tags=tags, run_name=f"publish {name}"),
            verb="written",
        )
        return str(created.info.run_id), False

    def _experiment(self) -> str:
        """Return the ID of the experiment that has the runs; make it if it does not exist."""
        name = os.environ.get(EXPERIMENT_VARIABLE) or DEFAULT_EXPERIMENT
        found = self._call("look up the experiment", lambda c: c.get_experiment_by_name(name))
        if found is None:
            made = self._call(
                f"make the experiment {name}", lambda c: c.create_experiment(name), verb="written"
            )
            return str(made)
        if found.lifecycle_stage != "active":
            raise DataError(
                f"{self._target}: MLflow's experiment '{name}' is deleted. Restore it with `mlflow "
                f"experiments restore`, or name another one in {EXPERIMENT_VARIABLE}"
            )
        return str(found.experiment_id)

    def _register(self, name: str) -> None:
        """Make the registered model unless it exists."""
        try:
            self._call(
                f"make the registered model {name}",
                lambda c: c.create_registered_model(name),
                verb="written",
            )
        except TunelineError as error:
            if getattr(error.__cause__, "error_code", "") != "RESOURCE_ALREADY_EXISTS":
                raise

    def _look_up(self, name: str, kind: str) -> _Version | None:
        """Return the newest version that tuneline made.

        Raises:
            OutputExistsError: all versions are of others, or ours is of another kind.
        """
        versions = self._versions(name)
        newest = self._newest(versions)
        check_versions(
            f"MLflow's registered model {name}",
            names=[f"v{version.version}" for version in versions],
            has_ours=newest is not None,
            last=read_bundle(newest.text) if newest else {},
            kind=kind,
        )
        return newest

    def _versions(self, name: str) -> list[Any]:
        """Return all versions of a registered model; none if it does not exist."""
        versions: list[Any] = []
        token = None
        while True:
            page = self._call(
                f"look up {name}",
                lambda c, token=token: c.search_model_versions(f"name='{name}'", page_token=token),  # type: ignore[misc]
            )
            versions += page
            token = page.token
            if not token:
                return versions

    def _newest(self, versions: list[Any]) -> _Version | None:
        ours = [version for version in versions if KIND_TAG in version.tags]
        for version in sorted(ours, key=lambda each: int(each.version), reverse=True):
            text = self._read(str(version.run_id), MARKER_FILE)
            if text is not None:
                return _Version(int(version.version), str(version.run_id), text)
        return None

    def _is_whole(self, name: str, version: _Version, bundle: dict[str, Any]) -> bool:
        """Return whether a version still has all files of its tuneline.json."""
        missing = sorted(bundle["files"].keys() - self._list(version.run))
        if missing:
            logger.warning(
                "models:/%s/%d lacks %s, which somebody removed, so this run makes a new version",
                *(name, version.number, ", ".join(missing[:3])),
            )
        return not missing

    def _list(self, run: str, folder: str = "") -> set[str]:
        """Return the paths of all files of a run, below the folder of the model."""
        path = f"{_FOLDER}/{folder}".rstrip("/")
        found = set()
        for entry in self._call("list the files", lambda c: c.list_artifacts(run, path)):
            relative = entry.path.removeprefix(f"{_FOLDER}/")
            found |= self._list(run, relative) if entry.is_dir else {relative}
        return found

    def _send(
        self, run: str, relative: str, path: Path, sha256: str | None, *, may_be_there: bool
    ) -> None:
        """Send a file unless the run has it, and check what the run has.

        Args:
            run: ID of the run.
            relative: path of the file in the repository.
            path: the staged file.
            sha256: its proven hash; None: of a file that publish itself wrote.
            may_be_there: whether an earlier push may have sent the file.

        Raises:
            ProofError: the run has other bytes.
        """
        expected = sha256 or sha256_of_file(path)
        if may_be_there and self._hash(run, relative) == expected:
            logger.info("%s is there already", relative)
            return
        folder = f"{_FOLDER}/{relative}".rpartition("/")[0]
        self._call(
            f"send {relative}", lambda c: c.log_artifact(run, str(path), folder), verb="written"
        )
        found = self._hash(run, relative)
        if found != expected:
            raise ProofError(
                f"{relative} in MLflow's run {run} is not what was proven: its SHA-256 is "
                f"{found[:12]} instead of {expected[:12]}. No version has it. Run this step again"
            )

    def _hash(self, run: str, relative: str) -> str:
        """Return the SHA-256 of a file of a run, which is read back to a temporary file."""
        with tempfile.TemporaryDirectory(prefix="tuneline-mlflow-") as scratch:
            path = self._call(
                f"read back {relative}",
                lambda c: c.download_artifacts(run, f"{_FOLDER}/{relative}", scratch),
            )
            return sha256_of_file(Path(path))

    def _read(self, run: str, relative: str) -> str | None:
        """Return the text of a small file of a run; None if it is not there."""
        if relative not in {
            entry.path.removeprefix(f"{_FOLDER}/")
            for entry in self._call("list the files", lambda c: c.list_artifacts(run, _FOLDER))
        }:
            return None
        with tempfile.TemporaryDirectory(prefix="tuneline-mlflow-") as scratch:
            path = Path(
                self._call(
                    f"read {relative}",
                    lambda c: c.download_artifacts(run, f"{_FOLDER}/{relative}", scratch),
                )
            )
            is_small = path.stat().st_size <= MAX_READ_BYTES
            return path.read_text(encoding="utf-8", errors="replace") if is_small else None

    def _client(self) -> "MlflowClient":
        if self._opened is None:
            if not os.environ.get(ADDRESS_VARIABLE):
                raise RecipeError(
                    f"publish_to is {self._target}, but {ADDRESS_VARIABLE}, the address of "
                    "MLflow's server, is not set. On a cluster, give it to the steps by a "
                    "Kubernetes secret under placement.secrets"
                )
            # Read by mlflow when it is imported.
            for name, value in _SETTINGS.items():
                os.environ.setdefault(name, value)
            try:
                from mlflow import MlflowClient
            except ImportError as error:
                raise DataError(
                    f"{self._target} needs the package mlflow-skinny, which is not installed "
                    f"({error}): install it with pip install 'tuneline[registries]'"
                ) from None
            self._opened = MlflowClient()
        return self._opened

    def _call(self, what: str, request: "Callable[[MlflowClient], T]", *, verb: str = "read") -> T:
        """Send a request; repeat it after a fault that may not last, see `retries`.

        mlflow repeats most requests itself, MLFLOW_HTTP_REQUEST_MAX_RETRIES times.

        Args:
            what: description of the request, for messages.
            request: function that sends it.
            verb: what it does with the server, "read" or "written".

        Raises:
            TunelineError: the request failed after all attempts, or was refused.
        """
        client = self._client()
        where = f"{what} at {self._target}"
        try:
            return retrying(
                where, lambda: request(client), max_attempts=self._max_attempts, advice=_ADVICE
            )
        except TunelineError:
            raise
        except Exception as error:
            raise _explained(where, error, verb) from error


def _explained(where: str, error: Exception, verb: str) -> TunelineError:
    """Return an error whose message says what to try after MLflow refused a request."""
    status = http_status(error)
    if status is None and hasattr(error, "get_http_status_code"):
        status = error.get_http_status_code()
    says = redacted(" ".join(str(error).split()))
    # The cause is at the end of a long text.
    says = says if len(says) <= 300 else f"{says[:100]} ... {says[-200:]}"
    if status in (413, 507) or any(word in says.lower() for word in ("no space", "quota")):
        return StorageError(
            f"{where}: the artifact store is full, a quota is used up or the file is too large for "
            f"it ({says}). Make space, raise the limit, or lower merge.max_shard_bytes"
        )
    if status in (401, 403):
        return CredentialsError(f"{where} may not be {verb} ({says}): {_CREDENTIALS}")
    if isinstance(error, ImportError):
        return DataError(
            f"{where}: the artifact store needs the package {error.name}, which is not installed. "
            "Install it, or start the server with --serve-artifacts, so that it passes files on"
        )
    # mlflow says so after any fault of a download, and gives it the status 404.
    is_download = "Failed to download artifacts" in says
    if status is None or status >= 500 or status == 429 or is_download or passing_fault(error):
        return HubError(f"{where} failed ({says}). {_ADVICE}")
    if status == 404:
        return DataError(f"{where}: the server does not find it ({says}). Check {ADDRESS_VARIABLE}")
    return DataError(f"{where} was refused: {says}")
