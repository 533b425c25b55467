"""Which token each row of an embedding stands for: `tokenizer.json`, as far as that."""

from collections.abc import Mapping
from pathlib import Path

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.open import side_file
from portllm.errors import CheckpointError
from portllm.files.input_file import read_input
from portllm.files.json_file import MAX_JSON_BYTES, read_json

TOKENIZER_FILE = "tokenizer.json"
ADDED_FILE = "added_tokens.json"
TOKENIZER_CONFIG = "tokenizer_config.json"

MAX_ROWS = 1 << 31
"""Token ids are 32-bit numbers in every tokenizer."""


def read_vocabulary(checkpoint: Checkpoint) -> Mapping[str, int] | None:
    """The row of each token by its string, or None where the checkpoint has no `tokenizer.json` that says so.

    Raises:
        CheckpointError: The file is damaged.
    """
    file = side_file(checkpoint, TOKENIZER_FILE)
    return None if file is None else _parsed(file)


def vocabulary_in(files: Mapping[str, Path]) -> Mapping[str, int] | None:
    """The row of each token that some files of a tokenizer, by name, tell of; None where they tell of none.

    Where there is no `tokenizer.json`, as with older tokenizers, the added tokens are known, and those of `vocab.json`.

    Raises:
        CheckpointError: A file is damaged.
    """
    if TOKENIZER_FILE in files:
        return _parsed(files[TOKENIZER_FILE])
    rows: dict[str, object] = {}
    for name in ("vocab.json", ADDED_FILE):
        if name in files:
            rows |= read_json(files[name])
    if TOKENIZER_CONFIG in files:
        decoder = read_json(files[TOKENIZER_CONFIG]).get("added_tokens_decoder")
        for row, entry in decoder.items() if isinstance(decoder, dict) else ():
            match entry:
                case {"content": str(token)} if row.isdecimal() and len(row) < 11:
                    rows[token] = int(row)
    return {token: row for token, row in rows.items() if type(row) is int and 0 <= row < MAX_ROWS} or None


def _parsed(file: Path) -> Mapping[str, int] | None:
    try:
        return parse_vocabulary(read_json(file))
    except ValueError as error:
        raise CheckpointError(f"'{file}': {error}. The tokenizer is corrupt: download it again.") from error


def added_entries(file: Path) -> dict[str, Mapping[str, object]]:
    """The added tokens of a `tokenizer.json` by their string, each as it is written there.

    Raises:
        CheckpointError: The file is damaged.
    """
    listed = read_json(file).get("added_tokens")
    return {
        entry["content"]: entry
        for entry in (listed if isinstance(listed, list) else [])
        if isinstance(entry, dict) and isinstance(entry.get("content"), str)
    }


def has_same_tokenizer(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two checkpoints have the same `tokenizer.json`, byte for byte; that is seen sooner than it is parsed."""
    files = [side_file(checkpoint, TOKENIZER_FILE) for checkpoint in (one, other)]
    try:
        contents = [read_input(file, most=MAX_JSON_BYTES) for file in files if file is not None]
    except OSError:  # parsing says what is wrong
        return False
    return len(contents) == 2 and contents[0] == contents[1]


def parse_vocabulary(tokenizer: Mapping[str, object]) -> Mapping[str, int] | None:
    """The row of each token by its string; None where the tokenizer lists no tokens.

    Added tokens come last and win, as they do in the tokenizers library.

    Raises:
        ValueError: A token has no row that an embedding could have.

    Example:
        >>> parse_vocabulary({"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2, "content": "<end>"}]})
        {'a': 0, 'b': 1, '<end>': 2}
        >>> parse_vocabulary({"model": {"vocab": [["a", -1.5], ["b", -2.5]]}})
        {'a': 0, 'b': 1}
    """
    model = tokenizer.get("model")
    listed = model.get("vocab") if isinstance(model, dict) else None
    rows: dict[str, int] = {}
    if isinstance(listed, dict):
        rows = dict(listed)
    elif isinstance(listed, list):  # Unigram: pairs of token and score, in the order of rows
        rows = {pair[0]: row for row, pair in enumerate(listed) if _is_scored(pair)}
    added = tokenizer.get("added_tokens")
    for entry in added if isinstance(added, list) else []:
        match entry:
            case {"content": str(token), "id": row}:
                rows[token] = row
    for token, row in rows.items():
        if type(row) is not int or not 0 <= row < MAX_ROWS:
            raise ValueError(f"token {token[:80]!r} has the row {str(row)[:20]!r}, which is not a valid row")
    return rows or None


def _is_scored(pair: object) -> bool:
    return isinstance(pair, list) and bool(pair) and isinstance(pair[0], str)
