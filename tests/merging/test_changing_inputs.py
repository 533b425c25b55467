"""What is read changes meanwhile: no output takes its name, and no report is made, of what may be a mixture."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from portllm.capturing.adapter import capture_adapter
from portllm.capturing.tuned import capture_tuned
from portllm.certifying import agreement, certify
from portllm.checking import check
from portllm.checking.check import check_weights as check_patch
from portllm.checkpoint.model.identity import digest
from portllm.checkpoint.open import open_checkpoint
from portllm.combining.combine import combine
from portllm.errors import InputChangedError
from portllm.evaluating import compare, evaluate
from portllm.files import output_folder
from portllm.files.input_file import require_unchanged
from portllm.merging import in_place
from portllm.merging.in_place import merge_in_place, undo_merge
from portllm.merging.merge import merge
from portllm.merging.options import MergeOptions
from portllm.patch.adapter_folder import load_patch
from portllm.porting.port import port
from tests.safetensors_files import contents


@dataclass(frozen=True)
class Room:
    """Copies of a base, an evolved model in shards, an adapter and a patch, to be changed."""

    base: Path
    evolved: Path
    adapter: Path
    patch: Path


@pytest.fixture
def room(tiny, written, tmp_path):
    places = {"base": tiny("base"), "evolved": tiny("evolved", max_shard_size="3KB"), "adapter": tiny("adapter"),
              "patch": written / "first"}  # fmt: skip
    return Room(**{name: shutil.copytree(source, tmp_path / "in" / name) for name, source in places.items()})


def touch(file):
    facts = file.stat()
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1_000_000_000))


def flip(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    touch(file)


def cut(file):
    os.truncate(file, file.stat().st_size - 1)


def grow(file):
    with open(file, "ab") as stream:
        stream.write(b" ")


def replace(file):
    part = file.with_name("part")
    shutil.copy2(file, part)
    os.replace(part, file)


def remove(file):
    file.unlink()


CHANGES = (touch, flip, cut, grow, replace, remove)

MODEL = ("config.json", "model.safetensors")
SHARDED = ("config.json", "model.safetensors.index.json", "model-00001-of-00003.safetensors")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
PATCH = (*ADAPTER, "patch.json")

WRITERS = {
    "capture of an adapter": (
        lambda room, out: capture_adapter(load_patch(room.adapter), base=open_checkpoint(room.base), out=out),
        {"base": MODEL, "adapter": ADAPTER},
    ),
    "capture of a tuned model": (
        lambda room, out: capture_tuned(open_checkpoint(room.base), open_checkpoint(room.evolved), out=out, rank=2),
        {"base": MODEL, "evolved": SHARDED},
    ),
    "port": (
        lambda room, out: port(load_patch(room.patch), evolved=open_checkpoint(room.evolved), out=out),
        {"patch": PATCH, "evolved": SHARDED},
    ),
    "combine": (
        lambda room, out: combine([load_patch(room.patch)] * 2, out=out),
        {"patch": PATCH},
    ),
    "merge": (
        lambda room, out: merge(room.patch, into=room.base, out=out, options=MergeOptions(shard_bytes=3000)),
        {"patch": PATCH, "base": MODEL},
    ),
}  # fmt: skip
INPUTS = [(command, place, file) for command, (_, reads) in WRITERS.items() for place in reads for file in reads[place]]


@pytest.fixture
def when(monkeypatch):
    """Have something done once, when writing begins or when all is written and about to take its name."""

    def arrange(moment, change):
        done = []

        def changed(real):
            def call(*arguments, **options):
                if not done:
                    done.append(change())
                return real(*arguments, **options)

            return call

        name = {"begun": "begin", "written": "require_unchanged"}[moment]
        monkeypatch.setattr(output_folder, name, changed(getattr(output_folder, name)))

    return arrange


@pytest.mark.parametrize("moment", ["begun", "written"])
@pytest.mark.parametrize(("command", "place", "file"), INPUTS, ids=["-".join(names) for names in INPUTS])
def test_an_output_of_inputs_that_changed_gets_no_name(command, place, file, moment, room, when, tmp_path):
    run, _ = WRITERS[command]
    out = tmp_path / "out"
    when(moment, lambda: touch(getattr(room, place) / file))
    with pytest.raises(InputChangedError, match=f"{place}/{file}': changed while it was being read"):
        run(room, out)
    assert sorted(os.listdir(tmp_path)) == ["in"]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_any_change_is_seen(change, room, when, tmp_path):
    when("written", lambda: change(room.base / "model.safetensors"))
    with pytest.raises(InputChangedError, match=r"base/model\.safetensors"):
        WRITERS["merge"][0](room, tmp_path / "out")


def test_what_stays_as_it_is_may_be_read_by_others_meanwhile(room, when, tmp_path):
    when("written", lambda: (room.base / "model.safetensors").read_bytes())
    WRITERS["merge"][0](room, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_a_change_before_reading_is_seen_at_once(room):
    opened = open_checkpoint(room.base)
    flip(room.base / "model.safetensors")
    with pytest.raises(InputChangedError):
        digest(opened)
    assert digest(open_checkpoint(room.base)).startswith("blake3:")


def test_the_digests_of_a_file_that_changed_while_they_were_taken_are_not_kept(room, monkeypatch):
    from portllm.checkpoint.model import identity

    opened, take, kept = open_checkpoint(room.base), identity.digest_tensor, []

    def changed(info):
        found = take(info)
        touch(info.file.path)
        return found

    monkeypatch.setattr(identity, "remember", lambda *what: kept.append(what))
    monkeypatch.setattr(identity, "digest_tensor", changed)
    with pytest.raises(InputChangedError):
        digest(opened)
    assert kept == []


@pytest.mark.parametrize("place", ["patch/adapter_model.safetensors", "base/model.safetensors"])
def test_a_merge_in_place_of_inputs_that_changed_before_it_began_changes_nothing(place, room, tmp_path, monkeypatch):
    patch, planned = load_patch(room.patch), in_place.plan_in_place

    def changed(*arguments, **options):
        plan = planned(*arguments, **options)
        touch(tmp_path / "in" / place)
        return plan

    before = contents(room.base)
    monkeypatch.setattr(in_place, "plan_in_place", changed)
    with pytest.raises(InputChangedError):
        merge_in_place(patch, room.base)
    assert contents(room.base) == before


def test_a_merge_in_place_of_a_patch_that_changed_meanwhile_is_taken_back(room, monkeypatch):
    patch, overwrite, before = load_patch(room.patch), in_place._overwrite, contents(room.base)

    def changed(*arguments):
        found = overwrite(*arguments)
        touch(room.patch / "adapter_model.safetensors")
        return found

    monkeypatch.setattr(in_place, "_overwrite", changed)
    with pytest.raises(InputChangedError):
        merge_in_place(patch, room.base)
    assert contents(room.base) == before


def test_a_model_that_somebody_puts_in_the_place_of_one_that_is_merged_into_is_left_alone(room, monkeypatch):
    patch, overwrite, file = load_patch(room.patch), in_place._overwrite, room.base / "model.safetensors"
    whole = file.read_bytes()

    def changed(*arguments):
        found = overwrite(*arguments)
        part = file.with_name("part")
        part.write_bytes(whole)
        os.replace(part, file)
        return found

    monkeypatch.setattr(in_place, "_overwrite", changed)
    with pytest.raises(InputChangedError, match="was replaced, truncated or removed"):
        merge_in_place(patch, room.base)
    assert file.read_bytes() == whole
    monkeypatch.undo()
    assert undo_merge(room.base) > 0
    assert file.read_bytes() == whole


def test_a_check_of_what_changed_is_no_report(room, monkeypatch):
    base, evolved, patch = open_checkpoint(room.base), open_checkpoint(room.evolved), load_patch(room.patch)
    assert check_patch(patch, base=base, evolved=evolved).patches
    measured = check.measure_update

    def changed(*arguments, **options):
        found = measured(*arguments, **options)
        touch(room.base / "model.safetensors")
        return found

    monkeypatch.setattr(check, "measure_update", changed)
    with pytest.raises(InputChangedError, match=r"base/model\.safetensors"):
        check_patch(patch, base=base, evolved=evolved)


def test_an_evaluation_of_what_changed_is_no_report(room, monkeypatch):
    base, patch = open_checkpoint(room.base), load_patch(room.patch)
    rows = SimpleNamespace(kind="labels", labels=("a",), n_rows=1, examples=(), longest=1, score=len)
    monkeypatch.setattr(evaluate, "plan_evaluation", lambda **_: None)
    monkeypatch.setattr(compare, "compare", lambda *_, **__: touch(room.base / "config.json"))
    with pytest.raises(InputChangedError, match=r"base/config\.json"):
        evaluate.evaluate(rows, base=base, patch=patch, evolved=base, ported=patch)


def test_a_certificate_of_what_changed_gets_no_name(room, monkeypatch, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"q": "a", "a": "b"}\n{"q": "c", "a": "d"}\n')
    (room.base / "tokenizer.json").write_text("{}")
    patch, base = load_patch(room.patch), open_checkpoint(room.base)
    settings = certify.CertifySettings(prompt="{q}", completion="a")
    data = certify.read_inputs(rows, patch, settings)
    plan = certify.plan_certify(patch, base=base, data=data, evolved=base, ported=patch, settings=settings)
    monkeypatch.setattr(agreement, "compare_answers", lambda *_, **__: touch(room.patch / "patch.json"))
    monkeypatch.setattr(certify, "conclude", lambda *_, **__: None)
    monkeypatch.setattr(certify, "write_certificate", lambda *_: None)
    with pytest.raises(InputChangedError, match=r"patch/patch\.json"):
        certify.run_certify(plan, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["in", "rows.jsonl"]


def test_data_that_changes_between_its_rows_and_its_digest_is_refused(tmp_path):
    from portllm.running.examples import read_texts
    from portllm.running.rows import read_with_digest

    file = tmp_path / "rows.jsonl"
    file.write_text('{"q": "a"}\n')

    def read():
        rows = read_texts(file, "{q}")
        touch(file)
        return rows

    with pytest.raises(InputChangedError, match=r"rows\.jsonl"):
        read_with_digest(file, read)


def test_files_without_a_state_are_the_programs_own(tmp_path):
    from portllm.files.source import LocalFile

    require_unchanged([LocalFile(tmp_path / "not there")])
