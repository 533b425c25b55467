"""Ranges of a file on a server: the bytes that were asked for, or an error that says why not."""

import threading
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import constants

from portllm.checkpoint.hub import HEADER_GUESS_BYTES, read_remote_header
from portllm.errors import HeaderError, RemoteError
from portllm.files.source import RemoteFile
from portllm.tensors import ranges as remote
from portllm.tensors.ranges import ATTEMPTS, LONGEST_WAIT_SECONDS, concurrently, read_range
from tests.hub import COMMIT, TOKEN
from tests.safetensors_files import file_bytes, write_sparse

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "served"
    made.mkdir()
    (made / "model.safetensors").write_bytes(CONTENT)
    return made


@pytest.fixture
def served(hub, folder):
    """Describes a file of the folder as the hub lists it."""
    hub.add("org/model", folder)

    def describe(name="model.safetensors"):
        url = f"{hub.address()}/org/model/resolve/{COMMIT}/{name}"
        return RemoteFile(url, name, (folder / name).stat().st_size, hub.etag(folder / name), f"org/model/{name}")

    return describe


@pytest.mark.parametrize("redirects", [True, False], ids=["by way of the storage host", "from the hub itself"])
@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 10240), (7, 9001), (10239, 10240), (5, 5)])
def test_a_range_is_those_bytes_of_the_file(hub, served, start, stop, redirects):
    hub.redirects = redirects
    assert read_range(served(), start, stop) == CONTENT[start:stop]


def test_no_more_is_sent_than_was_asked_for(hub, served):
    read_range(served(), 100, 200)
    assert [(asked.status, asked.n_bytes) for asked in hub.asked if asked.host == "storage"] == [(206, 100)]


def test_the_token_goes_to_the_hub_and_not_to_where_it_redirects(hub, served):
    read_range(served(), 0, 8)
    assert [(asked.host, asked.token) for asked in hub.asked] == [("hub", f"Bearer {TOKEN}"), ("storage", None)]


def test_the_token_is_kept_from_a_file_that_is_not_on_the_hub(hub, served, folder):
    elsewhere = RemoteFile(f"{hub.address('storage')}/blobs{folder}/model.safetensors", "m", 10240, "", "m")
    assert read_range(elsewhere, 0, 8) == CONTENT[:8]
    assert [asked.token for asked in hub.asked] == [None]


def test_a_user_who_wants_no_token_sent_sends_none(hub, served, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    read_range(served(), 0, 8)
    assert [asked.token for asked in hub.asked] == [None, None]


def test_the_hub_redirects_once_for_many_slices(hub, served):
    for start in range(0, 80, 8):
        assert read_range(served(), start, start + 8) == CONTENT[start : start + 8]
    assert [asked.host for asked in hub.asked] == ["hub", *["storage"] * 10]


def test_an_address_that_ran_out_is_asked_for_anew(hub, served):
    read_range(served(), 0, 8)
    hub.expired = {"1"}
    assert read_range(served(), 8, 16) == CONTENT[8:16]
    assert [(asked.host, asked.status) for asked in hub.asked[2:]] == [("storage", 403), ("hub", 302), ("storage", 206)]


def test_a_small_slice_is_read_once(hub, served):
    assert read_range(served(), 0, 100) == read_range(served(), 0, 100)
    assert len(hub.paths(host="storage")) == 1


def test_what_is_kept_in_memory_is_bounded(served, monkeypatch):
    monkeypatch.setattr(remote, "KEPT_BYTES", 250)
    for start in range(0, 1000, 100):
        read_range(served(), start, start + 100)
    assert remote._slices._n_bytes == 200


@pytest.mark.parametrize("fault", ["cut", "short"])
def test_an_answer_that_ends_early_is_continued_where_it_ended(hub, served, waits, fault):
    hub.faults = [fault, fault]
    assert read_range(served(), 0, 1000) == CONTENT[:1000]
    asked = [asked.range for asked in hub.asked if asked.host == "storage"]
    assert asked == ["bytes=0-999", "bytes=500-999", "bytes=750-999"]
    assert waits == [0.5, 1.0]


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again(hub, served, waits, status):
    hub.faults = [(status,), (status,)]
    assert read_range(served(), 0, 8) == CONTENT[:8]
    assert waits == [0.5, 1.0]


def test_the_server_says_how_long_to_wait_up_to_a_cap(hub, served, waits):
    hub.faults = [
        (429, {"Retry-After": "7"}),
        (503, {"Retry-After": "86400"}),
        (429, {"RateLimit": '"resolvers";r=0;t=23'}),
        (503, {"Retry-After": "soon"}),
    ]
    assert read_range(served(), 0, 8) == CONTENT[:8]
    assert waits == [7.0, LONGEST_WAIT_SECONDS, 23.0, 4.0]


@pytest.mark.parametrize(("away", "expected"), [(30, 30), (-30, 0)], ids=["to come", "past"])
def test_the_server_may_give_a_date_to_wait_for(away, expected):
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=away), usegmt=True)
    assert remote.requested_wait(httpx2.Response(503, headers={"retry-after": date})) == pytest.approx(expected, abs=5)


@pytest.mark.parametrize(
    "text",
    [
        "9" * 5000,
        "\xb2",
        "-1",
        "1e9",
        "Mon, 01 Jan 99999 00:00:00 GMT",
        "Mon, 01 Jan 2024 00:00:00 +9999999999",
        "\xff",
    ],
)
def test_a_time_to_wait_that_is_none_is_passed_over(hub, served, waits, text):
    hub.faults = [(429, {"Retry-After": text})]
    assert read_range(served(), 8, 16) == CONTENT[8:16]
    assert waits == [remote.FIRST_WAIT_SECONDS]


