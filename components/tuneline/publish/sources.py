"""The artifacts of a run that publish reads, and the repositories made from these artifacts."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tuneline.artifacts import (
    DatasetManifest,
    Decision,
    MergeProof,
    ModelOrigin,
    QuantizedModel,
    RunHeader,
    TrainingSummary,
)
from tuneline.errors import ProofError, UserError
from tuneline.kinds import KINDS, KindTraits, RepoKind
from tuneline.models.agreement import Stored, disagreements
from tuneline.publish.proven import check_exports_were_decided, check_lineage
from tuneline.record import Record
from tuneline.records.earlier import EVALUATED_FILE


@dataclass(frozen=True)
class Sources:
    """The records of a run, and the directories whose files are published."""

    header: RunHeader
    origin: ModelOrigin
    dataset: DatasetManifest
    training: TrainingSummary
    merge: MergeProof
    decision: Decision
    adapter_dir: Path
    merged_dir: Path
    exports: dict[Path, QuantizedModel]
    """Records of the exports, by their directories; with those that the gate holds."""
    evaluated: dict[str, Any] | None = None
    """What the gate leaves for the next run to the same target; None: of an older gate."""

    @classmethod
    def read(
        cls,
        header: RunHeader,
        *,
        base_model_dir: Path,
        dataset_dir: Path,
        adapter_dir: Path,
        merged_dir: Path,
        exports_dirs: list[Path],
        decision_dir: Path,
        quantize_config: str | None = None,
    ) -> Self:
        """Read every record, so that an incomplete artifact is found before anything is sent.

        Args:
            header: the recipe.
            base_model_dir: directory of the `base_model` artifact, or a copy of its record.
            dataset_dir: directory of the `dataset` artifact, or a copy of its record.
            adapter_dir: directory of the `adapter` artifact.
            merged_dir: directory of the `merged` artifact.
            exports_dirs: directories of the `quantized` artifacts.
            decision_dir: directory of the `decision` artifact.
            quantize_config: the section `quantize` of the run as JSON. None: that of the recipe.

        Raises:
            WorldError: an artifact has no record, an export that the run asks for is missing, or
                a file of the decision was changed.
            UserError: two exports have the same format.
            ProofError: an artifact was made from an artifact that is not in these directories, or
                the decision is not on these exports.
        """
        decision = Decision.read(decision_dir)
        decision.check_files(decision_dir)
        evaluated = decision_dir / EVALUATED_FILE
        sources = cls(
            header=header,
            origin=ModelOrigin.read(base_model_dir),
            dataset=DatasetManifest.read(dataset_dir),
            training=TrainingSummary.read(adapter_dir),
            merge=MergeProof.read(merged_dir),
            decision=decision,
            adapter_dir=adapter_dir,
            merged_dir=merged_dir,
            exports={path: QuantizedModel.read(path) for path in exports_dirs},
            evaluated=json.loads(evaluated.read_text("utf-8")) if evaluated.is_file() else None,
        )
        formats = [export.format for export in sources.exports.values()]
        header.check_exports(formats, quantize_config)
        for export in sources.exports.values():
            if formats.count(export.format) > 1:
                raise UserError(
                    f"{export.format} was exported {formats.count(export.format)} times, but each "
                    f"format can be published only once. Name it once in quantize.{export.kind}"
                )
        inputs = [sources.origin, sources.dataset, sources.training, sources.merge]
        check_lineage([*inputs, *sources.exports.values(), decision], inputs)
        check_exports_were_decided(sources.exports.values(), decision)
        sources.check_agreement()
        return sources

    def check_agreement(self) -> None:
        """Check that adapter, merged model and exports say what the records say.

        Raises:
            ProofError: they do not.
        """
        ancestors = {
            self.dataset.called(): Stored(self.dataset, None),
            self.training.called(): Stored(self.training, self.adapter_dir),
        }
        artifacts: list[tuple[Record, Path]] = [
            (self.training, self.adapter_dir),
            (self.merge, self.merged_dir),
            *((export, path) for path, export in self.exports.items()),
        ]
        for record, directory in artifacts:
            for sentence in disagreements(Stored(record, directory), ancestors):
                raise ProofError(
                    f"{directory}: {sentence}. Nothing was published. Run the pipeline again from "
                    "the step that made it"
                )


@dataclass(frozen=True)
class Repository:
    """One repository of the family that a run publishes."""

    name: str
    """Hub ID, or the name of the folder in a directory target."""
    kind: RepoKind
    exports: dict[Path, QuantizedModel]
    """The exports in the repository, by their directories; empty for adapter and merged model."""

    @property
    def short_name(self) -> str:
        """Return the name without the Hub namespace."""
        return self.name.rsplit("/", 1)[-1]

    @property
    def is_on_hub(self) -> bool:
        """Return whether the name is a Hub ID; the name of a folder has no namespace."""
        return "/" in self.name

    @property
    def traits(self) -> KindTraits:
        """Return the properties of the repository's kind."""
        return KINDS[self.kind]


def repositories(sources: Sources, name: str) -> list[Repository]:
    """Return the repositories of a run, without the exports that the gate holds.

    Args:
        sources: the artifacts of the run.
        name: name of the merged model's repository.
    """
    held = sources.decision.held_exports()
    kinds: dict[str, RepoKind] = {
        name + KINDS["adapter"].suffix: "adapter",
        name + KINDS["merged"].suffix: "merged",
    }
    exports: dict[str, dict[Path, QuantizedModel]] = {}
    for path, export in sources.exports.items():
        if export.format in held:
            continue
        repo = name + KINDS[export.kind].suffix.format(format=export.format)
        kinds[repo] = export.kind
        exports.setdefault(repo, {})[path] = export
    return [Repository(repo, kind, exports.get(repo, {})) for repo, kind in kinds.items()]
