"""Turn a source of rows into token IDs, held-out rows and a page of statistics."""

import hashlib
import logging
import shutil
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy

from tuneline.artifacts import (
    CHAT_TEMPLATE_FILE,
    EVAL_FILE,
    HELDOUT_FILE,
    PREFERENCE_METHODS,
    REJECTED_FILE,
    TRAIN_FILE,
    DatasetManifest,
    new_directory,
    read_jsonl,
    write_jsonl,
)
from tuneline.html.written import write_page
from tuneline.models.tokenizer.files import read_chat_template
from tuneline.prepare.config import PrepareConfig
from tuneline.prepare.cut import measure, write
from tuneline.prepare.datasets import describe, parse
from tuneline.prepare.divide import (
    check_contamination,
    check_remains,
    divide,
    order_of,
    read_questions,
    sizes_of,
)
from tuneline.prepare.encode import encode
from tuneline.prepare.fingerprint import at_version
from tuneline.prepare.formats.table import check_names
from tuneline.prepare.left_out import sentences, shortages
from tuneline.prepare.rows.collect import check_sources, collect, licences, records
from tuneline.prepare.rows.mixture import Origin
from tuneline.prepare.rows.split import Part
from tuneline.prepare.rows.spool import Spool
from tuneline.prepare.sources.kinds import date_of, kind_of
from tuneline.prepare.statistics_page import describe_unused, render
from tuneline.prepare.stops import check_stops
from tuneline.prepare.tokens import lengths, parquet
from tuneline.prepare.tokens.labels import check_desirable
from tuneline.prepare.tokens.render import Rendered, Renderer
from tuneline.prepare.tokens.templates import OWN_TEMPLATE, use_template
from tuneline.prepare.tokens.tokenizer import load_tokenizer
from tuneline.prepare.tokens.truncation import choose_length
from tuneline.prepare.tokens.vocabulary import Vocabulary
from tuneline.prepare.uploads import locate
from tuneline.record import sha256_of_file

logger = logging.getLogger(__name__)

_NUM_SAMPLES = 4


