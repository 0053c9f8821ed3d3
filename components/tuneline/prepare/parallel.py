"""Apply a function to batches in one process per CPU, and yield the results in order.

The first batches are processed in the calling process, because a small dataset is finished before a
worker would have started. At most `_NUM_WAITING` batches per worker are submitted and not yet
yielded, so memory does not grow with the number of batches. Workers are forked, so the function and
the tokenizer that it uses are neither pickled nor loaded again.
"""

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain, islice
from typing import Any, TypeVar

Batch = TypeVar("Batch")
Result = TypeVar("Result")

NUM_ALONE = 4
"""Number of batches to process before the first worker is started."""
_NUM_WAITING = 3
"""Largest number of batches per worker that are submitted and not yet yielded."""

_function: Callable[[Any], Any]


def batched(rows: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Yield lists of `size` rows; the last list may be shorter."""
    rows = iter(rows)
    while batch := list(islice(rows, size)):
        yield batch


def ranges(total: int, size: int) -> Iterator[range]:
    """Yield the numbers from 0 to `total` - 1 in ranges of `size`; the last one may be shorter."""
    for first in range(0, total, size):
        yield range(first, min(first + size, total))


def in_order(
    function: Callable[[Batch], Result],
    batches: Iterable[Batch],
    *,
    num_processes: int | None = None,
    num_alone: int = NUM_ALONE,
) -> Generator[tuple[Batch, Result], None, None]:
    """Yield each batch with the function's result for it.

    Args:
        function: function to apply to a batch. From batch `num_alone` on, workers call the
            function, so its side effects are lost.
        batches: the batches; both batches and results must be picklable.
        num_processes: number of workers. Default: the number of CPUs that this process may use.
        num_alone: number of batches to process in the calling process first.

    Raises:
        BrokenProcessPool: a worker was killed, e.g. because memory ran out.
    """
    num_processes = num_processes or len(os.sched_getaffinity(0))
    batches = iter(batches)
    for batch in batches if num_processes == 1 else islice(batches, num_alone):
        yield batch, function(batch)
    following = next(batches, None)
    if following is None:
        return
    pool = ProcessPoolExecutor(
        num_processes,
        mp_context=multiprocessing.get_context("fork"),
        initializer=_become,
        initargs=(function,),
    )
    waiting: deque[tuple[Batch, Future[Result]]] = deque()
    try:
        for batch in chain([following], batches):
            waiting.append((batch, pool.submit(_work, batch)))
            if len(waiting) > _NUM_WAITING * num_processes:
                batch, future = waiting.popleft()
                yield batch, future.result()
        while waiting:
            batch, future = waiting.popleft()
            yield batch, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _become(function: Callable[[Any], Any]) -> None:
    global _function
    # One thread per worker: there is already one worker per CPU.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _function = function


def _work(batch: Any) -> Any:
    return _function(batch)
