"""Alter one byte of each file of a run, and count what `tuneline verify` says of it.

    python tests/measure/altered_bytes.py RUN_DIR

RUN_DIR is the directory of a finished run on this machine. Each file is altered at its middle, and
restored. A file counts as named if verify finds a difference that it did not find before, and as
listed if verify lists it among the files that have no hash. The script fails if a file is neither.
It hashes the whole run once per file: a run of `demo` with few steps and one export takes minutes.
"""

import re
import sys
from collections import Counter
from pathlib import Path

from tuneline.verify import files_without_hash, verify


def differences(run_dir: Path) -> set[tuple[Path, str]]:
    return {(found.path, words) for found in verify(run_dir) for words in found.differences}


def alter(path: Path, place: int) -> None:
    with open(path, "r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def main() -> None:
    run_dir = Path(sys.argv[1])
    before = differences(run_dir)
    listed = files_without_hash(run_dir)
    names = {name.rpartition(" x ")[2] for name in listed}
    counts: Counter[str] = Counter()
    silent = []
    files = [path for path in sorted(run_dir.rglob("*")) if path.is_file() and path.stat().st_size]
    for path in files:
        place = path.stat().st_size // 2
        alter(path, place)
        try:
            is_named = differences(run_dir) != before
        finally:
            alter(path, place)
        relative = path.relative_to(run_dir).as_posix()
        # Events of earlier attempts are listed as events.jsonl.
        is_listed = bool({relative, path.name, re.sub(r"-\d+\.", ".", path.name)} & names)
        outcome = "named" if is_named else "listed" if is_listed else "silent"
        counts[outcome] += 1
        if outcome != "named":
            print(f"{outcome}: {relative}", flush=True)
        silent += [relative] if outcome == "silent" else []
    print(f"{len(files)} files: {dict(counts)}; differences before: {len(before)}")
    for name, what in listed.items():
        print(f"without a hash: {name}: {what}")
    assert differences(run_dir) == before, "the files were restored"
    sys.exit(1 if silent else 0)


if __name__ == "__main__":
    main()
