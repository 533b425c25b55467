"""One thread for arithmetic whose bytes are kept: a decomposition rounds otherwise on another number of threads."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread while the block runs.

    Example:
        >>> with one_thread():
        ...     torch.get_num_threads()
        1
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def one_thread_each(most: int) -> Iterator[ThreadPoolExecutor]:
    """Workers that compute on one thread each: as many as torch was to use threads, and at most `most`.

    What a worker computes has the same bytes whatever their number.

    Example:
        >>> with one_thread_each(2) as workers:
        ...     list(workers.map(lambda _: torch.get_num_threads(), range(3)))
        [1, 1, 1]
    """
    count = max(1, min(most, torch.get_num_threads()))
    with one_thread():
        workers = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))  # a thread's own setting
        try:
            yield workers
        finally:
            workers.shutdown(cancel_futures=True)
