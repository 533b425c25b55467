"""Models and adapters of the hub: what is read, what is fetched, what is pinned, and what is refused."""

import json
import shutil
import subprocess
import sys
import threading

import httpx2
import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import HfApi, constants
from safetensors.numpy import save_file

from portllm.capturing.adapter import capture_adapter
from portllm.capturing.tuned import capture_tuned
from portllm.checking.check import check_weights
from portllm.checkpoint.hub_repository import fetch, look_up
from portllm.checkpoint.model.identity import digest, fingerprint
from portllm.checkpoint.open import on_disk, open_checkpoint, side_file
from portllm.checkpoint.safetensors.names import INDEX_FILE
from portllm.errors import (
    AdapterFormatError,
    CheckpointError,
    HeaderError,
    IndexFileError,
    MissingShardError,
    NotFoundError,
    OutputExistsError,
    PlanRefusedError,
    RemoteError,
)
from portllm.inspecting.inspect import inspect, summary_to_json
from portllm.inspecting.text import render_summary
from portllm.merging.merge import merge
from portllm.patch.adapter_folder import folder_of, load_patch, read_record
from portllm.porting.port import port
from portllm.running.folder import check_runnable, model_folder
from portllm.tensors.bytes import read_bytes
from portllm.tensors.windows import sample_window
from tests.hub import COMMIT, OLDER_COMMIT, Repo
from tests.safetensors_files import contents, entries_of, file_bytes

SHARDED = {"max_shard_size": "3KB"}
BASE_OF_7B, EVOLVED_OF_7B = "org/seven", "org/seven-next"


def shapes_of_7b():
    """Names and shapes of Llama 2 7B, by shard."""
    shards = [{"model.embed_tokens.weight": (32000, 4096)}, {}, {"model.norm.weight": (4096,)}]
    for layer in range(32):
        at = f"model.layers.{layer}"
        shards[layer // 11] |= {
            **{f"{at}.self_attn.{name}_proj.weight": (4096, 4096) for name in "qkvo"},
            **{f"{at}.mlp.{name}_proj.weight": (11008, 4096) for name in ("gate", "up")},
            f"{at}.mlp.down_proj.weight": (4096, 11008),
            f"{at}.input_layernorm.weight": (4096,),
            f"{at}.post_attention_layernorm.weight": (4096,),
        }
    shards[2]["lm_head.weight"] = (32000, 4096)
    return shards


