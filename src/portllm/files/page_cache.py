"""What the kernel is told of the files that stream through its cache; a system that cannot be told does as it likes."""

import os

STEP_BYTES = 1 << 24
"""How far ahead of a reader the kernel fetches, and in what portions it begins to write out behind a writer."""

LARGE_SHARE = 0.25
"""Of the machine's memory: what is read or written beyond it would push other files out of the cache."""


def is_large(n_bytes: int) -> bool:
    """Whether so many bytes are better not kept in the cache when they have passed through it."""
    return n_bytes > LARGE_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def fetch(descriptor: int, start: int, n_bytes: int) -> None:
    """Read these bytes of a file into the cache, without waiting for them."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, n_bytes, os.POSIX_FADV_WILLNEED)


def release(descriptor: int, start: int = 0, n_bytes: int = 0) -> None:
    """Begin to write out what of these bytes is not on the disk yet, and drop the rest from the cache.

    Zero bytes mean: to the end. Linux begins to write before it looks for what can be dropped, so that a call behind a
    writer keeps the disk busy and one after `fsync` empties the cache.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, n_bytes, os.POSIX_FADV_DONTNEED)
