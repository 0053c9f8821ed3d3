"""Turn a source of rows into token IDs, held-out rows and a page of statistics."""

import hashlib
import logging
import shutil
import time
from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow

from tuneline.artifacts import (
    CHAT_TEMPLATE_FILE,
    EVAL_FILE,
    HELDOUT_FILE,
    REJECTED_FILE,
    TRAIN_FILE,
    DatasetManifest,
    new_directory,
    read_jsonl,
    write_jsonl,
)
from tuneline.errors import DataError
from tuneline.prepare.config import PrepareConfig
from tuneline.prepare.formats.example import Example
from tuneline.prepare.formats.table import check_names
from tuneline.prepare.parallel import batched, in_order
from tuneline.prepare.rows.collect import Collected, collect
from tuneline.prepare.rows.mixture import mix_in
from tuneline.prepare.rows.split import MAX_HELDOUT_SHARE, Split, split
from tuneline.prepare.rows.spool import Spool
from tuneline.prepare.sources.kinds import kind_of
from tuneline.prepare.statistics_page import render
from tuneline.prepare.tokens import lengths, parquet
from tuneline.prepare.tokens.render import Rendered, Renderer
from tuneline.prepare.tokens.templates import OWN_TEMPLATE, use_template
from tuneline.prepare.tokens.tokenise import tokenise
from tuneline.prepare.tokens.tokenizer import load_tokenizer
from tuneline.prepare.tokens.truncation import choose_length, cut_rows, too_long

logger = logging.getLogger(__name__)

_NUM_SAMPLES = 4


def run(
    config: PrepareConfig,
    *,
    source: str,
    base_model_dir: str,
    dataset_dir: str,
    statistics_path: str,
) -> DatasetManifest:
    """Prepare the dataset `source` for the model in `base_model_dir`.

    Args:
        config: the `prepare` section of the recipe.
        source: a Hub ID, a file, a directory, a glob of files or builtin:NAME.
        base_model_dir: directory of the fetched model; its tokenizer and chat template are used.
        dataset_dir: directory to write the dataset to; must be empty or not exist.
        statistics_path: path of the HTML page to write.

    Raises:
        DataError: the rows cannot be used, or no row with tokens to learn is left.
        ModelError: the model's tokenizer cannot be used.
        HubError: the Hub could not be reached.
    """
    started = time.monotonic()
    check_names(config.format, config.columns, config.method)
    general = config.general
    if general is not None:
        check_names(general.format, general.columns, config.method)
        kind_of(general.source)
    for name in filter(None, (source, config.heldout.source)):
        kind_of(name)
    tokenizer, longest_allowed = load_tokenizer(base_model_dir)
    template = "" if config.method == "cpt" else use_template(tokenizer, config.template)
    if config.method == "cpt":
        for name in ("template", "system_prompt", "loss_on"):
            if name in config.model_fields_set:
                logger.warning("prepare.%s is ignored: method cpt trains on raw text", name)
    elif config.method == "dpo" and "loss_on" in config.model_fields_set:
        logger.warning("prepare.loss_on is ignored: method dpo compares whole answers")

    with new_directory(dataset_dir) as target:
        work = target / ".work"
        work.mkdir()
        with (
            Spool(work / "rows.jsonl") as spool,
            open(target / REJECTED_FILE, "w", encoding="utf-8") as rejected,
        ):
            collected = collect(source, config, Renderer(tokenizer), spool, rejected)
            intake, parts = collected.intake, _divide(collected, config, spool)
            digest = hashlib.sha256(template.encode())
            digest.update(f"{config.method} {config.loss_on} {config.template}".encode())
            heldout = _read_heldout(spool, parts.heldout, digest)
            sizes = array("l")
            for name, indices in ((TRAIN_FILE, parts.train), (EVAL_FILE, parts.eval)):
                digest.update(name.encode())
                rows = _tokens(spool, indices, tokenizer, config, digest, sizes)
                parquet.write(work / name, rows, method=config.method)
        if not sizes:
            raise DataError(
                f"{source}: all {parts.num_leaking} rows are the same as held-out rows, so none is "
                "left to train on: name another prepare.heldout.source"
            )
        statistics = lengths.statistics(sizes)
        recommended = lengths.recommend(statistics, longest_allowed)
        max_seq_length = choose_length(config.max_seq_length, recommended, longest_allowed)
        digest.update(f"max_seq_length {max_seq_length}".encode())
        kept = {
            name: cut_rows(work / name, target / name, max_seq_length, config.method)
            for name in (TRAIN_FILE, EVAL_FILE)
        }
        train, evaluation = kept[TRAIN_FILE], kept[EVAL_FILE]
        if train.num_rows == 0:
            raise too_long(source, statistics, train, max_seq_length)
        write_jsonl(target / HELDOUT_FILE, heldout)
        if template and config.template != OWN_TEMPLATE:
            (target / CHAT_TEMPLATE_FILE).write_text(template, encoding="utf-8")
        shutil.rmtree(work)
        all_tokens = train.num_source_tokens + evaluation.num_source_tokens
        lost = all_tokens - train.num_tokens - evaluation.num_tokens
        manifest = DatasetManifest(
            source=source,
            method=config.method,
            format=intake.format,
            template=config.template if template else "none",
            loss_on="all" if config.method == "cpt" else config.loss_on,
            num_train_rows=train.num_rows,
            num_eval_rows=evaluation.num_rows,
            num_heldout_rows=len(heldout),
            num_rejected_rows=intake.num_rejected,
            num_tokens=train.num_tokens,
            num_loss_tokens=train.num_loss_tokens,
            lengths=statistics,
            max_seq_length=max_seq_length,
            recommended_max_seq_length=recommended,
            truncated_token_share=round(lost / all_tokens, 6),
            num_overlong_rows=train.num_overlong_rows + evaluation.num_overlong_rows,
            num_general_rows=parts.num_general,
            num_leaking_rows=parts.num_leaking,
            end_of_turn=_end_of_turn(heldout, template, tokenizer),
            licence=config.licence,
            hub_ids=[source] if kind_of(source) == "hub" else [],
            sha256=digest.hexdigest(),
            seconds=round(time.monotonic() - started, 3),
        )
        manifest.write(target, config)
        _write_page(target, tokenizer, manifest, Path(statistics_path))
    _log(manifest)
    return manifest