def write_7b(folder, *, seed):
    """A sparse model of 13.5 GB that takes 2 MB of the disk: zeros but for the windows that fingerprints read."""
    folder.mkdir()
    generator = np.random.default_rng(seed)
    weight_map = {}
    for number, shapes in enumerate(shapes_of_7b(), start=1):
        name = f"model-{number:05}-of-00003.safetensors"
        entries, size = entries_of({tensor: ("BF16", shape) for tensor, shape in shapes.items()})
        head = file_bytes(entries)
        with open(folder / name, "wb") as stream:
            stream.write(head)
            stream.truncate(len(head) + size)
            for tensor, entry in entries.items():
                first, last = entry["data_offsets"]
                start, stop = sample_window(tensor, last - first)
                values = (1 + 0.01 * generator.standard_normal((stop - start) // 2)).astype(np.float32)
                stream.seek(len(head) + first + start)
                stream.write((values.view(np.uint32) >> 16).astype("<u2").tobytes())
        weight_map |= dict.fromkeys(shapes, name)
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": false}')
    return folder


def write_adapter_of_7b(folder):
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    at = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    tensors = {at.format(n, letter): ("BF16", shape) for n in range(32) for letter, shape in
               (("A", (1, 4096)), ("B", (4096, 1)))}  # fmt: skip
    entries, size = entries_of(tensors)
    (folder / "adapter_model.safetensors").write_bytes(file_bytes(entries, b"\x80\x3f" * (size // 2)))
    return folder


@pytest.fixture(scope="module")
def seven(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seven")
    write_7b(folder / "base", seed=0)
    write_7b(folder / "evolved", seed=1)
    write_adapter_of_7b(folder / "adapter")
    return folder


def ranged(hub):
    """The requests for parts of weights."""
    return [asked for asked in hub.asked if asked.range]


@pytest.mark.parametrize("shards", [{}, SHARDED], ids=["one file", "shards"])
def test_a_model_of_the_hub_is_the_model_on_disk(hub, tiny, shards):
    folder = tiny("base", **shards)
    hub.add("org/model", folder)
    remote, local = open_checkpoint("org/model"), open_checkpoint(folder)
    assert (remote.name, remote.revision, remote.is_remote, local.is_remote) == ("org/model", COMMIT, True, False)
    assert (remote.config, remote.metadata) == (local.config, local.metadata)
    assert list(remote.infos) == list(local.infos)
    assert all(read_bytes(remote.infos[name]) == read_bytes(info) for name, info in local.infos.items())
    assert fingerprint(remote) == fingerprint(local)
    assert digest(remote) == digest(local)


def test_inspecting_a_7b_model_takes_about_a_megabyte(hub, seven):
    hub.add(BASE_OF_7B, seven / "base")
    summary = inspect(BASE_OF_7B)
    assert summary.n_params == 6_738_415_616
    assert summary.revision == COMMIT
    assert f"revision      {COMMIT}" in render_summary(summary)
    assert summary_to_json(summary)["revision"] == COMMIT
    assert hub.n_bytes < 1_500_000
    assert len(hub.asked) < 320
    assert summary.fingerprint == fingerprint(open_checkpoint(seven / "base"))


def test_porting_between_7b_models_takes_a_few_megabytes(hub, seven, tmp_path):
    hub.add(BASE_OF_7B, seven / "base")
    hub.add(EVOLVED_OF_7B, seven / "evolved")
    where = {"base": open_checkpoint(BASE_OF_7B), "evolved": open_checkpoint(EVOLVED_OF_7B)}
    ported = port(load_patch(seven / "adapter"), **where, out=tmp_path / "ported")
    assert hub.n_bytes < 3_000_000
    assert len(hub.asked) < 640
    assert (ported.record.base.name, ported.record.base.revision) == (EVOLVED_OF_7B, COMMIT)
    assert (ported.record.ports[0].source.name, ported.record.ports[0].source.revision) == (BASE_OF_7B, COMMIT)
    assert 0.01 < ported.record.ports[0].evidence["sampled_drift"] < 0.02
    local = port(
        load_patch(seven / "adapter"),
        base=open_checkpoint(seven / "base"),
        evolved=open_checkpoint(seven / "evolved"),
        out=tmp_path / "local",
    )
    assert local.record.ports[0].evidence == ported.record.ports[0].evidence
    assert local.record.base.fingerprint == ported.record.base.fingerprint
    assert local.record.base.revision is None
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ported", "local")]
    assert (configs[0]["base_model_name_or_path"], configs[0]["revision"]) == (EVOLVED_OF_7B, COMMIT)
    assert "revision" not in configs[1]


def test_a_check_of_models_of_the_hub_is_that_of_the_models_on_disk_and_downloads_none(hub, tiny):
    hub.add("org/base", tiny("base"))
    hub.add("org/evolved", tiny("evolved"))
    patch = load_patch(tiny("adapter"))
    report = check_weights(patch, base=open_checkpoint("org/base"), evolved=open_checkpoint("org/evolved"))
    local = check_weights(patch, base=open_checkpoint(tiny("base")), evolved=open_checkpoint(tiny("evolved")))
    assert all(asked.range for asked in hub.asked if asked.path.endswith(".safetensors"))
    assert report.update.cells == local.update.cells
    assert report.patches[0].verdict == local.patches[0].verdict


@pytest.mark.slow
def test_checking_between_7b_models_takes_megabytes(hub, seven):
    hub.add(BASE_OF_7B, seven / "base")
    hub.add(EVOLVED_OF_7B, seven / "evolved")
    patch = load_patch(seven / "adapter")
    report = check_weights(patch, base=open_checkpoint(BASE_OF_7B), evolved=open_checkpoint(EVOLVED_OF_7B))
    assert report.update.n_elements > 1_000_000
    assert hub.n_bytes < 20_000_000
    assert len(hub.asked) < 2_500


def test_the_windows_of_a_fingerprint_are_read_side_by_side(hub, tiny, monkeypatch):
    hub.add("org/model", tiny("base"))
    checkpoint = open_checkpoint("org/model")
    together, first = threading.Barrier(8, timeout=10), iter(range(8))
    next_fault = hub.next_fault

    def wait_for_others():
        if next(first, None) is not None:
            together.wait()
        return next_fault()

    monkeypatch.setattr(hub, "next_fault", wait_for_others)
    assert fingerprint(checkpoint) == fingerprint(open_checkpoint(tiny("base")))
    assert next(first, None) is None


@pytest.mark.parametrize("row", [0, 9000, 20000])
def test_a_stored_head_of_a_model_of_the_hub_is_compared_with_the_embedding_all_over(row, hub, tmp_path):
    shape = (20001, 32)
    embedding = np.arange(shape[0] * shape[1], dtype=np.float32).reshape(shape)
    head = embedding.copy()
    head[row:] += 1  # from there on, so that the first row of what was trained may lie anywhere
    for name, stored in (("tied", embedding), ("apart", head)):
        (tmp_path / name).mkdir()
        tensors = {"model.embed_tokens.weight": embedding, "lm_head.weight": stored}
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text('{"tie_word_embeddings": true}')
        hub.add(f"org/{name}", tmp_path / name)
    assert open_checkpoint("org/tied").tied_embedding is not None
    apart = open_checkpoint("org/apart")
    assert apart.tied_embedding is None
    asked = len(hub.asked)
    assert apart.tied_embedding is None
    assert hub.n_bytes < 2 << 20
    assert len(hub.asked) == asked  # it is not compared again


def test_opening_reads_a_little_of_each_shard(hub, tiny):
    hub.add("org/model", tiny("base", **SHARDED))
    open_checkpoint("org/model")
    shards = {asked.path.rsplit("/", 1)[-1]: asked.n_bytes for asked in ranged(hub) if asked.host == "storage"}
    assert len(shards) == 3
    assert all(n_bytes < 8192 for n_bytes in shards.values())


def test_a_merge_into_a_model_of_the_hub_is_the_merge_into_the_model_on_disk(hub, tiny, tmp_path):
    adapter, folder = load_patch(tiny("adapter")), tiny("base", **SHARDED)
    served = shutil.copytree(folder, tmp_path / "served")
    for name in ("pytorch_model.bin", "modeling.py", "consolidated.safetensors", "pytorch_model.bin.index.json"):
        (served / name).write_bytes(b"{}")
    hub.add("org/model", served)
    seen = []
    report = merge(
        adapter,
        into=open_checkpoint("org/model"),
        out=tmp_path / "from-hub",
        progress=lambda *step: seen.append(step),
    )
    expected = merge(adapter, into=open_checkpoint(folder), out=tmp_path / "from-disk")
    mine, other = contents(tmp_path / "from-hub"), contents(tmp_path / "from-disk")
    manifest = json.loads(mine.pop("portllm.json"))
    assert other.pop("portllm.json")
    assert mine.pop("README.md") != other.pop("README.md")  # only the one names a base of the Hub
    assert mine == other
    assert (report.output.fingerprint, report.output.digest) == (expected.output.fingerprint, expected.output.digest)
    assert (report.into.digest, report.into.revision) == (expected.into.digest, COMMIT)
    assert manifest["into"]["revision"] == COMMIT
    fetched = {path.rsplit("/", 1)[-1] for path in hub.paths()}
    assert fetched.isdisjoint({"pytorch_model.bin", "modeling.py", "consolidated.safetensors"})
    assert "pytorch_model.bin.index.json" not in fetched
    loads = [step for step in seen if step[0] == "download org/model"]
    assert loads[-1][1] == loads[-1][2] >= open_checkpoint(folder).n_bytes
    assert [done for _, done, _, _ in loads] == sorted(done for _, done, _, _ in loads)


def test_a_patch_from_two_models_of_the_hub_is_that_from_two_models_on_disk(hub, tiny, tmp_path):
    hub.add("org/base", tiny("base"))
    hub.add("org/tuned", tiny("evolved"))
    capture_tuned(open_checkpoint("org/base"), open_checkpoint("org/tuned"), out=tmp_path / "a", rank=2)
    capture_tuned(open_checkpoint(tiny("base")), open_checkpoint(tiny("evolved")), out=tmp_path / "b", rank=2)
    mine, other = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert mine["adapter_model.safetensors"] == other["adapter_model.safetensors"]
    assert read_record(tmp_path / "a").base.revision == COMMIT


def test_nothing_is_downloaded_for_a_merge_that_is_refused(hub, tiny, tmp_path):
    hub.add("org/model", tiny("base", layers=1))
    with pytest.raises(PlanRefusedError):
        merge(load_patch(tiny("adapter")), into=open_checkpoint("org/model"), out=tmp_path / "out")
    assert all(asked.range for asked in hub.asked if asked.path.endswith(".safetensors"))


def test_nothing_is_downloaded_for_a_merge_whose_place_is_taken(hub, tiny, tmp_path):
    hub.add("org/model", tiny("base"))
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputExistsError):
        merge(load_patch(tiny("adapter")), into=open_checkpoint("org/model"), out=tmp_path / "out")
    assert all(asked.range for asked in hub.asked if asked.path.endswith(".safetensors"))


def test_what_was_downloaded_is_opened_from_the_cache(hub, tiny):
    hub.add("org/model", tiny("base", **SHARDED))
    local = on_disk(open_checkpoint("org/model"))
    hub.reset()
    again = open_checkpoint("org/model")
    assert (again.is_remote, again.revision, again.folder) == (False, COMMIT, local.folder)
    assert again.infos == local.infos
    assert hub.paths() == ["/api/models/org/model/revision/main"]


def test_a_model_on_disk_is_not_downloaded(hub, tiny):
    local = open_checkpoint(tiny("base"))
    assert on_disk(local) is local
    assert hub.asked == []


def test_a_model_that_is_to_run_is_downloaded_with_its_configuration(hub, tiny, tmp_path):
    hub.add("org/model", tiny("base"))
    checkpoint = open_checkpoint("org/model")
    check_runnable(checkpoint)
    folder = model_folder(checkpoint)
    assert {"config.json", "generation_config.json", "model.safetensors"} <= {file.name for file in folder.iterdir()}


def test_the_digest_of_a_model_of_the_hub_is_that_of_the_model_on_disk(hub, tiny):
    hub.add("org/model", tiny("base"))
    assert inspect("org/model", with_digest=True).digest == digest(open_checkpoint(tiny("base")))


def test_a_file_beside_the_weights_is_fetched_when_it_is_asked_for(hub, tiny, tmp_path):
    served = shutil.copytree(tiny("base"), tmp_path / "served")
    (served / "tokenizer.json").write_text('{"version": "1.0"}')
    hub.add("org/model", served)
    checkpoint = open_checkpoint("org/model")
    assert not any(path.endswith("tokenizer.json") for path in hub.paths())
    assert side_file(checkpoint, "tokenizer.json").read_text() == '{"version": "1.0"}'
    assert side_file(checkpoint, "vocab.json") is None
    assert side_file(open_checkpoint(served), "tokenizer.json") == served / "tokenizer.json"
    assert side_file(open_checkpoint(served), "vocab.json") is None
    assert side_file(open_checkpoint(served / "model.safetensors"), "tokenizer.json") is None


def test_a_revision_is_a_commit_a_branch_or_a_tag(hub, tiny):
    folders = {COMMIT: tiny("evolved"), OLDER_COMMIT: tiny("base")}
    hub.repos["org/model"] = Repo(folders, {"main": COMMIT, "v1/stable": OLDER_COMMIT})
    for name, commit in [
        ("org/model", COMMIT),
        ("org/model@main", COMMIT),
        ("org/model@v1/stable", OLDER_COMMIT),
        (f"org/model@{OLDER_COMMIT}", OLDER_COMMIT),
    ]:
        opened = open_checkpoint(name)
        assert opened.revision == commit
        assert fingerprint(opened) == fingerprint(open_checkpoint(folders[commit]))


def test_a_branch_that_moves_does_not_change_a_model_that_is_open(hub, tiny):
    hub.repos["org/model"] = Repo({COMMIT: tiny("evolved"), OLDER_COMMIT: tiny("base")}, {"main": OLDER_COMMIT})
    opened = open_checkpoint("org/model")
    hub.repos["org/model"].revisions["main"] = COMMIT
    assert fingerprint(opened) == fingerprint(open_checkpoint(tiny("base")))
    assert fingerprint(on_disk(opened)) == fingerprint(open_checkpoint(tiny("base")))


def test_a_folder_goes_before_a_model_of_the_hub(hub, tiny, tmp_path):
    shutil.copytree(tiny("base"), tmp_path / "org" / "model")
    assert open_checkpoint("org/model").folder.is_dir()
    assert hub.asked == []


@pytest.mark.parametrize(
    "name", ["none", "./org/model", "a/b/c", "builtin:none", "org/model.safetensors", "~/model", "org/model@../x"]
)
def test_no_other_name_touches_the_network(hub, name):
    with pytest.raises(NotFoundError):
        open_checkpoint(name)
    assert hub.asked == []


def test_a_mistyped_path_is_not_sent_to_the_hub(hub, tmp_path):
    (tmp_path / "models").mkdir()
    with pytest.raises(NotFoundError, match="models/llama@main"):
        open_checkpoint("models/llama")
    with pytest.raises(AdapterFormatError, match="no such folder"):
        load_patch("models/llama")
    assert hub.asked == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/none", "no model of that name"),
        ("org/model@v9", "no such revision"),
        ("or--g/model", "not a valid Hub id"),
    ],
)
def test_a_model_that_the_hub_does_not_have_is_not_found(hub, tiny, name, message):
    hub.add("org/model", tiny("base"))
    with pytest.raises(NotFoundError, match=f"'{name}': .*{message}"):
        open_checkpoint(name)


def test_a_gated_model_says_how_to_get_access(hub, tiny):
    hub.add("org/model", tiny("base"), is_gated=True)
    with pytest.raises(RemoteError, match=rf"is gated\. Request access at {hub.address()}/org/model and log in"):
        open_checkpoint("org/model")


def test_a_hub_that_is_overloaded_is_asked_again(hub, tiny, waits):
    hub.add("org/model", tiny("base"))
    hub.api_faults = [503, 429]
    assert open_checkpoint("org/model").revision == COMMIT
    assert waits == [0.5, 1.0]


def test_a_hub_that_stays_overloaded_is_reported(hub, tiny, waits):
    hub.api_faults = [503] * 9
    with pytest.raises(RemoteError, match="'org/model': the Hub returned status 503, 6 times in a row"):
        open_checkpoint("org/model")


def test_a_hub_that_fails_otherwise_is_reported(hub):
    hub.api_faults = [418]
    with pytest.raises(RemoteError, match="returned status 418"):
        open_checkpoint("org/model")


def test_a_hub_that_is_gone_is_soon_reported_with_the_switch_to_set(hub, tiny, waits):
    hub.add("org/cached", tiny("base"))
    on_disk(open_checkpoint("org/cached"))
    hub.close()
    huggingface_hub.close_session()
    with pytest.raises(RemoteError, match=r"cannot reach http://127.*The cache has it: .* set HF_HUB_OFFLINE=1\.$"):
        open_checkpoint("org/cached")
    with pytest.raises(RemoteError, match=r"set HF_HUB_OFFLINE=1 once .* in the cache: hf download org/model\.$"):
        open_checkpoint("org/model")
    assert waits == [0.5] * 2


def test_a_network_that_swallows_everything_is_asked_once(hub, monkeypatch, waits):
    def swallow(*_, **options):
        assert options["timeout"].connect <= 3
        raise httpx2.ConnectTimeout("timed out")

    monkeypatch.setattr(HfApi, "model_info", swallow)
    with pytest.raises(RemoteError, match=r"cannot reach http://127\S+ \(timed out\)\. Check the connection"):
        open_checkpoint("org/model")
    assert waits == []


def test_faults_in_the_middle_of_a_port_do_not_change_its_result(hub, tiny, tmp_path, waits):
    hub.add("org/base", tiny("base"))
    hub.add("org/evolved", tiny("evolved"))
    hub.faults = ["cut", (503,), "short", (429, {"Retry-After": "1"}), "cut"]
    adapter = load_patch(tiny("adapter"))
    where = {"base": open_checkpoint("org/base"), "evolved": open_checkpoint("org/evolved")}
    port(adapter, **where, out=tmp_path / "a")
    local = {"base": open_checkpoint(tiny("base")), "evolved": open_checkpoint(tiny("evolved"))}
    port(adapter, **local, out=tmp_path / "b")
    assert hub.faults == []
    assert len(waits) == 5
    mine, other = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert mine["adapter_model.safetensors"] == other["adapter_model.safetensors"]
    mine, other = json.loads(mine["patch.json"]), json.loads(other["patch.json"])
    assert mine["base"]["fingerprint"] == other["base"]["fingerprint"]
    assert mine["ports"][0]["evidence"] == other["ports"][0]["evidence"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda f: (f / "model-00002-of-00003.safetensors").unlink(), MissingShardError, "1 of 3 shards are missing"),
        (lambda f: (f / INDEX_FILE).write_text("{"), IndexFileError, "not valid JSON"),
        (
            lambda f: (f / INDEX_FILE).write_text('{"weight_map": {"w": "../x.safetensors"}}'),
            IndexFileError,
            "is not the name of",
        ),
        (lambda f: (f / INDEX_FILE).unlink(), NotFoundError, "Download the index too"),
        (lambda f: (f / "model-00001-of-00003.safetensors").write_bytes(b"12"), HeaderError, "at least 8"),
        (lambda f: (f / "config.json").write_text("[]"), CheckpointError, "must contain a JSON object"),
    ],
    ids=["a shard is missing", "index", "index leaves the folder", "no index", "header", "configuration"],
)
def test_a_damaged_model_is_refused_as_one_on_disk_is(hub, tiny, tmp_path, change, error, message):
    served = shutil.copytree(tiny("base", **SHARDED), tmp_path / "served")
    change(served)
    hub.add("org/model", served)
    with pytest.raises(error, match=message):
        open_checkpoint("org/model")


def test_an_index_too_large_to_read_is_not_fetched(hub, tiny, tmp_path):
    served = shutil.copytree(tiny("base", **SHARDED), tmp_path / "served")
    with open(served / INDEX_FILE, "ab") as stream:
        stream.truncate(64_000_001)
    hub.add("org/model", served)
    with pytest.raises(CheckpointError, match="the limit is 64000000"):
        open_checkpoint("org/model")
    assert hub.n_bytes < 10_000


def test_a_file_that_goes_on_after_its_end_is_not_fetched_whole(hub, tiny, tmp_path):
    served = shutil.copytree(tiny("adapter"), tmp_path / "served")
    hub.add("org/adapter", served)
    repository = look_up("org/adapter")
    size = (served / "adapter_config.json").stat().st_size
    with open(served / "adapter_config.json", "ab") as stream:
        stream.truncate(50_000_000)
    with pytest.raises(RemoteError, match=f"more than the {size} bytes that it lists"):
        fetch(repository, ["adapter_config.json"])


def test_pickled_weights_of_the_hub_are_refused(hub, tmp_path):
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "pytorch_model.bin").write_bytes(b"")
    hub.add("org/model", tmp_path / "served")
    with pytest.raises(NotFoundError, match="pickled weights, which are never read"):
        open_checkpoint("org/model")


