"""What combined patches have besides deltas: tokenizer, template, value head, rows of added tokens; where they agree.

None of these adds up. Where two patches differ in one, neither is dropped: the combination is refused, by name.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from portllm.checkpoint.model.side_files import HEAD_FILE
from portllm.checkpoint.vocabulary import TOKENIZER_FILE
from portllm.errors import Refusal
from portllm.files.input_file import read_input
from portllm.files.json_file import read_json
from portllm.files.source import LocalFile
from portllm.matching.added_tokens import vocabulary_of
from portllm.matching.side_files import TOKENIZER_CONFIG, is_same
from portllm.patch.adapter_tensors import WEIGHT
from portllm.patch.patch import Patch
from portllm.patch.side_files import TEMPLATE_FILES, VOCABULARY_FILES
from portllm.tensors.info import TensorInfo
from portllm.tensors.windows import load_values

Patches = Sequence[Patch[TensorInfo]]

PARTS = ("model", "normalizer", "pre_tokenizer", "post_processor", "decoder")
"""Of a `tokenizer.json`, what makes tokens of a text; the rest says which were added, and how rows are padded."""


@dataclass(frozen=True, slots=True)
class Agreed:
    """What goes along with a combination.

    Attributes:
        files: Beside it, by name.
        texts: Files that are written, by name.
        added: Tokens that were added to the vocabulary for one of the patches, with their rows.
        rows: By tensor and row, where the value of an added token's row is: in which tensor, at which place.
        config: The fields of the configuration that name these rows.
        refusals: Why patches do not agree.
    """

    files: Mapping[str, LocalFile]
    texts: Mapping[str, str]
    added: Mapping[str, int]
    rows: Mapping[str, Mapping[int, tuple[TensorInfo, int]]]
    config: Mapping[str, object]
    refusals: tuple[Refusal, ...]


def agree(patches: Patches) -> Agreed:
    """Gather what goes along with a combination of patches, each of which has a record."""
    first = max(patches, key=lambda patch: (len(vocabulary_of(patch) or {}), _template(patch) is not None))
    refusals = [refusal for patch in patches for refusal in _other_tokens(patch, first)]
    heads = [patch for patch in patches if HEAD_FILE in patch.beside]
    told = {patch.name: template for patch in patches if (template := _template(patch)) is not None}
    refusals += [
        *_other_than_first({patch.name: read_input(patch.beside[HEAD_FILE].path) for patch in heads}, "value head"),
        *_other_than_first(told, "chat template"),
    ]
    files = {name: file for name, file in first.beside.items() if name != HEAD_FILE}
    files |= {} if not heads else {HEAD_FILE: heads[0].beside[HEAD_FILE]}
    texts = {} if _template(first) is not None or not told else {TEMPLATE_FILES[0]: next(iter(told.values()))}
    added: dict[str, int] = {}
    for patch in patches:
        added |= {} if patch.record is None else patch.record.added_tokens
    rows, unlike = _rows(patches, {row: token for token, row in added.items()})
    named = {
        key: sorted({row for name, found in rows.items() if _stands_for(key, name, rows) for row in found})
        for patch in patches
        for key in _keys(patch)
    }
    return Agreed(
        dict(sorted(files.items())),
        texts,
        dict(sorted(added.items(), key=lambda pair: pair[1])),
        rows,
        {"trainable_token_indices": named} if rows else {},
        (*refusals, *unlike),
    )


def is_of_added_tokens(patch: Patch[TensorInfo]) -> bool:
    """Whether all rows that a patch trained are of tokens that were added for it, or pad the vocabulary behind them."""
    own = set() if patch.record is None else set(patch.record.added_tokens.values())
    last = max(own, default=1 << 31)
    return all(row in own or row > last for rows in patch.rows.values() for row in rows.rows)


WAY = " Capture one of them again from an adapter folder with the other's files, or without them."


def _other_tokens(patch: Patch[TensorInfo], first: Patch[TensorInfo]) -> Iterator[Refusal]:
    """Why a patch's tokenizer reads text otherwise than another one with as many tokens or more."""
    if patch is first or not {*VOCABULARY_FILES} & patch.beside.keys():
        return
    mine, theirs = vocabulary_of(patch) or {}, vocabulary_of(first) or {}
    odd = next((token for token, row in mine.items() if theirs.get(token) != row), None)
    if odd is not None:
        other = f"row {theirs[odd]}" if odd in theirs else "no such token"
        yield Refusal(
            patch.name, f"its tokenizer has {odd[:40]!r} in row {mine[odd]}, that of {first.name} has {other}.{WAY}"
        )
        return
    for name in VOCABULARY_FILES:
        files = [each.beside[name].path for each in (patch, first) if name in each.beside]
        if len(files) == 2 and not is_same(*files) and not (name == TOKENIZER_FILE and _splits_alike(*files)):
            yield Refusal(patch.name, f"its {name} reads text otherwise than that of {first.name}.{WAY}")


