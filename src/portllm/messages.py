"""What other packages write to the terminal while they are loaded."""

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def errors_only(package: str) -> Iterator[None]:
    """Of what a package logs inside the block, only errors are shown; its level is as before after it."""
    logger = logging.getLogger(package)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
