"""Verifying: no byte of a patch or of a merged model can change unnoticed, and what is told is what happened."""

import json
import os
import random
import shutil

import pytest

from portllm.capturing.adapter import capture_adapter
from portllm.checkpoint.open import open_checkpoint
from portllm.errors import CheckpointError, NotFoundError, PatchRecordError, PortLLMError
from portllm.exporting.export import export
from portllm.files.seal import render_sealed
from portllm.merging.merge import merge
from portllm.patch.adapter_folder import load_patch
from portllm.porting.port import port
from portllm.verifying.checks import verification_to_json
from portllm.verifying.verify import verify
from tests.safetensors_files import rewrite_header, write_tensors

SEED = 20


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A patch of one module, so small that every byte of it can be tried."""
    folder = tmp_path_factory.mktemp("small")
    write_tensors(folder / "base.safetensors", {"h.q_proj.weight": ("F32", (3, 2), bytes(range(24)))})
    (folder / "adapter").mkdir()
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    factors = {"A": ("F32", (1, 2), bytes(range(8))), "B": ("F32", (3, 1), bytes(range(12)))}
    write_tensors(
        folder / "adapter" / "adapter_model.safetensors",
        {f"base_model.model.h.q_proj.lora_{name}.weight": tensor for name, tensor in factors.items()},
    )
    base = open_checkpoint(folder / "base.safetensors")
    first = capture_adapter(load_patch(folder / "adapter"), base=base, out=folder / "first")
    port(first, evolved=base, out=folder / "patch")
    return folder / "patch"


def wrong(verification):
    return [check.subject for check in verification.checks if not check.holds]


def passes(folder):
    """Whether `verify` says so; refusing to read is not to say so."""
    try:
        return verify(folder).verified
    except PortLLMError:
        return False


# ---- one byte


EVERY = pytest.mark.parametrize("step", [9, pytest.param(1, marks=pytest.mark.slow)])
"""Each ninth place by default, from a place of the test's own; every one among the slow tests."""


def covered(folder):
    """The files of a folder that its record covers: all but the card, which people write to."""
    return sorted(file for file in folder.iterdir() if file.name != "README.md")


@EVERY
def test_every_flipped_byte_of_a_patch_is_caught(step, small, tmp_path):
    draw = random.Random(SEED)
    folder = shutil.copytree(small, tmp_path / "patch")
    assert passes(folder)
    for file in covered(folder):
        whole = file.read_bytes()
        for place in range(draw.randrange(step), len(whole), step):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << draw.randrange(8))]) + whole[place + 1 :])
            assert not passes(folder), (file.name, place)
        file.write_bytes(whole)
    assert passes(folder)


@EVERY
def test_every_white_space_of_a_record_counts(step, small, tmp_path):
    folder = shutil.copytree(small, tmp_path / "patch")
    record = folder / "patch.json"
    whole = record.read_bytes()
    for place in [place for place, byte in enumerate(whole) if byte in b" \n"][::step]:
        for other in b" \t\r\n":
            if other != whole[place]:
                record.write_bytes(whole[:place] + bytes([other]) + whole[place + 1 :])
                assert wrong(verify(folder)) == ["patch.json"], place
    for text in (whole + b"\n", whole[:-1], json.dumps(json.loads(whole)).encode()):
        record.write_bytes(text)
        assert wrong(verify(folder)) == ["patch.json"]


@pytest.mark.parametrize("name", ["patch", "merged"])
def test_flipped_bytes_of_every_file_of_a_real_one_are_caught(name, copy):
    draw = random.Random(SEED)
    folder = copy(name)
    assert passes(folder)
    for file in covered(folder):
        whole = file.read_bytes()
        places = {0, 1, 7, 8, 9, len(whole) - 1} | {draw.randrange(len(whole)) for _ in range(12)}
        for place in sorted(place for place in places if place < len(whole)):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << draw.randrange(8))]) + whole[place + 1 :])
            assert not passes(folder), (file.name, place)
        file.write_bytes(whole)
    assert passes(folder)


@pytest.mark.parametrize("name", ["patch", "merged"])
def test_a_file_that_is_cut_short_or_gone_is_caught(name, copy):
    folder = copy(name)
    for file in covered(folder):
        whole = file.read_bytes()
        for cut in (0, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:cut])
            assert not passes(folder), (file.name, cut)
        file.unlink()
        assert not passes(folder), file.name
        file.write_bytes(whole)
    assert passes(folder)


def test_a_byte_that_changed_without_a_trace_in_the_files_times_is_caught(copy, monkeypatch, tmp_path):
    """As a disk does it; a digest that was remembered for size and time would not notice."""
    monkeypatch.setenv("PORTLLM_CACHE", str(tmp_path / "cache"))
    folder = copy("merged")
    from portllm.checkpoint.model.identity import digest

    digest(open_checkpoint(folder))
    file = sorted(folder.glob("*.safetensors"))[-1]
    facts, data = file.stat(), bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert "digest" in wrong(verify(folder))


