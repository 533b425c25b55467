"""Bytes of a file on a server by HTTP range requests: never more than was asked for, never other bytes than meant.

An answer is used only if it is a part of the very file that was listed: its range, the file's size and the hub's
digest of the content must agree. What may pass (a rate limit, an overloaded server, a timeout, an answer cut short) is
tried again a bounded number of times, and goes on where the answer ended.

The hub sends readers of large files on to a storage host by a signed address. The user's token goes to the hub alone,
never there. The address is kept until it is refused, so that many slices of a file cost one redirect.

Source: range requests, RFC 9110 sections 14 and 15.3.7 (https://www.rfc-editor.org/rfc/rfc9110.html#section-14).
"""

import contextlib
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache, partial
from typing import TypeVar
from urllib.parse import urljoin, urlsplit

import httpx2
from huggingface_hub import constants, get_session, get_token, set_client_factory
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import _http

from portllm import __version__
from portllm.errors import RemoteError
from portllm.files.source import RemoteFile

WORKERS = 16
"""Requests under way at once."""

ATTEMPTS = 6
FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 60.0
"""Also the cap of what a server may ask for with `Retry-After`."""

MAX_REDIRECTS = 5

KEPT_SLICE_BYTES = 1 << 16
KEPT_BYTES = 1 << 26
"""Small slices stay in memory up to this many bytes: a port reads the same windows for identity and for drift."""

PASSING_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
REFUSED_STATUSES = frozenset({400, 401, 403, 404, 410})

_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")
_RATE_LIMIT = re.compile(r";\s*r=0\s*;\s*t=(\d+)")

_PLAIN = re.compile(r'(W/)?"?[0-9A-Za-z][\w.:=+-]{0,255}"?', re.ASCII)

T = TypeVar("T")
S = TypeVar("S")


class TryAgainError(Exception):
    """An attempt failed in a way that may pass; never leaves this package.

    Attributes:
        wait: Seconds that the server asks for, or None.
        attempts: After how many such failures in a row it is no use to go on.
        remedy: What to do then.
    """

    def __init__(
        self,
        problem: str,
        *,
        wait: float | None = None,
        attempts: int = ATTEMPTS,
        remedy: str = "The server or the connection is down: try again later.",
    ) -> None:
        super().__init__(problem)
        self.wait = wait
        self.attempts = attempts
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class _Location:
    """Where the hub sent a reader of a file, and the ETag of the answer there."""

    url: str
    etag: str | None


class _Slices:
    """The small slices that were read last, up to `KEPT_BYTES` in all."""

    def __init__(self) -> None:
        self._slices: OrderedDict[tuple[RemoteFile, int, int], bytes] = OrderedDict()
        self._n_bytes = 0

    def get(self, key: tuple[RemoteFile, int, int]) -> bytes | None:
        if key in self._slices:
            self._slices.move_to_end(key)
        return self._slices.get(key)

    def keep(self, key: tuple[RemoteFile, int, int], data: bytes) -> None:
        if key in self._slices or len(data) > KEPT_SLICE_BYTES:
            return
        self._slices[key] = data
        self._n_bytes += len(data)
        while self._n_bytes > KEPT_BYTES:
            self._n_bytes -= len(self._slices.popitem(last=False)[1])

    def clear(self) -> None:
        self._slices.clear()
        self._n_bytes = 0


_lock = threading.Lock()
_slices = _Slices()
_locations: dict[RemoteFile, _Location] = {}


def pause(seconds: float) -> None:
    """Wait before another attempt; tests put something else in its place."""
    time.sleep(seconds)


def forget() -> None:
    """Drop the slices and addresses that are kept in memory."""
    with _lock:
        _slices.clear()
        _locations.clear()


@cache
def guard_client() -> None:
    """Have huggingface_hub's client refuse what a server says and that library would take for a path in its cache.

    It names files by the digests that the hub answers with, as they come: `../../x` would be written outside of the
    cache, and `/etc/passwd` read. A client that takes the place of another after an error is guarded, too.
    """
    make: Callable[[], httpx2.Client] = getattr(_http, "_GLOBAL_CLIENT_FACTORY", _http.default_client_factory)
    if getattr(make, "func", None) is not _guarded:
        set_client_factory(partial(_guarded, make))


