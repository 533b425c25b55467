"""Whose tokenizer and chat template a merged model gets: the model's own, or those that the patch was trained with."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.open import side_file
from portllm.checkpoint.tensor.info import TensorInfo
from portllm.checkpoint.vocabulary import read_vocabulary, vocabulary_in
from portllm.errors import CheckpointError, Refusal
from portllm.files.input_file import read_input
from portllm.files.json_file import read_json
from portllm.files.source import LocalFile
from portllm.patch.patch import Patch
from portllm.patch.side_files import SIDE_FILES, TEMPLATE_FILES, VOCABULARY_FILES, uncopyable

OPTION = "--tokenizer"
BASE, PATCH = "base", "patch"
TOKENIZER_CONFIG = "tokenizer_config.json"
SHOWN = 4


@dataclass(frozen=True, slots=True)
class SideFiles:
    """What lies beside the weights of a merged model, besides what is copied from the model.

    Attributes:
        files: Of the patch, by name.
        texts: Files that are written, by name.
        leave_out: The model's own files that are not copied.
        notes: What a user should know.
        refusals: Why it cannot be said.
    """

    files: Mapping[str, LocalFile] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    leave_out: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    refusals: tuple[Refusal, ...] = ()


NO_SIDE_FILES = SideFiles()
"""Nothing but what is copied from the model."""


def choose_side_files(
    patch: Patch[TensorInfo], model: Checkpoint, *, n_rows: int | None, whose: str | None = None
) -> SideFiles:
    """Choose tokenizer and chat template of a merged model.

    An adapter was trained on inputs that its own tokenizer and template made, so these go along, unless they say of a
    token that it has another row than in the model.

    Args:
        patch: What is merged.
        model: Into what.
        n_rows: Of the merged model's embedding; None where that is not known.
        whose: `base` or `patch`; None to choose.
    """
    differing = [name for name, file in patch.beside.items() if not _is_same(file.path, side_file(model, name))]
    if not differing:
        return NO_SIDE_FILES
    names = ", ".join(differing)
    if whose == BASE:
        return SideFiles(notes=(f"{names}: saved with the patch, differ from those of {model.name} and are left out.",))
    odd = _odd_tokens(patch, model, n_rows) if set(differing) & {*VOCABULARY_FILES, TOKENIZER_CONFIG} else None
    if odd is not None and whose is None:
        way = f"{OPTION} base keeps the model's, {OPTION} patch takes the patch's all the same."
        return SideFiles(refusals=(Refusal(OPTION, f"{odd} {way}"),))
    note = f"{names}: as saved with the patch, where they differ from those of {model.name}; {OPTION} base keeps these."
    has_tokenizer = bool({*VOCABULARY_FILES} & patch.beside.keys())
    is_told = _template_in(patch.beside) is not None
    return SideFiles(
        files=patch.beside,
        texts=dict(_kept_template(model)) if has_tokenizer and not is_told else {},
        leave_out=frozenset(
            {
                *patch.beside,
                *(name for name in SIDE_FILES if has_tokenizer and name not in TEMPLATE_FILES),
                *(TEMPLATE_FILES if is_told else ()),
            }
        ),
        notes=(note, *(() if odd is None else (odd,))),
        refusals=tuple(uncopyable(patch.beside)),
    )


def _is_same(file: Path, other: Path | None) -> bool:
    """Whether two files say the same, byte for byte or as JSON."""
    if other is None:
        return False
    if read_input(file) == read_input(other):
        return True
    try:
        return file.suffix == ".json" and read_json(file) == read_json(other)
    except CheckpointError:
        return False


def _odd_tokens(patch: Patch[TensorInfo], model: Checkpoint, n_rows: int | None) -> str | None:
    """What in the patch's vocabulary contradicts the model, or None."""
    mine, theirs = vocabulary_in({name: file.path for name, file in patch.beside.items()}), read_vocabulary(model)
    if mine is None:
        return None
    beyond = sorted((row, token) for token, row in mine.items() if n_rows is not None and row >= n_rows)
    if beyond:
        return f"the tokenizer saved with the patch has {_listed(beyond)}, but the model has {n_rows} rows."
    moved = sorted((row, token) for token, row in (theirs or {}).items() if mine.get(token, row) != row)
    if moved:
        return f"the tokenizer saved with the patch has other rows for {_listed(moved)} than that of {model.name}."
    return None


def _listed(rows: list[tuple[int, str]]) -> str:
    more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    return ", ".join(f"{token[:40]!r} (row {row})" for row, token in rows[:SHOWN]) + more


def _template_in(files: Mapping[str, LocalFile]) -> str | None:
    """Where files of a tokenizer have a chat template, or None."""
    name = next((name for name in TEMPLATE_FILES if name in files), None)
    if name is None and TOKENIZER_CONFIG in files:
        name = TOKENIZER_CONFIG if read_json(files[TOKENIZER_CONFIG].path).get("chat_template") else None
    return name


def _kept_template(model: Checkpoint) -> Iterator[tuple[str, str]]:
    """The chat template inside a tokenizer's configuration that is not copied, as a file of its own."""
    if any(side_file(model, name) for name in TEMPLATE_FILES):
        return
    config = side_file(model, TOKENIZER_CONFIG)
    template = None if config is None else read_json(config).get("chat_template")
    if isinstance(template, str):
        yield TEMPLATE_FILES[0], template
