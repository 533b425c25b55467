"""What this program writes to disk and reads again: values of one class, in JSON, sealed; nothing else is let in."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

import msgspec

from portllm.files.seal import SEAL, render_sealed
from portllm.files.typed import decode

END = r"$(?!\n)"
"""The end of a text, in patterns; `$` alone is also before a last line break."""


def one_of(*texts: str) -> msgspec.Meta:
    """Of a text: one of a few."""
    pattern = f"^({'|'.join(map(re.escape, texts))}){END}"
    return msgspec.Meta(
        pattern=pattern, description=" or ".join(map(repr, texts)), extra_json_schema={"enum": list(texts)}
    )


Blake3: TypeAlias = Annotated[
    str, msgspec.Meta(pattern=f"^[0-9a-f]{{64}}{END}", description="64 hexadecimal digits, a blake3 digest")
]
NamedBlake3: TypeAlias = Annotated[
    str, msgspec.Meta(pattern=f"^blake3:[0-9a-f]{{64}}{END}", description="blake3: and 64 hexadecimal digits")
]

S = TypeVar("S", bound=msgspec.Struct)


class Recorded(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A value as it stands in a file, where what is as by default is left out and a key that is not known is refused.

    A default that is to be written all the same comes from a `default_factory`.
    """


def encode(value: msgspec.Struct) -> dict[str, Any]:
    """A value as those of JSON, lists in place of tuples; `decode` is the inverse."""
    values: dict[str, Any] = json.loads(json.dumps(msgspec.to_builtins(value)))
    return values


def decode_sealed(cls: type[S], values: Mapping[str, object]) -> S:
    """What the values of a sealed file stand for, whatever its seal.

    Raises:
        ValueError: They do not fit; as for `decode`.
    """
    return decode(cls, {key: value for key, value in values.items() if key != SEAL})


def write_sealed(file: Path, value: msgspec.Struct) -> None:
    """Write a file that says this, and its seal."""
    file.write_text(render_sealed(encode(value)), encoding="utf-8")