def test_a_download_that_is_another_model_is_refused(hub, tiny):
    hub.add("org/model", tiny("base"))
    opened = open_checkpoint("org/model")
    hub.repos["org/model"].folders[COMMIT] = tiny("base", layers=1)
    with pytest.raises(RemoteError, match="does not contain the same tensors as org/model"):
        on_disk(opened)


def test_a_download_with_other_values_is_refused_by_a_merge(hub, tiny, tmp_path):
    hub.add("org/model", tiny("base"))
    opened = open_checkpoint("org/model")
    assert fingerprint(opened)
    hub.repos["org/model"].folders[COMMIT] = tiny("evolved")
    with pytest.raises(RemoteError, match="its fingerprint differs"):
        merge(load_patch(tiny("adapter")), into=opened, out=tmp_path / "out")


def test_offline_the_cache_serves_a_model_that_is_whole_in_it(hub, tiny, monkeypatch):
    hub.add("org/model", tiny("base"))
    expected = fingerprint(on_disk(open_checkpoint("org/model")))
    on_disk(open_checkpoint("org/model@main"))
    hub.reset()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    opened = open_checkpoint(f"org/model@{COMMIT}")
    assert (opened.revision, opened.is_remote, fingerprint(opened)) == (COMMIT, False, expected)
    assert hub.asked == []