# ---- what is named


def test_a_patch_that_is_whole_is_told_check_by_check(written, tiny):
    found = verify(written / "patch", base=open_checkpoint(tiny("evolved")))
    assert found.verified
    assert (found.kind, found.notes) == ("patch", ("not covered by the record: README.md",))
    assert [check.subject for check in found.checks] == [
        "patch.json", "adapter_config.json", "adapter_model.safetensors", "tensors", "adapter", "ports", "base",
    ]  # fmt: skip
    assert verification_to_json(found)["verified"] is True


def test_a_model_that_is_whole_is_told_check_by_check(written, tiny):
    found = verify(written / "merged", base=open_checkpoint(tiny("evolved")))
    assert found.verified
    assert [check.subject for check in found.checks] == [
        "portllm.json", "config.json", "generation_config.json", "model.safetensors.index.json", "digest",
        "fingerprint", "base",
    ]  # fmt: skip


def test_a_changed_tensor_is_named(copy):
    folder = copy("patch")
    file = folder / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    found = verify(folder)
    assert wrong(found) == ["adapter_model.safetensors", "tensors"]
    (finding,) = [check.finding for check in found.checks if check.subject == "tensors"]
    last = max(load_patch(folder).record.tensors, key=lambda key: load_info(file, key).stop)
    assert finding == f"'{last}' differs"


def load_info(file, key):
    from portllm.checkpoint.safetensors.header_file import read_header

    return read_header(file).tensors[key]


def test_tensors_that_are_missing_or_more_are_named(small, tmp_path):
    folder = shutil.copytree(small, tmp_path / "patch")
    rewrite_header(
        folder / "adapter_model.safetensors",
        lambda entries: {key.replace("lora_A", "lora_a"): entry for key, entry in entries.items()},
    )
    (finding,) = [check.finding for check in verify(folder).checks if check.subject == "tensors"]
    assert "lora_A.weight' is missing" in finding
    assert "lora_a.weight' is not in the record" in finding


def test_metadata_in_a_header_counts(copy):
    folder = copy("merged")
    shard = sorted(folder.glob("*.safetensors"))[0]
    rewrite_header(shard, lambda entries: {**entries, "__metadata__": {"format": "np"}})
    assert wrong(verify(folder)) == [shard.name]


def test_another_base_is_named(written, tiny):
    for name in ("patch", "merged"):
        found = verify(written / name, base=open_checkpoint(tiny("base")))
        assert wrong(found) == ["base"]
        assert "the record names" in found.checks[-1].finding


def test_a_record_rewritten_with_a_new_seal_still_has_to_fit_the_tensors(copy):
    folder = copy("patch")
    values = json.loads((folder / "patch.json").read_text())
    values["tensors"] = dict.fromkeys(values["tensors"], "0" * 64)
    (folder / "patch.json").write_text(render_sealed(values))
    assert wrong(verify(folder)) == ["tensors"]


def test_a_chain_of_ports_that_does_not_lead_to_the_base_is_named(copy):
    folder = copy("patch")
    values = json.loads((folder / "patch.json").read_text())
    values["base"] = values["ports"][0]["from"]
    (folder / "patch.json").write_text(render_sealed(values))
    assert wrong(verify(folder)) == ["ports"]


def test_a_port_from_another_base_is_told_but_holds(copy):
    folder = copy("patch")
    values = json.loads((folder / "patch.json").read_text())
    (step,) = values["ports"]
    values["ports"] = [
        {**step, "to": step["from"]},
        {**step, "from": {**step["from"], "fingerprint": "s4k1:" + "0" * 40}},
    ]
    (folder / "patch.json").write_text(render_sealed(values))
    found = verify(folder)
    assert found.verified
    assert "1 of them do not start where the previous one ended" in next(
        c.finding for c in found.checks if c.subject == "ports"
    )


def test_files_that_nothing_covers_are_noted(copy):
    for name in ("patch", "merged"):
        folder = copy(name)
        (folder / "README.md").write_text("mine")
        found = verify(folder)
        assert found.verified
        assert found.notes == ("not covered by the record: README.md",)


def test_a_weight_file_that_belongs_to_no_model_is_no_part_of_a_verified_one(copy):
    folder = copy("merged")
    shutil.copyfile(sorted(folder.glob("*.safetensors"))[0], folder / "extra.safetensors")
    assert wrong(verify(folder)) == ["weights"]


