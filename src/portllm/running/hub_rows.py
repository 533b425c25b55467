"""Datasets of the Hugging Face Hub as files of rows: besides the harness's, the only module that imports datasets.

The library reads whatever a dataset is made of; what comes out is written once, as JSONL in the user's cache, under a
name with its digest. From there on it is a data file as any other, with the same digest wherever the same rows come
from. Columns of binary data, such as pictures, are left out.
"""

import contextlib
import io
import json
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3
from huggingface_hub import is_offline_mode

from portllm.checkpoint.hub_repository import dataset_commit
from portllm.errors import DataError, MissingExtraError, PortLLMError
from portllm.files.cache import cache_root
from portllm.files.own_files import write_text
from portllm.installed import why_not
from portllm.running.parquet import plain_row

try:
    import datasets
except ImportError as missing:
    raise MissingExtraError(
        f"datasets of the Hugging Face Hub need its library; {why_not(missing, 'data')}"
    ) from missing

SCHEME = "hf://datasets/"
FORM = "hf://datasets/OWNER/NAME/SPLIT, or hf://datasets/OWNER/NAME@REVISION/SUBSET/SPLIT"
BATCH_ROWS = 1000

_ADDRESS = re.compile(r"hf:/+datasets/([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w.-]+))?((?:/[^/]+)*)/?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Rows of a dataset of the hub.

    Attributes:
        repo: `OWNER/NAME`.
        revision: A branch, a tag or a commit; None for the newest.
        parts: What follows: a split, a subset and a split, or a path of a file.
    """

    repo: str
    revision: str | None
    parts: tuple[str, ...]

    def __str__(self) -> str:
        at = "" if self.revision is None else f"@{self.revision}"
        return "/".join((f"{SCHEME}{self.repo}{at}", *self.parts))

    @property
    def file(self) -> str | None:
        """The path of a file in the dataset, where one is meant."""
        return "/".join(self.parts) if self.parts and Path(self.parts[-1]).suffix else None


def parse_address(text: str) -> Address:
    """What an address names.

    Raises:
        DataError: It is in no form that is known.

    Example:
        >>> parse_address("hf://datasets/stanfordnlp/imdb/test[:100]").parts
        ('test[:100]',)
    """
    found = _ADDRESS.fullmatch(text)
    if found is None:
        raise DataError(f"'{text}': is no address of a dataset. Expected: {FORM}.")
    address = Address(repo=found[1], revision=found[2], parts=tuple(filter(None, found[3].split("/"))))
    if len(address.parts) > 2 and address.file is None:
        raise DataError(f"'{text}': has {len(address.parts)} parts after the name. Expected: {FORM}.")
    return address


def fetch_rows(address: Address) -> Path:
    """The rows that an address names, as a JSONL file in the user's cache.

    Raises:
        DataError: There is no such dataset, subset, split or file, or it cannot be read.
        NotFoundError: There is no such dataset.
        RemoteError: The hub cannot be reached, or denies access.
    """
    repo = f"{SCHEME}{address.repo}"
    revision = address.revision if is_offline_mode() else dataset_commit(address.repo, address.revision)
    with _own_errors(address), quiet_datasets():
        if address.file is not None:
            rows = datasets.load_dataset(repo, revision=revision, data_files=address.file, split="train")
        else:
            subset, split = _choose(address, repo, revision)
            rows = datasets.load_dataset(repo, subset, revision=revision, split=split)
    return _write(rows, cache_root() / "datasets" / address.repo, "-".join(address.parts) or str(rows.split))


def _choose(address: Address, repo: str, revision: str | None) -> tuple[str | None, str]:
    """The subset and the split that are meant: those that are named, or the only ones."""
    *named, split = address.parts or ("",)
    subsets = datasets.get_dataset_config_names(repo, revision=revision)
    if split in subsets and not named:
        named, split = [split], ""
    if not named and len(subsets) > 1 and "default" not in subsets:
        raise _several(address, "subset", subsets, [*subsets[:1], split or "SPLIT"])
    subset = named[0] if named else "default" if "default" in subsets else subsets[0]
    if subset not in subsets:
        raise _several(address, "subset", subsets, [*subsets[:1], split or "SPLIT"], none_called=subset)
    splits = datasets.get_dataset_split_names(repo, subset, revision=revision)
    if not split and len(splits) > 1:
        raise _several(address, "split", splits, [*named, splits[-1]])
    if not {part.partition("[")[0] for part in split.split("+") if part} <= {*splits}:
        raise _several(address, "split", splits, [*named, splits[-1]], none_called=split)
    return subset, split or splits[0]


def _several(
    address: Address, what: str, names: Sequence[str], parts: Sequence[str], *, none_called: str | None = None
) -> DataError:
    said = f"has the {what}s" if none_called is None else f"has no {what} '{none_called}', but"
    whole = Address(repo=address.repo, revision=address.revision, parts=tuple(parts))
    return DataError(f"'{address}': {said} {', '.join(map(repr, names[:20]))}. Name one, such as {whole}.")


def _write(rows: "datasets.Dataset", folder: Path, name: str) -> Path:
    """Write rows as JSONL, under a name with their digest."""
    text = io.StringIO()
    for batch in rows.with_format("arrow").iter(batch_size=BATCH_ROWS):
        for row in batch.to_pylist():
            kept = {field: value for field, value in plain_row(row).items() if not _is_binary(value)}
            text.write(json.dumps(kept, ensure_ascii=False) + "\n")
    content = text.getvalue().encode("utf-8", errors="backslashreplace")
    plain = re.sub(r"[^\w.-]+", "_", name)
    file = folder / f"{plain}-{blake3(content).hexdigest()[:12]}.jsonl"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(file, content.decode())
    return file


def _is_binary(value: object) -> bool:
    match value:
        case bytes():
            return True
        case dict():
            return any(map(_is_binary, value.values()))
        case list():
            return any(map(_is_binary, value))
        case _:
            return False


@contextlib.contextmanager
def _own_errors(address: Address) -> Iterator[None]:
    """What the library raises has no bound: each is told as ours, with its first line."""
    try:
        yield
    except PortLLMError:
        raise
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")
        if is_offline_mode():
            way = "HF_HUB_OFFLINE is set: unset it, or pass a data file."
        else:
            way = f"See what it holds: {SCHEME.replace('hf://', 'https://huggingface.co/')}{address.repo}"
        raise DataError(f"'{address}': cannot be read: {type(error).__name__}: {first.rstrip('.')}. {way}") from error


@contextlib.contextmanager
def quiet_datasets(*others: str) -> Iterator[None]:
    """Messages of the library and of others, warnings and its progress bars are off inside the block."""
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub", *others)]
    levels = [logger.level for logger in loggers]
    bars = datasets.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
