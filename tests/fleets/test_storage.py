"""Patches and outputs on S3, from a server of this test, and uploads that are cut off."""

import json
import logging
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from portllm.errors import FleetFileError, MissingExtraError, StorageError
from portllm.fleets import storage
from portllm.fleets.fleet import plan_fleet, run_fleet
from tests.fleets.conftest import bytes_below


@pytest.fixture(scope="module")
def server():
    """An S3 server on this machine; its address and file system are in the environment."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "tests")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "tests")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        started = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        started.start()
        host, port = started.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        yield f"http://{host}:{port}"
        started.stop()


@pytest.fixture
def bucket(server, folder, request):
    """A bucket that holds the folder's adapters."""
    name = f"s3://bucket-{abs(hash(request.node.name))}"
    system = fsspec.filesystem("s3", use_listings_cache=False)
    system.mkdir(name)
    for file in (folder / "adapters").rglob("*"):
        if file.is_file():
            system.put_file(str(file), f"{name}/patches/{file.relative_to(folder / 'adapters').as_posix()}")
    return name


@pytest.fixture
def run(here):
    def start(file, **how):
        pool = here()
        return run_fleet(plan_fleet(file, **how), pool), pool.jobs

    return start


def fetch(place, to):
    fsspec.filesystem(place.partition("://")[0], use_listings_cache=False).get(place, str(to), recursive=True)
    return to


def test_patches_from_s3_and_outputs_on_s3_are_those_of_a_local_run(run, write, folder, bucket):
    steps = '["port", "merge"]'
    run(write(do=steps, evolved='["v2"]', output="out"))
    rows, _ = run(write(do=steps, evolved='["v2"]', patches=f'["{bucket}/patches"]', output=f"{bucket}/out"))
    assert {row.status for row in rows} == {"done"}
    there = bytes_below(fetch(f"{bucket}/out", folder / "fetched"))
    here = bytes_below(folder / "out")
    del there["fleet.json"], here["fleet.json"], here[".fleet.lock"]
    assert there == here


@pytest.mark.slow
def test_a_second_run_on_s3_does_what_is_missing(run, write, bucket):
    file = write(patches=f'["{bucket}/patches/*"]', output=f"{bucket}/out")
    run(file)
    assert run(file)[1] == []
    system = fsspec.filesystem("s3", use_listings_cache=False)
    system.rm_file(f"{bucket}/out/v2/a/port/adapter_model.safetensors")
    system.pipe_file(f"{bucket}/out/v3/b/port/patch.json", b"{}")
    assert run(file)[1] == ["v2/a", "v3/b"]
    assert run(file)[1] == []


def test_a_patch_that_changes_on_s3_is_another_input(run, write, folder, bucket, tiny):
    file = write(patches=f'["{bucket}/patches"]', output="out", evolved='["v2"]')
    run(file)
    other = tiny("adapter", seed=9) / "adapter_model.safetensors"
    fsspec.filesystem("s3").put_file(str(other), f"{bucket}/patches/a/adapter_model.safetensors")
    rows, _ = run(file)
    assert {row.folder: row.status for row in rows} == {"v2/a": "refused", "v2/b": "done"}


@pytest.mark.parametrize("place", ["s3://no-such-bucket-of-this-test/patches", "{bucket}/nothing"])
def test_a_place_on_s3_where_nothing_is_is_named(write, bucket, place):
    with pytest.raises(FleetFileError, match="no patch found|NoSuchBucket|does not exist"):
        plan_fleet(write(patches=f'["{place.format(bucket=bucket)}"]'))


class Cut(MemoryFileSystem):
    """A store whose connection is cut after so many uploads."""

    protocol = "cut"
    cachable = False
    uploads = 0
    allowed = 10**9
    store = {}  # noqa: RUF012 (one for all instances, as in its parent)
    pseudo_dirs = [""]  # noqa: RUF012

    def put_file(self, *arguments, **options):
        type(self).uploads += 1
        if self.uploads > self.allowed:
            raise ConnectionResetError("the connection was cut")
        super().put_file(*arguments, **options)


