"""What of the files beside a patch a merged or ported model gets: tokenizer, chat template and value head."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.model.side_files import HEAD_FILE
from portllm.checkpoint.open import side_file
from portllm.checkpoint.vocabulary import TOKENIZER_FILE, added_entries, parse_vocabulary, read_vocabulary
from portllm.errors import CheckpointError, Refusal
from portllm.files.input_file import read_input
from portllm.files.json_file import read_json
from portllm.files.source import LocalFile
from portllm.matching.added_tokens import vocabulary_of
from portllm.patch.patch import Patch
from portllm.patch.side_files import TEMPLATE_FILES, TOKENIZER_FILES, VOCABULARY_FILES, uncopyable
from portllm.tensors.info import TensorInfo

OPTION = "--tokenizer"
BASE, PATCH = "base", "patch"
TOKENIZER_CONFIG = "tokenizer_config.json"
SHOWN = 4

HEAD_NOTE = (
    "the patch's value head, beside the weights, where LLaMA-Factory and others load it and transformers does not."
)

PLAIN_TOKEN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
"""What a `tokenizer.json` says of an added token of which nothing is known."""


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
    """Choose tokenizer and chat template of a merged model; a value head is always the patch's.

    An adapter was trained on inputs that its own tokenizer and template made, so these go along, unless they say of a
    token that it has another row than in the model.

    Args:
        patch: What is merged.
        model: Into what.
        n_rows: Of the merged model's embedding; None where that is not known.
        whose: `base` or `patch`; None to choose.
    """
    heads = {name: file for name, file in patch.beside.items() if name == HEAD_FILE}
    rest = {name: file for name, file in patch.beside.items() if name != HEAD_FILE}
    chosen = _choose_tokenizer(replace(patch, beside=rest), model, n_rows, whose)
    return replace(
        chosen,
        files={**chosen.files, **heads},
        leave_out=chosen.leave_out.union(heads),
        notes=(*chosen.notes, *(f"{name}: {HEAD_NOTE}" for name in heads)),
        refusals=(*chosen.refusals, *uncopyable(heads)),
    )


def _choose_tokenizer(patch: Patch[TensorInfo], model: Checkpoint, n_rows: int | None, whose: str | None) -> SideFiles:
    differing = [name for name, file in patch.beside.items() if not is_same(file.path, side_file(model, name))]
    if not differing:
        return NO_SIDE_FILES
    names = ", ".join(differing)
    if whose == BASE:
        return SideFiles(notes=(f"{names}: saved with the patch, differ from those of {model.name} and are left out.",))
    odd = _odd_tokens(patch, model, n_rows) if set(differing) & {*VOCABULARY_FILES, TOKENIZER_CONFIG} else None
    if odd is not None and whose is None:
        way = f"{OPTION} base keeps the model's, {OPTION} patch takes the patch's all the same."
        return SideFiles(refusals=(Refusal(OPTION, f"{odd} {way}", is_of_input=True),))
    note = f"{names}: as saved with the patch, where they differ from those of {model.name}; {OPTION} base keeps these."
    has_tokenizer = bool({*VOCABULARY_FILES} & patch.beside.keys())
    is_told = _template_in(patch.beside) is not None
    return SideFiles(
        files=patch.beside,
        texts=dict(_kept_template(model)) if has_tokenizer and not is_told else {},
        leave_out=frozenset(
            {
                *patch.beside,
                *(TOKENIZER_FILES if has_tokenizer else ()),
                *(TEMPLATE_FILES if is_told else ()),
            }
        ),
        notes=(note, *(() if odd is None else (odd,))),
        refusals=tuple(uncopyable(patch.beside)),
    )


def ported_side_files(
    patch: Patch[TensorInfo], base: Checkpoint | None, evolved: Checkpoint, added: Mapping[str, int]
) -> SideFiles:
    """The tokenizer and chat template of a ported patch.

    They are the patch's own where its tokenizer says of every token of the evolved model, and of every one of its own,
    which row it has there. Else the tokenizer is the evolved model's with the patch's own tokens behind, and the chat
    template stays the patch's.

    Args:
        patch: What is ported.
        base: The model that it belongs to, where it is known.
        evolved: Where it goes.
        added: The tokens that only the patch has, with their rows in the evolved vocabulary.
    """
    refusals = tuple(uncopyable(patch.beside))
    theirs = side_file(evolved, TOKENIZER_FILE)
    has_tokenizer = bool({*VOCABULARY_FILES} & patch.beside.keys())
    kept = SideFiles(files=patch.beside, refusals=refusals)
    if theirs is None or not (has_tokenizer or added) or refusals:
        return kept
    if not added and TOKENIZER_FILE in patch.beside and is_same(patch.beside[TOKENIZER_FILE].path, theirs):
        return kept
    mine = vocabulary_of(patch)
    if mine is not None and all(
        mine.get(token) == row for token, row in {**(read_vocabulary(evolved) or {}), **added}.items()
    ):
        return kept
    texts = {TOKENIZER_FILE: _extended(theirs, patch, base, added)}
    config = (
        patch.beside[TOKENIZER_CONFIG].path
        if TOKENIZER_CONFIG in patch.beside
        else side_file(evolved, TOKENIZER_CONFIG)
    )
    if config is not None:
        # Its rows are those of the old vocabulary; the file of the tokenizer says the same of the new one.
        fields = {name: value for name, value in read_json(config).items() if name != "added_tokens_decoder"}
        texts[TOKENIZER_CONFIG] = _json_text(fields)
    note = f"the tokenizer of the ported patch is that of {evolved.name}"
    return SideFiles(
        files={name: file for name, file in patch.beside.items() if name not in TOKENIZER_FILES},
        texts=texts,
        notes=(note + (f" with {_listed(sorted((row, token) for token, row in added.items()))}." if added else "."),),
    )


def _extended(theirs: Path, patch: Patch[TensorInfo], base: Checkpoint | None, added: Mapping[str, int]) -> str:
    """The text of a `tokenizer.json` with more added tokens, each as its own tokenizer has it."""
    tokenizer = read_json(theirs)
    known: dict[str, Mapping[str, object]] = {}
    for file in (
        None if base is None else side_file(base, TOKENIZER_FILE),
        patch.beside[TOKENIZER_FILE].path if TOKENIZER_FILE in patch.beside else None,
    ):
        known |= {} if file is None else added_entries(file)
    there = tokenizer.get("added_tokens")
    entries: list[object] = [*(there if isinstance(there, list) else [])]
    listed = parse_vocabulary(tokenizer) or {}
    entries += [
        {**PLAIN_TOKEN, **known.get(token, {}), "id": row, "content": token}
        for token, row in added.items()
        if token not in listed
    ]
    return _json_text({**tokenizer, "added_tokens": entries})


def _json_text(values: Mapping[str, object]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def is_same(file: Path, other: Path | None) -> bool:
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
    mine, theirs = vocabulary_of(patch), read_vocabulary(model)
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