def _divide(collected: Collected, config: PrepareConfig, spool: Spool) -> Split:
    """Split the collected rows into training, evaluation and held-out rows."""
    parts = split(len(collected.own), config, own_heldout=collected.heldout, digest=spool.digest)
    wanted = config.heldout.max_rows
    if collected.heldout is None and len(parts.heldout) < wanted:
        logger.warning(
            "prepare.heldout.max_rows asks for %d rows, but %d are held out: at most %.0f %% of "
            "the dataset are, unless prepare.heldout.source names other rows",
            wanted,
            len(parts.heldout),
            100 * MAX_HELDOUT_SHARE,
        )
    if config.general is None:
        return parts
    return mix_in(
        parts,
        config.general,
        candidates=collected.general,
        seed=config.seed,
        digest=spool.digest,
    )


def _read_heldout(spool: Spool, indices: Sequence[int], digest: Any) -> list[dict[str, Any]]:
    rows = []
    for line in spool.read(indices):
        digest.update(line)
        rows.append(Rendered.from_line(line).heldout_row())
    return rows


def _tokens(
    spool: Spool,
    indices: Sequence[int],
    tokenizer: Any,
    config: PrepareConfig,
    digest: Any,
    sizes: "array[int]",
) -> Iterator[pyarrow.RecordBatch]:
    """Yield the examples of the given rows, and append the length of each example to `sizes`."""

    def tokens(lines: list[bytes]) -> tuple[pyarrow.RecordBatch, "array[int]"]:
        rendered = [Rendered.from_line(line) for line in lines]
        rows = list(tokenise(tokenizer, rendered, loss_on=config.loss_on))
        return parquet.to_batch(rows, method=config.method), array("l", map(len, rows))

    for lines, (batch, lengths_of_rows) in in_order(
        tokens, batched(spool.read(indices), parquet.BATCH)
    ):
        for line in lines:
            digest.update(line)
        sizes.extend(lengths_of_rows)
        yield batch


def _end_of_turn(heldout: list[dict[str, Any]], template: str, tokenizer: Any) -> str:
    """Return the text that ends an answer, as the chat template renders it."""
    if not template:
        return ""
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    row = heldout[0] if heldout else Renderer(tokenizer).render(Example(messages)).heldout_row()
    return str(row["end"])


def _write_page(target: Path, tokenizer: Any, manifest: DatasetManifest, path: Path) -> None:
    samples = list(islice(parquet.read(target / TRAIN_FILE, method=manifest.method), _NUM_SAMPLES))
    rejected = read_jsonl(target / REJECTED_FILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(manifest, tokenizer, samples, rejected), encoding="utf-8")


def _log(manifest: DatasetManifest) -> None:
    logger.info(
        "prepared %s (%s): %d training rows, %d evaluation rows, %d held-out rows, %d rejected; "
        "%d tokens, of which the loss counts %d; max_seq_length %d loses %.2f %% of the tokens; "
        "%.1f s",
        manifest.source,
        manifest.format,
        manifest.num_train_rows,
        manifest.num_eval_rows,
        manifest.num_heldout_rows,
        manifest.num_rejected_rows,
        manifest.num_tokens,
        manifest.num_loss_tokens,
        manifest.max_seq_length,
        100 * manifest.truncated_token_share,
        manifest.seconds,
    )
