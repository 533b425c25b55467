"""Which names mean a repository of the hub."""

import os
import re
from pathlib import Path

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?P<revision>@(?!.*\.\.)\w[\w./-]*)?")

MAX_NAME_LENGTH = 250
"""Of a model of the hub, with its revision; a name there has 96 characters at most."""


def names_hub(where: str | Path) -> bool:
    """Whether a name means a repository of the hub: `org/name@revision`, or `org/name` that can be no path.

    Where there is a folder `org`, `org/name` is a path, perhaps a mistyped one, and is not sent over the network.

    Example:
        >>> [names_hub(name) for name in ("org/name", "org/name@main", "models/m.safetensors", "./org/name")]
        [True, True, False, False]
    """
    match = HUB_ID.fullmatch(str(where))
    if match is None or len(str(where)) > MAX_NAME_LENGTH:
        return False
    if os.path.exists(where) or str(where).endswith(".safetensors"):
        return False
    return match["revision"] is not None or not os.path.exists(Path(where).parent)
