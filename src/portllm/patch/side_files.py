"""Tokenizer, chat template and value head that training programs save with an adapter, and that are kept with it."""

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from portllm.checkpoint.model.side_files import HEAD_FILE, why_uncopyable
from portllm.errors import Refusal
from portllm.files.input_file import local_file
from portllm.files.source import LocalFile

TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
VOCABULARY_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "sentencepiece.bpe.model",
)  # fmt: skip
"""One of these is in the folder of every tokenizer."""

TOKENIZER_FILES = (*VOCABULARY_FILES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
SIDE_FILES = (*TOKENIZER_FILES, *TEMPLATE_FILES, HEAD_FILE)
"""What transformers' `save_pretrained` of a tokenizer writes, and the value head."""


def side_files_in(folder: Path) -> dict[str, LocalFile]:
    """What of these lies in an adapter's folder, by name."""
    return {name: local_file(folder / name) for name in sorted(SIDE_FILES) if os.path.isfile(folder / name)}


def labels_in(config: Mapping[str, object]) -> tuple[str, ...]:
    """The names of a classifier's labels in a model's configuration; none where it names none.

    Example:
        >>> labels_in({"id2label": {"0": "no", "1": "yes"}})
        ('no', 'yes')
    """
    named = config.get("id2label")
    numbered = {str(number): label for number, label in named.items()} if isinstance(named, dict) else {}
    labels = [numbered.get(str(number)) for number in range(len(numbered))]
    return tuple(label for label in labels if isinstance(label, str)) if None not in labels else ()


def uncopyable(files: Mapping[str, LocalFile]) -> Iterator[Refusal]:
    """Why such a file must not be copied into an output: it is a link that leads elsewhere, or is far too large."""
    for file in files.values():
        if (why := why_uncopyable(file.path)) is not None:
            yield Refusal(str(file.path), why)


def copy_into(folder: Path, files: Mapping[str, LocalFile]) -> None:
    """Copy them into an output that is being written."""
    for name, file in files.items():
        shutil.copyfile(file.path, folder / name)