@pytest.mark.parametrize("name", ["org/model", "org/model@main"])
def test_offline_a_branch_is_what_it_was_when_it_was_fetched(hub, tiny, monkeypatch, name):
    hub.add("org/model", tiny("base"))
    on_disk(open_checkpoint("org/model"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert open_checkpoint(name).revision == COMMIT


def test_offline_a_model_that_is_not_whole_in_the_cache_is_not_found(hub, tiny, monkeypatch):
    hub.add("org/model", tiny("base"))
    open_checkpoint("org/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NotFoundError, match=r"HF_HUB_OFFLINE is set.*hf download org/model"):
        open_checkpoint(f"org/model@{COMMIT}")


def test_an_adapter_of_the_hub_is_the_adapter_on_disk(hub, tiny, tmp_path):
    served = shutil.copytree(tiny("adapter"), tmp_path / "served")
    config = json.loads((served / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "org/model", "revision": "v1.0"}
    (served / "adapter_config.json").write_text(json.dumps(config))
    (served / "training_args.bin").write_bytes(b"pickle")
    hub.add("org/adapter", served)
    patch, local = load_patch("org/adapter"), load_patch(served)
    assert (patch.name, patch.revision, local.revision) == ("org/adapter", COMMIT, None)
    assert folder_of(patch) != folder_of(local) == served
    assert [read_bytes(d.a) for d in patch.deltas.values()] == [read_bytes(d.a) for d in local.deltas.values()]
    assert not any(path.endswith("training_args.bin") for path in hub.paths())
    summary = inspect("org/adapter")
    assert (summary.revision, summary.base_name, summary.base_revision) == (COMMIT, "org/model", "v1.0")
    assert "org/model at revision v1.0, by name only" in render_summary(summary)
    assert COMMIT in render_summary(summary)


def test_a_patch_of_the_hub_keeps_its_record(hub, tiny, tmp_path):
    base = open_checkpoint(tiny("base"))
    made = capture_adapter(load_patch(tiny("adapter")), base=base, out=tmp_path / "patch")
    hub.add("org/patch", tmp_path / "patch")
    assert load_patch("org/patch@main").record == made.record


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["config.json"], r"has no adapter_config\.json on the Hub"),
        (["adapter_config.json", "adapter_model.bin"], "a pickle, which can run code and is never read"),
        (["adapter_config.json"], r"has no adapter_model\.safetensors on the Hub\. Ask"),
    ],
    ids=["a model", "pickled", "no tensors"],
)
def test_what_is_no_adapter_is_refused_before_it_is_fetched(hub, tmp_path, files, message):
    (tmp_path / "served").mkdir()
    for name in files:
        (tmp_path / "served" / name).write_text("{}")
    hub.add("org/adapter", tmp_path / "served")
    with pytest.raises(AdapterFormatError, match=message):
        load_patch("org/adapter")
    assert hub.paths() == ["/api/models/org/adapter/revision/main"]


def test_an_adapter_given_as_a_model_is_said_to_be_one(hub, tiny):
    hub.add("org/adapter", tiny("adapter"))
    with pytest.raises(NotFoundError, match="'org/adapter': is an adapter, not a model"):
        open_checkpoint("org/adapter")


def test_a_hub_that_does_not_name_the_commit_is_refused(hub, tiny):
    hub.repos["org/model"] = Repo({"../../elsewhere": tiny("base")}, {"main": "../../elsewhere"})
    with pytest.raises(RemoteError, match="does not report a commit"):
        open_checkpoint("org/model")


@pytest.mark.parametrize(
    "answer",
    [
        b"", b"<html>", b"[]", b"null", b"5", b"{}", b'{"id": 5, "siblings": 5}', b'{"id": "a/b", "siblings": [5]}',
        b'{"id": "a/b", "siblings": [{}]}', b'{"id": "a/b", "sha": 5}', b'{"id": "a/b", "lastModified": "never"}',
        b"[" * 100_000, b'{"id": "a/b", "sha": "../../../../../../../../../../../../../etc/x"}', b"\xff\xfe",
        b'{"id": "a/b", "siblings": [{"rfilename": "x", "size": 5, "lfs": 7}]}',
    ],
    ids=range(15),
)  # fmt: skip
def test_an_answer_that_describes_no_model_is_refused(hub, answer):
    hub.api_faults = [(200, {"Content-Type": "application/json"}, answer)]
    with pytest.raises(RemoteError, match="not return a valid model description|does not report a commit"):
        look_up("org/model")


@pytest.mark.parametrize(
    "name",
    [
        "..",
        ".",
        "",
        "../config.json",
        "/etc/passwd",
        "a/../../b",
        "..\\b",
        "a\0b",
        "\x1b[2J",
        "a\nb",
        "\u202ea",
        5,
        None,
    ],
)
def test_a_file_whose_name_leads_elsewhere_is_not_there(hub, name):
    entries = [{"rfilename": name, "size": 5}, {"rfilename": "config.json", "size": 5}]
    body = json.dumps({"id": "org/model", "sha": COMMIT, "siblings": entries}).encode()
    hub.api_faults = [(200, {"Content-Type": "application/json"}, body)]
    assert list(look_up("org/model").files) == ["config.json"]


@pytest.mark.parametrize("size", [-1, "5", None, 1.5, [5]])
def test_a_file_without_a_size_is_not_there(hub, size):
    entries = [{"rfilename": "model.safetensors", "size": size}]
    body = json.dumps({"id": "org/model", "sha": COMMIT, "siblings": entries}).encode()
    hub.api_faults = [(200, {"Content-Type": "application/json"}, body)]
    assert dict(look_up("org/model").files) == {}


def test_only_files_at_the_top_of_a_repository_count(hub, tiny, tmp_path):
    served = shutil.copytree(tiny("base"), tmp_path / "served")
    (served / "onnx").mkdir()
    (served / "onnx" / "config.json").write_text("{}")
    hub.add("org/model", served)
    assert set(look_up("org/model").files) == {file.name for file in served.iterdir() if file.is_file()}


def test_the_program_honors_the_environment_and_loads_no_tensor_library(hub, tiny, tmp_path):
    hub.add("org/model", tiny("base"))
    program = (
        "import sys\nfrom portllm.cli.main import main\n"
        "sys.argv = ['portllm', 'inspect', 'org/model']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    environment = {"HF_ENDPOINT": hub.address(), "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_other"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"revision      {COMMIT}" in done.stdout
    assert done.stderr == ""
    assert {asked.token for asked in hub.asked} == {"Bearer hf_other", None}