def _splits_alike(*files: Path) -> bool:
    one, other = ({part: values.get(part) for part in PARTS} for values in (read_json(file) for file in files))
    return one == other


def _other_than_first(found: Mapping[str, object], what: str) -> Iterator[Refusal]:
    """Why patches have no common part, which each of them has by its name."""
    first = next(iter(found), "")
    for name, value in found.items():
        if value != found[first]:
            yield Refusal(name, f"its {what} differs from that of {first}, and a combination has only one.{WAY}")


def _template(patch: Patch[TensorInfo]) -> str | None:
    """A patch's chat template, in whichever file it is."""
    for name in (*TEMPLATE_FILES, TOKENIZER_CONFIG):
        if name in patch.beside:
            file = patch.beside[name].path
            found = read_input(file).decode() if file.suffix == ".jinja" else read_json(file).get("chat_template")
            if found:
                return found if isinstance(found, str) else json.dumps(found)
    return None


def _rows(
    patches: Patches, tokens: Mapping[int, str]
) -> tuple[dict[str, dict[int, tuple[TensorInfo, int]]], list[Refusal]]:
    """Where the value of each row of an added token is, by tensor, and rows of which two patches have two values."""
    found: dict[str, dict[int, tuple[TensorInfo, int]]] = {}
    owners: dict[tuple[str, int], str] = {}
    refusals = []
    for patch in patches:
        for name, rows in patch.rows.items():
            for place, row in enumerate(rows.rows):
                info, there = found.setdefault(name, {}).setdefault(row, (rows.values, place))
                owner = owners.setdefault((name, row), patch.name)
                if info is not rows.values and not _same_row((info, there), (rows.values, place)):
                    what = repr(tokens[row]) if row in tokens else "padding"
                    refusals.append(
                        Refusal(
                            patch.name,
                            f"its row {row} of {name} ({what}) differs from that of {owner}: each trained the token on "
                            "its own, and two such rows do not add up. Train both from one adapter with these tokens.",
                        )
                    )
    return {name: dict(sorted(rows.items())) for name, rows in sorted(found.items())}, refusals[:1]


def _same_row(*places: tuple[TensorInfo, int]) -> bool:
    one, other = (load_values(info, row * info.shape[1], (row + 1) * info.shape[1]) for info, row in places)
    return np.array_equal(one, other)


def _keys(patch: Patch[TensorInfo]) -> list[str]:
    """The names by which a configuration means the modules of trained rows."""
    named = patch.config.fields.get("trainable_token_indices")
    return list(named) if isinstance(named, dict) else [name.removesuffix(WEIGHT) for name in patch.rows]


def _stands_for(key: str, name: str, rows: Mapping[str, object]) -> bool:
    """Whether a name means the module of a tensor, or one that is tied to it and has no rows of its own."""

    def means(other: str) -> bool:
        return f".{other.removesuffix(WEIGHT)}".endswith(f".{key}")

    return means(name) or not any(map(means, rows))