@pytest.fixture
def cut():
    fsspec.register_implementation("cut", Cut, clobber=True)
    storage._system.cache_clear()
    Cut.uploads, Cut.allowed = 0, 10**9
    Cut.store.clear()
    return Cut


@pytest.fixture
def output(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "portllm.json"):
        (folder / name).write_text(name)
    return folder


@pytest.mark.parametrize("allowed", range(3))
def test_an_upload_that_is_cut_off_never_has_its_record(cut, output, allowed):
    storage.publish(output, "cut://store/out", records=["portllm.json"])
    cut.uploads, cut.allowed = 0, allowed
    with pytest.raises(StorageError, match="connection was cut") as failed:
        storage.publish(output, "cut://store/out", records=["portllm.json"])
    assert failed.value.can_pass
    assert len(storage.sizes("cut://store/out")) == allowed
    assert "portllm.json" not in storage.sizes("cut://store/out")


def test_what_was_there_before_is_gone_when_another_output_is_published(cut, output):
    (output / "model-00002.safetensors").write_text("more")
    storage.publish(output, "cut://store/out", records=["portllm.json"])
    (output / "model-00002.safetensors").unlink()
    storage.publish(output, "cut://store/out", records=["portllm.json"])
    assert sorted(storage.sizes("cut://store/out")) == ["config.json", "model.safetensors", "portllm.json"]


def test_an_upload_that_arrives_short_is_noticed_before_its_record(cut, output, monkeypatch):
    def short(self, local, remote, **_):
        self.pipe_file(remote, Path(local).read_bytes()[:-1])

    monkeypatch.setattr(cut, "put_file", short)
    with pytest.raises(StorageError, match="config.json': 11 bytes were sent, but 10 arrived"):
        storage.publish(output, "cut://store/out", records=["portllm.json"])
    assert "portllm.json" not in storage.sizes("cut://store/out")


def test_what_a_cut_network_left_undone_the_next_run_does(cut, run, write, here):
    plan = plan_fleet(write(output="cut://store/out", evolved='["v2"]'))
    pool = here()
    cut.allowed = 1
    rows = run_fleet(plan, pool, retries=0)
    assert {row.status for row in rows} == {"failed"}
    cut.allowed = 10**9
    rows, _ = run(write(output="cut://store/out", evolved='["v2"]'))
    assert {row.status for row in rows} == {"done"}
    state = json.loads(storage.read_text("cut://store/out/fleet.json"))
    assert [row["status"] for row in state["cells"]] == ["done", "done"]


def test_a_missing_file_system_is_named_with_its_extra(monkeypatch):
    def missing(protocol):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(storage, "_system", missing)
    with pytest.raises(MissingExtraError, match="pip install 'gcsfs>="):
        storage.sizes("gs://bucket/out")


@pytest.mark.parametrize(
    ("error", "can_pass"),
    [
        (ConnectionResetError("reset"), True),
        (TimeoutError("slow"), True),
        (OSError(5, "input/output error"), True),
        (OSError(28, "no space left"), False),
        (FileNotFoundError("gone"), False),
        (PermissionError("forbidden"), False),
        (ValueError("protocol not known"), False),
    ],
)
def test_only_what_a_network_does_can_pass(error, can_pass):
    with pytest.raises(StorageError) as told, storage._reached("memory://x"):
        raise error
    assert told.value.can_pass is can_pass


def test_errors_of_botocore_that_mean_the_network_can_pass():
    from botocore.exceptions import ConnectTimeoutError, EndpointConnectionError, NoCredentialsError

    assert storage._can_pass(EndpointConnectionError(endpoint_url="x"))
    assert storage._can_pass(ConnectTimeoutError(endpoint_url="x"))
    assert not storage._can_pass(NoCredentialsError())
