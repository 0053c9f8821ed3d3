"""Work on batches in as many processes as there are CPUs, with the results in order.

Few batches are worked on here: a small data set is done before a second process has begun. Only a
few batches are on their way at a time, so memory does not grow with their number. Processes are
forked, so that the function and what it holds (a tokenizer) need no pickling and no loading.
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

NUM_ALONE = 16
"""Batches before the first process is started."""
_NUM_WAITING = 3
"""Batches on their way for each process."""

_function: Callable[[Any], Any]


def batched(rows: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Yield lists of so many rows, the last one of the rest."""
    rows = iter(rows)
    while batch := list(islice(rows, size)):
        yield batch


def in_order(
    function: Callable[[Batch], Result],
    batches: Iterable[Batch],
    *,
    num_processes: int | None = None,
    num_alone: int = NUM_ALONE,
) -> Generator[tuple[Batch, Result], None, None]:
    """Yield each batch with what the function returns for it.

    Args:
        function: called in another process from batch `num_alone` on: what it changes is lost.
        batches: what can be pickled, as can the results.
        num_processes: default: as many as this process may use CPUs.
        num_alone: batches that are worked on in this process first.

    Raises:
        BrokenProcessPool: a process was killed, e.g. for want of memory.
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
    # One thread a process: there are as many processes as CPUs.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _function = function


def _work(batch: Any) -> Any:
    return _function(batch)
