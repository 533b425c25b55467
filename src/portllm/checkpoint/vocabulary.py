"""Which token each row of an embedding stands for: `tokenizer.json`, as far as that."""

from collections.abc import Mapping
from typing import cast

from portllm.checkpoint.reader import Checkpoint, read_json, side_file

TOKENIZER_FILE = "tokenizer.json"


def read_vocabulary(checkpoint: Checkpoint) -> Mapping[str, int] | None:
    """The row of each token by its string, or None where the checkpoint has no `tokenizer.json` that says so.

    Raises:
        CheckpointError: The file is damaged.
    """
    file = side_file(checkpoint, TOKENIZER_FILE)
    return None if file is None else parse_vocabulary(read_json(file))


def parse_vocabulary(tokenizer: Mapping[str, object]) -> Mapping[str, int] | None:
    """The row of each token by its string; None where the tokenizer lists no tokens.

    Added tokens come last and win, as they do in the tokenizers library.

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
        rows = {token: row for token, row in listed.items() if isinstance(row, int)}
    elif isinstance(listed, list):  # Unigram: pairs of token and score, in the order of rows
        rows = {pair[0]: row for row, pair in enumerate(listed) if isinstance(pair, list) and pair}
    for added in cast(list[object], tokenizer.get("added_tokens") or []):
        match added:
            case {"content": str(token), "id": int(row)}:
                rows[token] = row
    return rows or None