def test_a_byte_of_a_stored_copy_of_a_tied_head_is_noticed(tiny, tmp_path):
    base = shutil.copytree(tiny("base"), tmp_path / "base")
    from safetensors.torch import load_file, save_file

    tensors = load_file(base / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"].repeat(200, 1)
    tensors |= {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.clone()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    merge(load_patch(tiny("adapter")), into=open_checkpoint(base), out=tmp_path / "out")
    assert passes(tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[load_info(file, "lm_head.weight").stop - 1] ^= 1
    file.write_bytes(data)
    assert wrong(verify(tmp_path / "out")) == ["digest", "fingerprint"]


# ---- what cannot be verified


def test_what_nothing_vouches_for_cannot_be_verified(tiny, tmp_path):
    for place, error, told in (
        (tmp_path / "nothing", NotFoundError, "no such folder"),
        (tiny("base"), NotFoundError, "contains neither"),
        (tiny("adapter"), PatchRecordError, "portllm capture --adapter"),
        ("org/name@main", NotFoundError, "hf download"),
    ):
        with pytest.raises(error, match=told):
            verify(place)


def test_a_record_or_manifest_that_is_no_json_cannot_be_read(copy):
    for name, file, error in (("patch", "patch.json", PatchRecordError), ("merged", "portllm.json", CheckpointError)):
        folder = copy(name)
        (folder / file).write_bytes(b"{")
        with pytest.raises(error, match="is not valid JSON"):
            verify(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.pop("files"),
        lambda values: values.pop("seal"),
        lambda values: values.pop("output"),
        lambda values: values["files"].update({"../config.json": "0" * 64}),
        lambda values: values["files"].update({"config.json": None}),
    ],
)
def test_a_manifest_of_another_form_does_not_verify(change, copy):
    folder = copy("merged")
    values = json.loads((folder / "portllm.json").read_text())
    change(values)
    (folder / "portllm.json").write_text(json.dumps(values))
    assert wrong(verify(folder)) == ["portllm.json"]


# ---- what is no file, and no name of one


@pytest.fixture
def listed(tmp_path):
    """Writes a folder with a sealed manifest of these files."""

    def write(files):
        mark = {"name": "m", "fingerprint": "s4k1:" + "0" * 40, "digest": None}
        write_tensors(tmp_path / "model.safetensors", {"w": ("F32", (1,), bytes(4))})
        values = {"output": mark, "into": mark, "files": dict.fromkeys(files, "0" * 64)}
        (tmp_path / "portllm.json").write_text(render_sealed(values))
        return tmp_path

    return write


@pytest.mark.parametrize("name", ["", ".", "..", "../secret", "/etc/passwd", "a/b", "a/..", "./a"])
def test_a_manifest_names_no_file_outside_its_folder(name, listed):
    verification = verify(listed([name]))
    assert wrong(verification) == ["portllm.json"]
    assert (
        f"files.{name}: is {name!r}; expected the name of a file in the same folder" in verification.checks[0].finding
    )


def test_what_a_manifest_names_and_is_no_file_is_not_read(listed):
    folder = listed(["pipe", "folder", "zero\0byte", "l" * 300])
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    findings = {check.subject: check.finding for check in verify(folder).checks if not check.holds}
    assert findings["pipe"] == findings["folder"] == "is not a file"
    assert findings["zero\0byte"] == findings["l" * 300] == "is missing"


@pytest.mark.parametrize("name", ["patch.json", "portllm.json"])
def test_a_pipe_in_the_place_of_a_record_is_not_waited_for(name, small, tmp_path):
    folder = shutil.copytree(small, tmp_path / "patch")
    (folder / "patch.json").unlink()
    os.mkfifo(folder / name)
    with pytest.raises(PortLLMError):
        verify(folder)
    if name == "patch.json":
        with pytest.raises(PatchRecordError, match=r"patch\.json': cannot be read: is a pipe or a device"):
            load_patch(folder)


@pytest.mark.parametrize("number", ["1e999", "NaN", "-Infinity", "9" * 400])
def test_evidence_that_is_no_number_is_refused(number, small, tmp_path):
    folder = shutil.copytree(small, tmp_path / "patch")
    record = json.loads((folder / "patch.json").read_text())
    record["ports"][0]["evidence"] = {"sampled_drift": 12345}
    text = render_sealed(record).replace("12345", number)
    (folder / "patch.json").write_text(text)
    with pytest.raises(PatchRecordError, match="not valid JSON"):
        load_patch(folder)
    with pytest.raises(PatchRecordError, match="not valid JSON"):
        verify(folder)


@pytest.mark.parametrize("runtime", ["vllm", "openvino"])
def test_a_changed_byte_of_an_export_is_caught(written, tiny, tmp_path, runtime):
    out = tmp_path / "out"
    export(written / "patch", runtime=runtime, base=tiny("evolved"), out=out)
    assert verify(out, base=tiny("evolved")).verified
    assert not verify(out, base=tiny("base")).verified
    file = next(out.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert [check.subject for check in verify(out).checks if not check.holds] == [file.name]
