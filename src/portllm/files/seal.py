"""What shows that the small files of a folder are as they were written: digests of whole files, and the seal.

A seal is a digest of all that a JSON file says, kept in the file itself. It catches damage and careless editing; it
does not stop somebody who writes a new one. Who wrote a file is said by a signature (`portllm.verifying.sign`).
"""

import json
from collections.abc import Mapping
from pathlib import Path

from blake3 import blake3

from portllm.files.input_file import open_input

SEAL = "seal"
READ_BYTES = 1 << 22


def seal_of(values: Mapping[str, object]) -> str:
    """`blake3:` and the digest of the values, whatever the order of their keys and the layout of the file.

    It is taken over JSON in one form: keys sorted, no spaces, everything outside ASCII escaped. A seal among the values
    does not count.

    Example:
        >>> seal_of({"b": 1, "a": [0.5]}) == seal_of({"a": [0.5], "b": 1, "seal": "blake3:"})
        True
    """
    said = {key: value for key, value in _as_read(values).items() if key != SEAL}
    return "blake3:" + blake3(json.dumps(said, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def render_sealed(values: Mapping[str, object]) -> str:
    """The text of a file that holds these values and their seal."""
    said = {key: value for key, value in _as_read(values).items() if key != SEAL}
    return json.dumps({**said, SEAL: seal_of(said)}, indent=2, ensure_ascii=False) + "\n"


def seal_problem(values: Mapping[str, object]) -> str | None:
    """What is wrong with the seal of a file that was read, or None.

    Example:
        >>> import json
        >>> read = json.loads(render_sealed({"base": "a"}))
        >>> seal_problem(read), seal_problem({**read, "base": "b"})
        (None, 'its seal does not match its contents: it was corrupted or edited by hand')
    """
    if values.get(SEAL) == seal_of(values):
        return None
    return "its seal does not match its contents: it was corrupted or edited by hand"


def digest_file(file: Path) -> str:
    """The blake3 digest of all bytes of a file.

    Raises:
        OSError: It cannot be read.
    """
    state = blake3()
    with open_input(file) as stream:
        while part := stream.read(READ_BYTES):
            state.update(part)
    return state.hexdigest()


def digest_header(file: Path) -> str:
    """The blake3 digest of the header of a safetensors file: its length, and the JSON part.

    Raises:
        OSError: It cannot be read.
    """
    with open_input(file) as stream:
        length = stream.read(8)
        return blake3(length + stream.read(int.from_bytes(length, "little"))).hexdigest()


def _as_read(values: Mapping[str, object]) -> dict[str, object]:
    """The values as they will be read again: tuples are lists, and every key is a string."""
    read: dict[str, object] = json.loads(json.dumps(dict(values)))
    return read
