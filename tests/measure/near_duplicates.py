"""Measure the search for near duplicates: seconds, peak memory, and how many it finds.

    python tests/measure/near_duplicates.py ROWS.jsonl --rows 100000 1000000

ROWS.jsonl has the columns `question` and `answer` (as GSM8K has). Each text is that of a row with
every fifth word replaced at random, so that no two are similar. One text in 100 is a copy of an
earlier text with one word changed; the search has to find it. Memory is the proportional set size
of the process and its children, read five times per second.
"""

import argparse
import json
import os
import resource
import tempfile
import threading
import time
from pathlib import Path

import numpy
from prepare_throughput import memory

from tuneline.prepare.rows.groups import Groups
from tuneline.prepare.rows.words import WordFile, word_hashes, words_of

COPIES = 100
"""One text in this number is a copy."""


def main() -> None:
    """Print one line per number of rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows_file", type=Path)
    parser.add_argument("--rows", nargs="+", type=int, default=[20000, 100000])
    args = parser.parse_args()
    lines = args.rows_file.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    texts = [
        numpy.array(word_hashes(words_of(f"{row['question']} {row['answer']}")), numpy.uint32)
        for row in rows
    ]
    print(f"{'rows':>9} {'seconds':>8} {'CPU s':>8} {'peak GiB':>9} {'found':>7} {'wrong':>6}")
    for num_rows in args.rows:
        with tempfile.TemporaryDirectory() as root:
            print(measure(texts, num_rows, Path(root)), flush=True)


def measure(texts: list[numpy.ndarray], num_rows: int, root: Path) -> str:
    """Return the line of a number of rows."""
    random = numpy.random.default_rng(0)
    words = WordFile(root / "words")
    copied = {}
    for number in range(num_rows):
        if number % COPIES == COPIES - 1:
            copied[number] = int(random.integers(number))
            first = words.read(copied[number], copied[number] + 1).words.copy()
            first[len(first) // 2] += 1
        else:
            first = texts[number % len(texts)].copy()
            first[::5] = random.integers(2**32, size=len(first[::5]), dtype=numpy.uint32)
        words.append(first.tobytes(), [len(first)])
    keys = numpy.arange(1, num_rows + 1, dtype=numpy.uint64)
    groups = Groups(keys, numpy.arange(num_rows), keys, keys)
    peak = [0]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            peak[0] = max(peak[0], memory(os.getpid()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    before, started = cpu_seconds(), time.perf_counter()
    groups.link_near(words, root)
    seconds, spent = time.perf_counter() - started, cpu_seconds() - before
    done.set()
    watcher.join()
    numbers = groups.numbers()
    found = sum(int(numbers[copy] == numbers[original]) for copy, original in copied.items())
    wrong = int((numbers != keys.astype(numpy.int64) - 1).sum()) - found
    return (
        f"{num_rows:9} {seconds:8.1f} {spent:8.1f} {peak[0] / 2**30:9.2f} "
        f"{found / len(copied):7.2%} {wrong:6}"
    )


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its children that have ended, in seconds."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


if __name__ == "__main__":
    main()