def _guarded(make: Callable[[], httpx2.Client]) -> httpx2.Client:
    client = make()
    hooks = client.event_hooks
    client.event_hooks = {**hooks, "response": [*hooks.get("response", ()), _refuse_paths]}
    return client


def _refuse_paths(response: httpx2.Response) -> None:
    url = str(response.url)
    if _origin(url) != _origin(constants.ENDPOINT):
        return
    for name in ("etag", "x-linked-etag", "x-repo-commit"):
        value = response.headers.get(name)
        if value is not None and not _PLAIN.fullmatch(value):
            place = url.partition("?")[0]
            raise RemoteError(f"'{place}': the server answers with {name}: {value[:80]!r}, which is not a digest.")


def read_range(file: RemoteFile, start: int, stop: int) -> bytes:
    """Bytes `start` to `stop` of a file.

    Raises:
        RemoteError: The server cannot be reached, refuses, or does not answer with these bytes of this file.
    """
    key = (file, start, stop)
    with _lock:
        known = _slices.get(key)
    if known is not None or start >= stop:
        return known or b""
    data = bytearray()
    with_retries(lambda: _read_on(data, file, start, stop), where=f"'{file}'")
    with _lock:
        _slices.keep(key, bytes(data))
    return bytes(data)


def concurrently(work: Callable[[S], T], items: Sequence[S]) -> Iterator[T]:
    """The results of `work` on each item, in order, `WORKERS` at a time; the first error ends the rest."""
    with ThreadPoolExecutor(WORKERS, thread_name_prefix="portllm-remote") as pool:
        try:
            yield from pool.map(work, items)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def with_retries(attempt: Callable[[], T], *, where: str) -> T:
    """Call `attempt` until it does not raise `TryAgainError`, with growing pauses.

    Raises:
        RemoteError: It failed `ATTEMPTS` times, or as often as the failure says.
    """
    wait = FIRST_WAIT_SECONDS
    for number in range(1, ATTEMPTS + 1):
        try:
            return attempt()
        except TryAgainError as problem:
            if number >= problem.attempts:
                often = f", {number} times in a row" if number > 1 else ""
                raise RemoteError(f"{where}: {problem}{often}. {problem.remedy}") from problem
            pause(min(wait if problem.wait is None else problem.wait, LONGEST_WAIT_SECONDS))
            wait *= 2
    raise AssertionError("the last attempt returns or raises")


def requested_wait(response: httpx2.Response) -> float | None:
    """Seconds that a server asks a client to wait: `Retry-After`, or the hub's `RateLimit` when nothing is left."""
    text = response.headers.get("retry-after", "").strip()
    if re.fullmatch(r"[0-9]{1,9}", text):
        return float(text)
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        date = parsedate_to_datetime(text)
        return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
    limit = _RATE_LIMIT.search(response.headers.get("ratelimit", ""))
    return float(limit[1]) if limit else None


def _read_on(data: bytearray, file: RemoteFile, start: int, stop: int) -> None:
    """Append the bytes that are still missing; what came before a connection broke is kept."""
    try:
        with _open_range(file, start + len(data), stop) as response:
            for chunk in response.iter_raw():
                data += chunk
                if len(data) > stop - start:
                    raise _unusable(file, f"the server sent more than the {stop - start} bytes it was asked for")
    except httpx2.TransportError as error:
        raise TryAgainError(f"{type(error).__name__} after {len(data)} of {stop - start} bytes") from error
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
        raise _unusable(file, f"{type(error).__name__}: {error}") from error
    except OfflineModeIsEnabled as error:
        raise RemoteError(
            f"'{file}': is on the Hub, and HF_HUB_OFFLINE is set. Unset it, or download the model while online."
        ) from error
    if len(data) < stop - start:
        raise TryAgainError(f"the response ended at {len(data)} of {stop - start} bytes")