def test_attempts_are_bounded(hub, served, waits):
    hub.every = (503,)
    with pytest.raises(RemoteError, match=rf"'org/model/model\.safetensors': .*status 503, {ATTEMPTS} times in a row"):
        read_range(served(), 0, 8)
    assert len(hub.paths(host="storage")) == ATTEMPTS
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0]


def test_a_server_that_is_gone_is_reported(hub, served, waits):
    file = served()
    hub.close()
    huggingface_hub.close_session()
    with pytest.raises(RemoteError, match=r"ConnectError after 0 of 8 bytes, 6 times in a row"):
        read_range(file, 0, 8)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("ignores ranges", "ignores range requests and would send all 10240 bytes"),
        ("too long", "sent more than the 992 bytes"),
        ("elsewhere", "bytes 8 to 999 were requested, but 16 to 1007 were sent"),
        ("grown", "changed on the server: it had 10240 bytes and now has 10248"),
        ("no content range", "does not state its range"),
        ("compressed", r"compressed \(gzip\)"),
        ((404,), "changed on the server: the server no longer has it"),
        ((401,), "access denied"),
        ((403,), "access denied .*hf auth login"),
        ((418,), "status 418"),
        ((301, {"Location": "file:///etc/passwd"}), "redirects to file://.*not https"),
        ((302, {"Location": "gopher://127.0.0.1/"}), "redirects to gopher://.*not https"),
        ((302, {"Location": "http://[::1"}), "redirects to an invalid URL"),
        ((302, {"Location": "http://127.0.0.1:99999/"}), "redirects to an invalid URL"),
        ((302, {"Location": "http://127.0.0.1:port/"}), "redirects to an invalid URL"),
        ((206, {"Content-Range": f"bytes 8-{'9' * 5000}/{'9' * 5000}"}), "does not state its range"),
        ((206, {"Content-Range": "bytes -8-999/10240"}), "does not state its range"),
        ((206, {"Content-Range": "bytes 8-1000/10240"}), "8 to 1000 were sent"),
    ],
)
def test_an_answer_that_is_not_the_range_is_refused_at_once(hub, served, waits, fault, message):
    hub.every = fault
    with pytest.raises(RemoteError, match=message):
        read_range(served(), 8, 1000)
    assert waits == []


def test_redirects_are_bounded(hub, served):
    hub.redirects = False
    hub.every = (302, {"Location": served().url})
    with pytest.raises(RemoteError, match="more than 5 redirects"):
        read_range(served(), 0, 8)


def test_other_content_under_the_listed_name_is_noticed(hub, served):
    file = served()
    hub.etags = {"model.safetensors": "e" * 64}
    with pytest.raises(RemoteError, match="changed on the server: its ETag was"):
        read_range(file, 0, 8)


def test_other_content_at_the_storage_host_is_noticed(hub, served):
    read_range(served(), 0, 8)
    hub.faults = ["other etag"]
    with pytest.raises(RemoteError, match="changed on the server: its ETag was"):
        read_range(served(), 8, 16)


def test_a_range_past_the_end_means_that_the_file_changed(served):
    with pytest.raises(RemoteError, match="shorter than listed"):
        read_range(served(), 20000, 20008)


def test_a_whole_file_may_come_without_a_range(hub, served, folder):
    hub.faults = [(200, {}, CONTENT)]
    assert read_range(served(), 0, len(CONTENT)) == CONTENT


def test_offline_nothing_is_asked_for(hub, served, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RemoteError, match="HF_HUB_OFFLINE is set"):
        read_range(served(), 0, 8)
    assert hub.asked == []


def test_a_short_header_takes_one_request(hub, served, folder):
    write_sparse(folder / "sparse.safetensors", {"w": ("F32", (3, 5)), "big": ("F32", (1 << 20,))})
    header = read_remote_header(served("sparse.safetensors"))
    assert header.tensors["w"].shape == (3, 5)
    assert header.tensors["w"].file == served("sparse.safetensors")
    assert [asked.n_bytes for asked in hub.asked if asked.host == "storage"] == [HEADER_GUESS_BYTES]


def test_a_long_header_takes_two_requests(hub, served, folder):
    write_sparse(folder / "long.safetensors", {f"tensor.{n}": ("F32", (2,)) for n in range(100)})
    header = read_remote_header(served("long.safetensors"), guess=64)
    assert list(header.tensors) == [f"tensor.{n}" for n in range(100)]
    assert len(hub.paths(host="storage")) == 2


def test_a_header_that_lies_is_refused_before_more_is_read(hub, served, folder):
    (folder / "lie.safetensors").write_bytes(file_bytes(b"{}", length=10**9))
    with pytest.raises(HeaderError, match=r"'org/model/lie\.safetensors'.*limit"):
        read_remote_header(served("lie.safetensors"))
    assert len(hub.paths(host="storage")) == 1


def test_items_are_worked_on_side_by_side_and_given_in_order():
    together = threading.Barrier(8, timeout=10)

    def work(item):
        together.wait()
        return item

    assert list(concurrently(work, range(16))) == list(range(16))


def test_the_first_error_ends_the_work():
    def work(item):
        if item == 0:
            raise RemoteError("no")
        return item

    with pytest.raises(RemoteError, match="no"):
        list(concurrently(work, range(100)))