def run(
    config: PrepareConfig,
    *,
    source: str,
    base_model_dir: str,
    dataset_dir: str,
    statistics_path: str,
    benchmarks_path: str | None = None,
    uploads_dir: str | None = None,
    version: str | None = None,
) -> DatasetManifest:
    """Prepare the dataset `source` for the model in `base_model_dir`.

    Args:
        config: the `prepare` section of the recipe.
        source: the recipe's `dataset`, or its `datasets` as JSON.
        base_model_dir: directory of the fetched model; its tokenizer and chat template are used.
        dataset_dir: directory to write the dataset to; must be empty or not exist.
        statistics_path: path of the HTML page to write.
        benchmarks_path: JSON Lines file with the questions of benchmarks, which must not be in the
            training rows; None for none.
        uploads_dir: directory of the files that were sent with the run; None: there are none.
        version: what `fingerprint` returned; of datasets on the Hub, its commits are read. None:
            the commits that the revisions name now.

    Raises:
        DataError: the rows cannot be used, or no row with tokens to learn is left.
        ModelError: the model's tokenizer cannot be used.
        CredentialsError: a store refused the credentials.
        HubError: the Hub or a store could not be reached.
    """
    started = time.monotonic()
    check_names(config.format, config.columns, config.method)
    named = parse(source, config)
    source = describe(named)
    settings = config
    datasets, config = locate(named, config, uploads_dir)
    check_sources(datasets, config)
    if version is not None:
        datasets, config = at_version(datasets, config, version)
    tokenizer, longest_allowed = load_tokenizer(base_model_dir)
    template = "" if config.method == "cpt" else use_template(tokenizer, config.template)
    if config.method == "cpt":
        for name in ("template", "system_prompt", "loss_on"):
            if name in config.model_fields_set:
                logger.warning("prepare.%s is ignored: method cpt trains on raw text", name)
    elif config.method in PREFERENCE_METHODS and "loss_on" in config.model_fields_set:
        logger.warning("prepare.loss_on is ignored: method %s takes whole answers", config.method)

    date = config.date
    if date is None and "strftime_now" in template:
        date = max(date_of(dataset.source, dataset.revision) for dataset in datasets)
    renderer = Renderer(
        tokenizer,
        thinking=config.thinking,
        learn_empty_thinking=config.learn_empty_thinking,
        loss_on=config.loss_on,
        date=date,
    )

    with new_directory(dataset_dir) as target:
        work = target / ".work"
        work.mkdir()
        with (
            Spool(work / "rows.jsonl") as spool,
            open(target / REJECTED_FILE, "w", encoding="utf-8") as rejected,
        ):
            collected = collect(datasets, config, renderer, spool, rejected)
            digest = hashlib.sha256(template.encode())
            digest.update(f"{config.method} {config.loss_on} {config.template}".encode())
            order = order_of(collected, config)
            encoded = encode(
                spool,
                order.rows,
                tokenizer,
                work,
                vocabulary=Vocabulary(tokenizer, base_model_dir),
                method=config.method,
                loss_on=config.loss_on,
                digest=digest,
            )
            statistics = lengths.statistics(sizes_of(order, encoded, config))
            recommended = lengths.recommend(statistics, longest_allowed)
            max_seq_length = choose_length(config.max_seq_length, recommended, longest_allowed)
            remains = measure(encoded, max_seq_length, config.method)
            check_remains(source, order, encoded, remains, max_seq_length)
            parts = divide(source, collected, order, encoded, remains, config, work)
            digest.update(parts.parts.tobytes() + parts.uses.tobytes())
            digest.update(f"max_seq_length {max_seq_length}".encode())
            heldout, num_undesirable = _read_heldout(
                spool, [order.rows[row] for row in parts.rows(Part.HELDOUT)]
            )
        contamination = check_contamination(
            config, source, heldout, read_questions(benchmarks_path), encoded, parts
        )
        owners = encoded.owners
        num_examples = numpy.array(encoded.num_examples)
        kept = {
            name: write(
                encoded,
                numpy.where(remains.kept & (parts.parts[owners] == part), parts.uses[owners], 0),
                target / name,
                max_seq_length=max_seq_length,
                method=config.method,
            )
            for name, part in ((TRAIN_FILE, Part.TRAIN), (EVAL_FILE, Part.EVAL))
        }
        train, evaluation = kept[TRAIN_FILE], kept[EVAL_FILE]
        is_overlong = remains.is_overlong & (order.origins[owners] != Origin.HELDOUT)
        is_unfolded = (num_examples > 1) & (
            (parts.parts == Part.TRAIN) | (parts.parts == Part.EVAL)
        )
        if config.method == "kto":
            check_desirable(source, train.num_desirable, train.num_rows)
        if config.method in PREFERENCE_METHODS or (
            config.method == "sft" and config.loss_on == "answers"
        ):
            rows = parquet.read(target / TRAIN_FILE, method=config.method)
            check_stops(rows, base_model_dir, tokenizer)
        write_jsonl(target / HELDOUT_FILE, heldout)
        # The later steps find a template of the model itself, except in chat_template.json.
        if template and (
            config.template != OWN_TEMPLATE or read_chat_template(Path(base_model_dir)) is None
        ):
            (target / CHAT_TEMPLATE_FILE).write_text(template, encoding="utf-8")
        shutil.rmtree(work)
        all_tokens = train.num_source_tokens + evaluation.num_source_tokens
        all_tokens += int(numpy.array(encoded.sizes)[is_overlong].sum())
        lost = all_tokens - train.num_tokens - evaluation.num_tokens
        manifest = DatasetManifest(
            source=source,
            method=config.method,
            format=collected.intake.format,
            template=config.template if template else "none",
            loss_on="all" if config.method == "cpt" else config.loss_on,
            num_train_rows=train.num_rows,
            num_eval_rows=evaluation.num_rows,
            num_heldout_rows=len(heldout),
            num_rejected_rows=collected.intake.num_rejected,
            num_tokens=train.num_tokens,
            num_loss_tokens=train.num_loss_tokens,
            num_desirable_rows=train.num_desirable if config.method == "kto" else None,
            num_undesirable_heldout_rows=num_undesirable,
            lengths=statistics,
            max_seq_length=max_seq_length,
            recommended_max_seq_length=recommended,
            truncated_token_share=round(lost / all_tokens, 6),
            num_overlong_rows=int(is_overlong.sum()),
            num_general_rows=parts.num_general,
            num_leaking_rows=sum(parts.left_out.values()),
            leaking_rows=parts.left_out,
            num_same_answer_rows=int(remains.has_same_answers.sum()),
            num_repeated_heldout_rows=parts.num_repeated,
            num_rows_in_large_groups=parts.num_in_large_groups,
            num_unselected_rows=len(collected.own) - int((order.origins == Origin.OWN).sum()),
            contamination=contamination,
            benchmarks_sha256=sha256_of_file(Path(benchmarks_path)) if benchmarks_path else None,
            unused=dict(collected.intake.unused.most_common()),
            num_unfolded_conversations=int(is_unfolded.sum()),
            num_unfolded_rows=int(num_examples[is_unfolded].sum()),
            end_of_turn=renderer.end_of_turn if template else "",
            template_date=str(date) if date is not None and renderer.shows_date else None,
            licence=config.licence or licences(datasets),
            sources=records(named, collected, parts.weighted),
            hub_ids=[entry.source for entry in datasets if kind_of(entry.source) == "hub"],
            sha256=digest.hexdigest(),
            seconds=round(time.monotonic() - started, 3),
        )
        manifest.write(target, settings)
        _write_page(target, tokenizer, manifest, Path(statistics_path))
    _log(manifest, config)
    return manifest


def _read_heldout(spool: Spool, indices: Sequence[int]) -> tuple[list[dict[str, Any]], int]:
    """Return the held-out rows, and the number of rows left out as their answer is undesirable."""
    rendered = [Rendered.from_line(line) for line in spool.read(indices)]
    rows = [row.heldout_row() for row in rendered if row.judged is None or row.judged[2]]
    return rows, len(rendered) - len(rows)


def _write_page(target: Path, tokenizer: Any, manifest: DatasetManifest, path: Path) -> None:
    def draw() -> str:
        rows = parquet.read(target / TRAIN_FILE, method=manifest.method)
        samples = list(islice(rows, _NUM_SAMPLES))
        return render(manifest, tokenizer, samples, read_jsonl(target / REJECTED_FILE))

    write_page(path, draw, title="Dataset")


def _log(manifest: DatasetManifest, config: PrepareConfig) -> None:
    if manifest.unused:
        logger.warning(
            "these columns and keys are not used: %s. To read one, map it with prepare.columns; "
            "those named in prepare.ignore_columns are not listed",
            describe_unused(manifest.unused),
        )
    for sentence in (*sentences(manifest), *shortages(manifest, config)):
        logger.warning("%s", sentence)
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
    if manifest.num_unfolded_conversations:
        logger.info(
            "%d conversations became %d rows: the chat template writes their earlier answers "
            "differently from the last one, so a row has only answers that fit into one text",
            manifest.num_unfolded_conversations,
            manifest.num_unfolded_rows,
        )
