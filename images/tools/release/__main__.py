"""Write a release to dist/; `make release` runs this module."""

import argparse
import datetime
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from release import bills, containers, packages, signing
from release.containers import Image
from release.provenance import statement
from release.source import Source, read_source
from tuneline.errors import OutputExistsError, TunelineError, UserError
from tuneline.images import has_host
from tuneline.runtime.redaction import redacted
from tuneline.steps import IMAGE_SETS
from tuneline.version import VERSION

ROOT = Path(__file__).parents[3]
DIST = ROOT / "dist"
LOCKS = ROOT / "images"
TOOLS = LOCKS / "tools" / "requirements.lock"
LINE = LOCKS / "line" / "requirements.lock"


def main(arguments: list[str] | None = None) -> int:
    """Make the release, and return the exit code."""
    parser = argparse.ArgumentParser(prog="make release", description=__doc__)
    parser.add_argument("--images", default="yes", help="yes or no")
    parser.add_argument("--sets", default=" ".join(IMAGE_SETS), help="dependency sets of images")
    parser.add_argument("--torch", default="cuda", help="cuda or cpu, as for `make images`")
    parser.add_argument("--build-args", default="", help="BUILD_ARGS of `make images`")
    parser.add_argument("--registry", default="", help="where the images are pushed")
    options = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # In a log, these lines and those of the programs that are started stay in order.
        sys.stdout.reconfigure(line_buffering=True)
    try:
        _release(options, os.environ)
    except TunelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _release(options: argparse.Namespace, variables: Mapping[str, str]) -> None:
    started = datetime.datetime.now(datetime.UTC)
    sets, registry = _check(options)
    source = read_source(ROOT, VERSION)
    for note in source.notes:
        print(f"note: {note}")
    key = variables.get("COSIGN_KEY", "")
    if key:
        signing.check_cosign()
    tools: dict[str, str] = {}
    if sets:
        tools["container engine"] = containers.engine_version()
    with tempfile.TemporaryDirectory(prefix="tuneline-release-") as name:
        scratch = Path(name)
        made = scratch / "dist"
        made.mkdir()
        python = packages.make_tools(TOOLS, sys.executable, scratch / "tools")
        for path in packages.build_packages(source, python, scratch):
            shutil.copyfile(path, made / path.name)
            print(f"{path.name}: built twice, the same bytes")
        locks = _write_bills(source, python, options.torch, made)
        images = _make_images(sets, registry, python, made)
        materials = [containers.base_image(options.build_args, ROOT)] if sets else []
        document = statement(
            source,
            files=sorted(made.iterdir()),
            images=images,
            locks=locks,
            materials=materials,
            parameters={
                "images": sets,
                "registry": registry,
                "torch": options.torch,
                # The address of an index may have a password in it.
                "buildArguments": redacted(options.build_args),
            },
            tools=tools,
            started=started,
        )
        _write(made / "provenance.intoto.json", document)
        sums = signing.write_sums(made)
        if key:
            signed = signing.sign(sums, images, key, variables.get("COSIGN_ARGS", ""))
            print(f"signed by cosign: {', '.join(signed)}")
        else:
            print("nothing is signed, because COSIGN_KEY names no key")
        shutil.copytree(made, DIST, dirs_exist_ok=True)
    print(f"wrote {DIST}: {', '.join(sorted(path.name for path in DIST.iterdir()))}")


def _check(options: argparse.Namespace) -> tuple[list[str], str | None]:
    """Return the dependency sets of the images to build, and the registry or None."""
    if options.images not in ("yes", "no"):
        raise UserError(f"IMAGES is '{options.images}': write yes or no")
    if options.torch not in ("cuda", "cpu"):
        raise UserError(f"TORCH is '{options.torch}': write cuda or cpu")
    registry = options.registry or None
    if registry is not None and not has_host(registry):
        raise UserError(
            f"REGISTRY is '{registry}', which names no host: write it with its host, e.g. "
            f"registry.example.com/{registry}"
        )
    unknown = sorted(set(options.sets.split()) - set(IMAGE_SETS))
    if unknown:
        raise UserError(f"SETS has {', '.join(unknown)}: choose among {', '.join(IMAGE_SETS)}")
    if DIST.exists() and any(DIST.iterdir()):
        raise OutputExistsError(f"{DIST} has files, and nothing is overwritten: move or remove it")
    if options.images == "no":
        print("images: not built, as IMAGES=no asks; images.json and their bills are left out")
        return [], None
    return options.sets.split(), registry


def _write_bills(source: Source, python: Path, torch: str, made: Path) -> list[Path]:
    """Write a bill of the whole line and of each image's lock; return the locks."""
    locks = {"line": [LINE]}
    for name in IMAGE_SETS:
        folder = LOCKS / name
        needs_torch = "torch" in (folder / "requirements.in").read_text("utf-8").splitlines()
        below = [LOCKS / "torch" / f"{torch}.lock"] if needs_torch else []
        locks[name] = [*below, folder / "requirements.lock"]
    purl = f"pkg:pypi/tuneline@{source.version}"
    for name, files in locks.items():
        subject = {"type": "application", "bom-ref": purl, "name": "tuneline", "purl": purl}
        subject |= {"version": source.version, "description": f"dependencies, set {name}"}
        text = bills.bill_of_locks(files, python, subject, source.epoch)
        (made / f"sbom-{name}.cdx.json").write_text(text, encoding="utf-8")
    return sorted({TOOLS, *(lock for files in locks.values() for lock in files)})


def _make_images(sets: list[str], registry: str | None, python: Path, made: Path) -> list[Image]:
    """Build and push the images; write their bills, and their digests if they were pushed."""
    if not sets:
        return []
    containers.build(sets, ROOT)
    images = [containers.push(name, registry) for name in sets]
    for image in images:
        bill, debian, system = containers.contents(image)
        text = bills.bill_of_image(bill, debian, system, image.subject, python)
        (made / f"sbom-{image.set_name}-image.cdx.json").write_text(text, encoding="utf-8")
        print(f"{image.name}: {image.digest or f'{image.identity} on this machine'}")
    if registry is None:
        print("images: not pushed, because REGISTRY names no registry; images.json is left out")
    else:
        _write(made / "images.json", {image.name: image.digest for image in images})
    return images


def _write(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
