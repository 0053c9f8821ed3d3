"""Stage the repositories, then push them to every target.

All targets of a run get the same staged tree, so `dir:PATH` shows what a push would send. Without
a target on the Hub, the repositories are named after the recipe, and exports have no `base_model`.
"""

import logging
import time
from pathlib import Path

from tuneline.artifacts import Decision, Published, RunHeader, new_directory
from tuneline.errors import UserError
from tuneline.publish.account import read_token
from tuneline.publish.config import PublishConfig
from tuneline.publish.proven import check_verdict
from tuneline.publish.sources import Sources
from tuneline.publish.staging import stage, write_serving
from tuneline.publish.target import check_targets, family_name, parse_targets
from tuneline.publish.targets.every import publish_everywhere
from tuneline.recorded_recipe import recorded_recipe
from tuneline.runtime.parameter_text import decode_list, encode_list
from tuneline.runtime.scratch import scratch_directory
from tuneline.runtime.termination import Ending, leave

logger = logging.getLogger(__name__)


def run(
    config: PublishConfig,
    *,
    target: str,
    recipe: str,
    base_model_dir: str | Path,
    dataset_dir: str | Path,
    adapter_dir: str | Path,
    merged_dir: str | Path,
    exports_dirs: list[str],
    decision_dir: str | Path,
    published_dir: str | Path,
    run_id: str = "",
    quantize_config: str = "",
) -> Published:
    """Publish a model that the gate promoted, without the exports that the gate holds.

    Args:
        config: the `publish` section of the recipe.
        target: one target, or a JSON list of them; see `publish_to` of the recipe. The
            repositories are NAME (merged model), NAME-lora, NAME-gguf, NAME-gptq-4bit, with the
            name on the Hub, or else the recipe's.
        recipe: the whole recipe as JSON, for the model cards.
        base_model_dir: directory of the `base_model` artifact, or a copy of its record.
        dataset_dir: directory of the `dataset` artifact, or a copy of its record.
        adapter_dir: directory of the `adapter` artifact.
        merged_dir: directory of the `merged` artifact.
        exports_dirs: directories of the `quantized` artifacts, one per format; may be empty.
        decision_dir: directory of the `decision` artifact.
        published_dir: new directory for published.json.
        run_id: ID of the run, for tuneline.json and the model cards; "" if it is not known.
        quantize_config: the section `quantize` of the run as JSON; "": that of the recipe.

    Raises:
        UserError: the verdict is hold, or tuneline did not make the repository of that name.
        RecipeError: a target has no known form, or its claim is not mounted.
        CredentialsError: credentials are missing or refused; nothing was changed.
        HubError: the Hub or a store failed after all attempts.
        StorageError: the target directory or its parent is not writable.
        ProofError: a file differs from its record, or was made from other inputs, or the verdict
            does not follow from the comparisons.
        WorldError: an artifact has no record, or an export that the recipe asks for is missing.
    """
    started = time.monotonic()
    decision = Decision.read(decision_dir)
    check_verdict(decision)
    if decision.verdict != "promote":
        raise UserError(
            f"the verdict is {decision.verdict} ({decision.reason}), but only a promoted model is "
            "published. Improve the model or change the recipe's gate, then run again"
        )
    target = encode_list(check_targets(decode_list(target)))
    targets = parse_targets(target)
    # Read before large files are hashed, which can take an hour, so that a missing token is found
    # early.
    if targets[0].kind == "hub":
        read_token(targets[0].text)
    sources = Sources.read(
        RunHeader.parse(recipe, where="recipe"),
        base_model_dir=Path(base_model_dir),
        dataset_dir=Path(dataset_dir),
        adapter_dir=Path(adapter_dir),
        merged_dir=Path(merged_dir),
        exports_dirs=[Path(path) for path in exports_dirs],
        decision_dir=Path(decision_dir),
        quantize_config=quantize_config or None,
    )
    name = family_name(targets, sources.header.name)
    used = recorded_recipe(
        sources.header,
        origin=sources.origin,
        dataset=sources.dataset,
        training=sources.training,
        merge=sources.merge,
        exports=list(sources.exports.values()),
        decision=decision,
        target=target,
        publish=config.model_dump(mode="json"),
    )
    if used.differences:
        logger.warning("%s", used.remark)
    held = decision.held_exports()
    for format, why in held.items():
        logger.warning("the export %s is held and is not published: %s", format, why)
    with new_directory(published_dir) as record_dir:
        with scratch_directory(record_dir, prefix=".publish.") as scratch:
            root = scratch / "all"
            staged = stage(
                sources,
                name=name,
                config=config,
                recipe=used.public(),
                directory=root,
                run_id=run_id,
            )
            repos = publish_everywhere(staged, targets, config=config, scratch=scratch / "each")
        record = Published(
            target=", ".join(each.text for each in targets),
            private=all(repo.private is not False for repo in repos),
            repos=repos,
            left_out=[f"{repo.repo}: {name}" for repo in staged for name in repo.left_out],
            held_exports=held,
            run_id=run_id,
            recipe_sha256=used.public().sha256,
            seconds=round(time.monotonic() - started, 3),
        )
        write_serving(sources, name, record.repos, record_dir)
        record.write(record_dir, config, parents=(sources.merge, decision))
    for repo in record.repos:
        logger.info("published %s: %d files, %d bytes", repo.url, repo.num_files, repo.num_bytes)
    urls = ", ".join(" ".join(filter(None, (repo.url, repo.tag))) for repo in record.repos)
    without = f"; held exports: {', '.join(held)}" if held else ""
    leave(Ending(step="publish", result="published", text=f"{urls}{without}"))
    return record