@contextlib.contextmanager
def _open_range(file: RemoteFile, start: int, stop: int) -> Iterator[httpx2.Response]:
    """The answer that carries the range, checked but not read; redirects are followed by hand."""
    kept = _locations.get(file)
    url = kept.url if kept else file.url
    for _ in range(MAX_REDIRECTS + 1):
        with get_session().stream(
            "GET",
            url,
            headers=_headers(url, start, stop),
            follow_redirects=False,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        ) as response:
            if _origin(url) == _origin(file.url):
                _check_hub_etag(file, response)
            if response.has_redirect_location:
                url = _next_url(file, url, response)
                continue
            if url != file.url and response.status_code in REFUSED_STATUSES and kept:  # a signed address runs out
                kept, url = None, file.url
                continue
            _check_status(file, response)
            _check_range(file, response, start, stop)
            answered = _Location(url, response.headers.get("etag"))
            if kept and kept.url == url and kept.etag != answered.etag:
                raise _changed(file, f"its ETag was {kept.etag} and is now {answered.etag}")
            with _lock:
                _locations[file] = answered
            yield response
            return
    raise _unusable(file, f"more than {MAX_REDIRECTS} redirects, the last to {_origin(url)}")


def _headers(url: str, start: int, stop: int) -> dict[str, str]:
    # A compressed answer would hide how many bytes of the file came.
    headers = {
        "range": f"bytes={start}-{stop - 1}",
        "accept-encoding": "identity",
        "user-agent": f"portllm/{__version__}",
    }
    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    if token and _origin(url) == _origin(constants.ENDPOINT):
        headers["authorization"] = f"Bearer {token}"
    return headers


def _next_url(file: RemoteFile, url: str, response: httpx2.Response) -> str:
    try:
        target = urljoin(url, response.headers["location"])
        scheme, _ = urlsplit(target).scheme, _origin(target)
    except ValueError as error:
        raise _unusable(file, f"the server redirects to an invalid URL ({error})") from error
    if scheme != "https" and scheme != urlsplit(file.url).scheme:
        raise _unusable(file, f"the server redirects to {_origin(target)}, which is not https")
    return target


def _origin(url: str) -> str:
    """Scheme, host and port: what a token may be sent to."""
    parts = urlsplit(url)
    port = parts.port or {"https": 443, "http": 80}.get(parts.scheme)
    return f"{parts.scheme}://{parts.hostname}:{port}"


def _check_hub_etag(file: RemoteFile, response: httpx2.Response) -> None:
    """The hub names the content it answers with; it must be the content that it listed."""
    linked, own = (response.headers.get(name, "").removeprefix("W/").strip('"') for name in ("x-linked-etag", "etag"))
    # A mirror may number its own copies; what is no digest of the listed kind says nothing.
    found = linked or (own if len(own) == len(file.etag) else "")
    if response.status_code < 400 and found and found != file.etag:
        raise _changed(file, f"its ETag was {file.etag} and is now {found}")


def _check_status(file: RemoteFile, response: httpx2.Response) -> None:
    status = response.status_code
    if status in PASSING_STATUSES:
        raise TryAgainError(f"the server returned status {status}", wait=requested_wait(response))
    if status in (401, 403):
        raise RemoteError(
            f"'{file}': access denied (status {status}). If the model is gated or private, request access on its "
            "page and log in: hf auth login."
        )
    if status in (404, 410):
        raise _changed(file, f"the server no longer has it (status {status})")
    if status == 416:
        raise _changed(file, "it is shorter than listed (status 416)")
    if status not in (200, 206):
        raise _unusable(file, f"the server returned status {status}")


def _check_range(file: RemoteFile, response: httpx2.Response, start: int, stop: int) -> None:
    """The answer is the range that was asked for, perhaps cut short, of a file of the listed size."""
    if response.headers.get("content-encoding", "identity") != "identity":
        raise _unusable(file, f"the response is compressed ({response.headers['content-encoding']})")
    if response.status_code == 200:
        if (start, stop) == (0, file.size):
            return
        raise _unusable(file, f"the server ignores range requests and would send all {file.size} bytes")
    found = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
    if found is None:
        raise _unusable(file, "the response does not state its range")
    first, last, total = int(found[1]), int(found[2]), found[3]
    if total not in ("*", str(file.size)):
        raise _changed(file, f"it had {file.size} bytes and now has {total}")
    if first != start or last >= stop:
        raise _unusable(file, f"bytes {start} to {stop - 1} were requested, but {first} to {last} were sent")


def _unusable(file: RemoteFile, problem: str) -> RemoteError:
    return RemoteError(f"'{file}': {problem}. Download the model with 'hf download' and pass its folder.")


def _changed(file: RemoteFile, problem: str) -> RemoteError:
    return RemoteError(f"'{file}': changed on the server: {problem}. Run again to use the new version.")
