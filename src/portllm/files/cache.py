"""Where this program keeps what it can make again: one folder for each user, safe to delete at any time."""

import os
from pathlib import Path

CACHE_VARIABLE = "PORTLLM_CACHE"


def cache_root() -> Path:
    """The user's cache folder of this program; it need not exist yet.

    It is `$PORTLLM_CACHE` if that is set, else `$XDG_CACHE_HOME/portllm`, else `~/.cache/portllm`. A relative
    `$XDG_CACHE_HOME` is ignored, as the XDG Base Directory Specification asks.
    """
    own = os.environ.get(CACHE_VARIABLE, "")
    if own:
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(shared) if os.path.isabs(shared) else Path.home() / ".cache") / "portllm"
