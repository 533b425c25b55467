"""A server that breaks the protocol in one header or body: an error that names the model; no other place is asked."""

import socket
import time

import pytest
from huggingface_hub import constants

from portllm.checkpoint.open import on_disk, open_checkpoint
from portllm.errors import PortLLMError
from portllm.patch.adapter_folder import load_patch

LOCATIONS = (
    None, "", " ", "not a url", "//", "///x", "?", "#", "http://", "http:///x", "http://[::1", "http://[zz]/", "\x00",
    "http://127.0.0.1:99999/", "http://127.0.0.1:x/", "ftp://127.0.0.1/x", "file:///etc/passwd", "data:,x",
    "http://\xff/", "http://127.0.0.1\\@x/", "http://user:secret@127.0.0.1:1/", "x" * 20_000, "http://xn--/", "http://%/",
)  # fmt: skip
ODD = ("", "abc", "-1", "1.5", "9" * 400, "\xff", "0x10", "1, 2", "\x01")
HEADERS = {
    "Location": LOCATIONS,
    "ETag": (None, "", '"', '""', "W/", "\xff", "../../x", '"../../../x"', '"' + "f" * 64 + '"', "x" * 20_000),
    "X-Repo-Commit": (None, "", "../../x", "/etc", "../../../../x", "no hash", "\xff", "0" * 4000),
    "X-Linked-Etag": (None, "", '"../../../../x"', "/etc/passwd", "\xff", "x" * 20_000),
    "X-Linked-Size": (None, *ODD),
    "Content-Length": ODD,
    "Content-Range": (None, *ODD, "bytes 0-0/0", "bytes */*", "bytes 0-99999999999/9", "items 0-1/2"),
    "Content-Encoding": ("gzip", "br", "zstd", "deflate", "x", "gzip, gzip"),
    "Content-Type": ("text/html; charset=x", "\xff"),
    "Transfer-Encoding": ("chunked", "x"),
    "Retry-After": ODD,
    "X-Error-Code": ("RepoNotFound", "GatedRepo", "EntryNotFound", "\xff"),
    "X-Error-Message": ("\x1b[2Jverified", "\xff" * 3000),
    "Link": ("<>; rel=next", "\xff"),
}
LEADS_SOMEWHERE = {("hub", name) for name in ("Location", "ETag", "X-Repo-Commit", "X-Linked-Etag")}
LEADS_SOMEWHERE |= {("storage", "Location")}
CASES = [
    pytest.param(
        *case, id=f"{case[0]}-{case[1]}-{case[2]!a:.30}", marks=() if case[:2] in LEADS_SOMEWHERE else pytest.mark.slow
    )
    for case in ((host, name, value) for host in ("hub", "storage") for name in HEADERS for value in HEADERS[name])
]

BODIES = {
    "nothing": b"",
    "no JSON": b"<html>",
    "a list": b"[]",
    "null": b"null",
    "deep": b"[" * 100_000,
    "not UTF-8": b'{"id": "\xff"}',
    "half a pair": rb'{"id": "\ud800", "sha": "\ud800", "siblings": []}',
    "no commit": b'{"id": "org/tiny", "siblings": []}',
    "a commit that is a path": b'{"id": "org/tiny", "sha": "../../x", "siblings": []}',
    "a commit of another type": b'{"id": "org/tiny", "sha": 5, "siblings": []}',
    "files of another type": b'{"id": "org/tiny", "sha": "' + b"0" * 40 + b'", "siblings": 5}',
    "files without names": b'{"id": "org/tiny", "sha": "' + b"0" * 40 + b'", "siblings": [{}]}',
    "names that are none": b'{"id": "org/tiny", "sha": "' + b"0" * 40 + b'", "siblings": [{"rfilename": 5}]}',
    "a name that is a path": b'{"id": "org/tiny", "sha": "'
    + b"0" * 40
    + b'", "siblings": [{"rfilename": "../config.json", "size": 1}, {"rfilename": "/etc/passwd", "size": 1}]}',
    "sizes that are none": b'{"id": "org/tiny", "sha": "'
    + b"0" * 40
    + b'", "siblings": [{"rfilename": "config.json", "size": "x"}, {"rfilename": "model.safetensors", "size": -1}]}',
}


def reads(name):
    """All that is read of a model and of an adapter of the hub."""
    for read in (lambda: on_disk(open_checkpoint(name)), lambda: load_patch(f"{name}-adapter")):
        try:
            read()
        except PortLLMError as error:
            yield str(error)


def numbers_only(look_up):
    """No name is asked of a server on the network, which may take seconds to say that it knows none."""

    def find(host, *rest, **options):
        if host != "127.0.0.1":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return look_up(host, *rest, **options)

    return find


@pytest.fixture
def served(hub, tiny, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(socket, "getaddrinfo", numbers_only(socket.getaddrinfo))
    for wait in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
        monkeypatch.setattr(constants, wait, 1)
    hub.add("org/tiny-adapter", tiny("adapter"))
    return hub, hub.add("org/tiny", tiny("base"))


@pytest.mark.parametrize(("host", "name", "value"), CASES)
def test_a_header_that_makes_no_sense_is_survived(host, name, value, served, tmp_path):
    hub, model = served
    hub.changed[host] = {name: value}
    told = list(reads(model))
    # A file of the cache, which a server with one mark for all files has filled with another, is named by its path.
    assert [text for text in told if not ("org/tiny" in text or "models--org--tiny" in text)] == []
    outside = [path for path in tmp_path.iterdir() if path.name not in ("hub-cache", "portllm-cache")]
    assert outside == []


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_a_description_that_makes_no_sense_is_refused(body, served):
    hub, model = served
    hub.api_faults = [(200, {"Content-Type": "application/json"}, body)] * 40
    told = list(reads(model))
    assert len(told) == 2
    assert all("org/tiny" in text for text in told)


@pytest.mark.parametrize("status", [204, 206, 300, 301, 304, 307, 400, 405, 418, 451, 500, 599, 600, 999])
def test_a_status_that_makes_no_sense_is_refused(status, served):
    hub, model = served
    hub.api_faults = [status] * 40
    assert len(list(reads(model))) == 2
