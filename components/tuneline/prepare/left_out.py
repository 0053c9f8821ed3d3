"""Sentences about rows that are left out, and about parts with too few rows."""

from tuneline.artifacts import DatasetManifest
from tuneline.prepare.config import PrepareConfig
from tuneline.prepare.rows.groups import BEGINNING, EQUAL, NEAR, PROMPT
from tuneline.prepare.rows.near import SIMILARITY
from tuneline.prepare.rows.split import MAX_HELDOUT_SHARE

MIN_HELDOUT = 20
"""Smallest number of held-out rows that makes a benchmark; fewer give scores of little meaning."""

_REASONS = {
    EQUAL: "they are equal to one, apart from case, white space and punctuation",
    PROMPT: "they have the same prompt as one",
    BEGINNING: "one conversation is the beginning of the other",
    NEAR: f"they are nearly the same as one (Jaccard similarity {SIMILARITY} or more)",
}


def sentences(manifest: DatasetManifest) -> list[str]:
    """Return one sentence per reason for which usable rows are not used."""
    notes = []
    if manifest.num_overlong_rows:
        notes.append(
            f"{manifest.num_overlong_rows} rows are left out: their answer begins after "
            f"max_seq_length {manifest.max_seq_length}, so nothing is left to learn."
        )
    if manifest.num_same_answer_rows:
        notes.append(
            f"{manifest.num_same_answer_rows} preferences are left out: their answers are equal "
            f"after truncation to max_seq_length {manifest.max_seq_length}."
        )
    if manifest.num_leaking_rows:
        why = ", ".join(
            f"{count} because {_REASONS[name]}" for name, count in manifest.leaking_rows.items()
        )
        notes.append(
            f"{manifest.num_leaking_rows} rows are left out of training because of a held-out or "
            f"evaluation row: {why}."
        )
    if manifest.num_repeated_heldout_rows:
        notes.append(
            f"{manifest.num_repeated_heldout_rows} rows of prepare.heldout.source are left out: an "
            "earlier held-out row is the same or nearly the same."
        )
    if manifest.num_undesirable_heldout_rows:
        notes.append(
            f"{manifest.num_undesirable_heldout_rows} held-out rows are left out: their answer is "
            "undesirable, so a benchmark cannot use them."
        )
    if manifest.num_rows_in_large_groups:
        notes.append(
            f"{manifest.num_rows_in_large_groups} rows are in groups of similar rows that are too "
            "large to be held out or evaluated as a whole, so they are used for training only."
        )
    if manifest.num_unselected_rows:
        notes.append(f"{manifest.num_unselected_rows} rows are not used: see prepare.max_rows.")
    return notes


def shortages(manifest: DatasetManifest, config: PrepareConfig) -> list[str]:
    """Return one sentence per part that has too few rows."""
    notes = []
    wanted, num_heldout = config.heldout.max_rows, manifest.num_heldout_rows
    if config.heldout.source is None and num_heldout < wanted:
        notes.append(
            f"prepare.heldout.max_rows asks for {wanted} rows, but {num_heldout} are held out: at "
            f"most {MAX_HELDOUT_SHARE:.0%} of the dataset are, together with the rows that are "
            "similar to them, unless prepare.heldout.source names other rows"
        )
    if wanted and num_heldout < MIN_HELDOUT:
        notes.append(
            f"only {num_heldout} rows are held out. A score of fewer than {MIN_HELDOUT} rows says "
            "little, so the gate may decide by chance: add rows, or name other rows in "
            "prepare.heldout.source"
        )
    if config.eval_share and config.max_eval_rows and not manifest.num_eval_rows:
        notes.append(
            f"prepare.eval_share is {config.eval_share:g}, but there are no evaluation rows: the "
            f"{manifest.num_train_rows} training rows are too few or too similar to be divided, so "
            "training measures no evaluation loss"
        )
    return notes
