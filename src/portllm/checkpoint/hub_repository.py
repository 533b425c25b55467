"""Repositories of the Hugging Face Hub: resolved to a commit, found in its cache, and files of them fetched.

With `HF_HUB_OFFLINE` only the cache is used; `HF_ENDPOINT` and the user's token are huggingface_hub's own affair.
"""

import contextlib
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import httpx2
from huggingface_hub import (
    DatasetInfo,
    HfApi,
    ModelInfo,
    constants,
    hf_hub_download,
    is_offline_mode,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name

from portllm import __version__
from portllm.checkpoint.model.checkpoint import CONFIG_FILE
from portllm.checkpoint.safetensors.names import INDEX_FILE, SINGLE_FILE
from portllm.errors import CheckpointError, NotFoundError, OutputError, PortLLMError, RemoteError
from portllm.files.json_file import MAX_JSON_BYTES
from portllm.files.own_files import write_text
from portllm.files.source import RemoteFile
from portllm.progress import Progress, silent
from portllm.tensors.ranges import (
    PASSING_STATUSES,
    TryAgainError,
    concurrently,
    guard_client,
    requested_wait,
    with_retries,
)

CONNECT_SECONDS = 3.0
UNREACHABLE_ATTEMPTS = 2
"""For the first word with the hub: without a network, it is soon said what to do, and nothing has been done yet."""

Kind = Literal["model", "dataset"]

_COMMIT = re.compile(r"[0-9a-f]{40,64}")


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository of the hub at one commit.

    Attributes:
        name: As the user typed it.
        id: `org/name`.
        asked: The revision that was asked for.
        revision: The commit hash.
        files: The files at its top, by name.
    """

    name: str
    id: str
    asked: str
    revision: str
    files: Mapping[str, RemoteFile]


def look_up(name: str) -> Repository:
    """Resolve `org/name` or `org/name@revision` to a commit and its files.

    Raises:
        NotFoundError: There is no such repository or revision; offline: it is not in the cache.
        RemoteError: The hub cannot be reached, or denies access.
    """
    repo, _, revision = name.partition("@")
    revision = revision or constants.DEFAULT_REVISION
    if is_offline_mode():
        return _look_up_in_cache(name, repo, revision)
    info, commit = _ask(name, repo, revision, "model")
    files = {}
    for entry in info.siblings or ():
        if _is_plain(entry.rfilename) and isinstance(entry.size, int) and entry.size >= 0:
            digest = entry.lfs.sha256 if entry.lfs else entry.blob_id
            files[entry.rfilename] = _remote_file(repo, commit, entry.rfilename, entry.size, str(digest or ""))
    return Repository(name, repo, revision, commit, files)


def dataset_commit(name: str, revision: str | None = None) -> str:
    """The commit hash of a revision of a dataset, by default of the newest.

    Raises:
        NotFoundError: There is no such dataset or revision.
        RemoteError: The hub cannot be reached, or denies access.
    """
    return _ask(name, name, revision or constants.DEFAULT_REVISION, "dataset")[1]


def fetch(repository: Repository, names: Iterable[str], *, progress: Progress = silent) -> Path:
    """Bring files of a repository into the cache of huggingface_hub; returns the folder that shows them.

    Raises:
        NotFoundError: Offline, and a file is not in the cache.
        RemoteError: A file cannot be fetched.
        CheckpointError: A JSON file is larger than any that is read.
    """
    guard_client()
    names = list(names)
    for name in names:
        size = repository.files[name].size
        if name in (CONFIG_FILE, INDEX_FILE) and size > MAX_JSON_BYTES:
            raise CheckpointError(f"'{repository.files[name]}': has {size} bytes; the limit is {MAX_JSON_BYTES}.")
    tally = _Tally({name: repository.files[name].size for name in names}, repository.name, progress)

    def bring(name: str) -> Path:
        with _hub_errors(repository.name):
            path = hf_hub_download(
                repository.id,
                name,
                revision=repository.revision,
                endpoint=constants.ENDPOINT,
                library_name="portllm",
                library_version=__version__,
                tqdm_class=_bar_class(lambda done: tally.count(name, done)),
            )
        tally.finish(name)
        return Path(path)

    folders = {path.parent for path in concurrently(bring, names)}
    _remember_commit(repository)
    return folders.pop()


class _Tally:
    """Bytes fetched of several files, told to one `Progress`."""

    def __init__(self, sizes: Mapping[str, int], label: str, progress: Progress) -> None:
        self._sizes = sizes
        self._done = dict.fromkeys(sizes, 0)
        self._name = label
        self._label = f"download {label}"
        self._progress = progress
        self._lock = threading.Lock()

    def count(self, name: str, done: int) -> None:
        if done > self._sizes[name]:
            raise RemoteError(
                f"'{self._name}/{name}': the Hub sent more than the {self._sizes[name]} bytes that it lists. The "
                "file changed, or the server cannot be trusted: try again later."
            )
        with self._lock:
            self._done[name] = max(self._done[name], done)
            self._progress(self._label, sum(self._done.values()), sum(self._sizes.values()), "bytes")

    def finish(self, name: str) -> None:
        self.count(name, self._sizes[name])


def _bar_class(report: Callable[[int], None]) -> type:
    """What huggingface_hub takes for a progress bar: it shows nothing and reports how far its file is."""

    class Bar:
        def __init__(self, *_: object, initial: int = 0, total: int | None = None, **__: object) -> None:
            self.n, self.total = initial, total

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *_: object) -> None:
            return

        def update(self, n: float | None = 1) -> None:
            self.n += int(n or 0)
            report(self.n)

        def close(self) -> None:
            return

        def refresh(self, *_: object, **__: object) -> None:
            return

        set_description = set_description_str = set_postfix_str = refresh

    return Bar


def _ask(name: str, repo: str, revision: str, kind: Kind) -> tuple[ModelInfo | DatasetInfo, str]:
    """What the hub says of a repository, and the commit hash of a revision."""
    with _hub_errors(name, kind):
        info = with_retries(lambda: _info(repo, revision, kind), where=f"'{name}'")
    if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha):
        raise RemoteError(f"'{name}': {constants.ENDPOINT} does not report a commit, so the revision cannot be pinned.")
    return info, info.sha


def _info(repo: str, revision: str, kind: Kind) -> ModelInfo | DatasetInfo:
    api = HfApi(endpoint=constants.ENDPOINT, library_name="portllm", library_version=__version__)
    try:
        return (api.model_info if kind == "model" else api.dataset_info)(
            repo,
            revision=revision,
            files_metadata=True,
            timeout=httpx2.Timeout(constants.HF_HUB_ETAG_TIMEOUT, connect=CONNECT_SECONDS),  # type: ignore[arg-type]
        )
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status not in PASSING_STATUSES:
            raise
        raise TryAgainError(f"the Hub returned status {status}", wait=requested_wait(error.response)) from error
    except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError) as error:
        raise TryAgainError(
            f"cannot reach {constants.ENDPOINT} ({_first_line(error)})",
            attempts=1 if isinstance(error, httpx2.ConnectTimeout) else UNREACHABLE_ATTEMPTS,
            remedy=_without_network(repo, revision, kind),
        ) from error
    except httpx2.TransportError as error:
        raise TryAgainError(f"cannot reach {constants.ENDPOINT} ({type(error).__name__})") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, HFValidationError):
            raise
        raise RemoteError(
            f"'{repo}': {constants.ENDPOINT} did not return a valid {kind} description ({type(error).__name__}). "
            "Check HF_ENDPOINT, or try again later."
        ) from error


def _is_plain(name: object) -> bool:
    """Whether a name that the hub lists is that of a file at the top, and can be written to a disk and a terminal."""
    return isinstance(name, str) and name.isprintable() and not {"/", "\\"} & set(name) and name not in ("", ".", "..")


def _remote_file(repo: str, revision: str, name: str, size: int, etag: str) -> RemoteFile:
    url = f"{constants.ENDPOINT}/{repo}/resolve/{revision}/{quote(name)}"
    return RemoteFile(url, name, size, etag, f"{repo}/{name}")


def _look_up_in_cache(name: str, repo: str, revision: str) -> Repository:
    """What the cache of huggingface_hub has of a repository."""
    for known in (SINGLE_FILE, INDEX_FILE, "adapter_config.json", CONFIG_FILE):
        path = try_to_load_from_cache(repo, known, revision=revision)
        if isinstance(path, str):
            folder = Path(path).parent
            files = {
                file.name: _remote_file(repo, folder.name, file.name, file.stat().st_size, "")
                for file in sorted(folder.iterdir())
                if file.is_file()
            }
            return Repository(name, repo, revision, folder.name, files)
    raise not_cached(name, revision)


def not_cached(name: str, revision: str) -> NotFoundError:
    """What is said where the network may not be used and the cache does not have all of a model."""
    return NotFoundError(
        f"'{name}': HF_HUB_OFFLINE is set, and revision '{revision}' is not complete in the cache "
        f"'{constants.HF_HUB_CACHE}'. Unset it, or download the model while online: hf download "
        f"{name.partition('@')[0]}."
    )


def _without_network(repo: str, revision: str, kind: Kind) -> str:
    """What to do if there is no network: the cache has the model, or it has not."""
    if kind == "dataset":
        return (
            "Check the connection, and HF_ENDPOINT or HTTPS_PROXY if there is a mirror or a proxy. Without a network, "
            "pass a data file, or set HF_HUB_OFFLINE=1 if the dataset was read before."
        )
    try:
        _look_up_in_cache(repo, repo, revision)
    except NotFoundError:
        return (
            "Check the connection, and HF_ENDPOINT or HTTPS_PROXY if there is a mirror or a proxy. Without a network, "
            f"pass a folder, or set HF_HUB_OFFLINE=1 once the model is in the cache: hf download {repo}."
        )
    return "The cache has it: without a network, set HF_HUB_OFFLINE=1."


def _remember_commit(repository: Repository) -> None:
    """Note in the cache which commit a branch or tag was, as huggingface_hub does, so that it is known offline."""
    if repository.asked == repository.revision or is_offline_mode():
        return
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository.id, repo_type="model")
    note = folder / "refs" / repository.asked
    with contextlib.suppress(
        OSError, OutputError
    ):  # a cache that cannot be written costs a later offline run its answer
        note.parent.mkdir(parents=True, exist_ok=True)
        write_text(note, repository.revision)


def cached(repository: Repository, names: Iterable[str]) -> Path | None:
    """The folder of the cache that shows these files at this commit, if it has all of them."""
    folder = None
    for name in names:
        path = try_to_load_from_cache(repository.id, name, revision=repository.revision)
        if not isinstance(path, str) or os.path.getsize(path) != repository.files[name].size:
            return None
        folder = Path(path).parent
    return folder


@contextlib.contextmanager
def _hub_errors(name: str, kind: Kind = "model") -> Iterator[None]:
    """Errors of huggingface_hub as ours."""
    repo = name.partition("@")[0]
    page = f"{constants.ENDPOINT}/{'datasets/' * (kind == 'dataset')}{repo}"
    try:
        yield
    except GatedRepoError as error:
        raise RemoteError(f"'{name}': is gated. Request access at {page} and log in: hf auth login.") from error
    except RepositoryNotFoundError as error:
        raise NotFoundError(
            f"'{name}': {'no such file or folder, and ' * (kind == 'model')}no {kind} of that name that you can access "
            f"at {constants.ENDPOINT}. Check the spelling; for a private {kind}, log in: hf auth login."
        ) from error
    except RevisionNotFoundError as error:
        raise NotFoundError(f"'{name}': {page} has no such revision. Use a branch, a tag or a commit hash.") from error
    except EntryNotFoundError as error:
        raise NotFoundError(
            f"'{name}': a file is not in the cache and could not be downloaded: {_first_line(error)}"
        ) from error
    except HFValidationError as error:
        raise NotFoundError(f"'{name}': no such file or folder, and not a valid Hub id: {error}") from error
    except HfHubHTTPError as error:
        raise RemoteError(
            f"'{name}': {constants.ENDPOINT} returned status {error.response.status_code}: {_first_line(error)}"
        ) from error
    except (PortLLMError, TryAgainError):
        raise
    except Exception as error:  # what a server that breaks the protocol makes libraries raise has no bound
        raise RemoteError(f"'{name}': could not be downloaded: {type(error).__name__}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
