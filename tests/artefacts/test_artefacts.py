"""What earlier versions wrote is read, verified, gone on with and taken back; see README.md."""

import importlib.metadata
import json
import os
import shutil
from pathlib import Path

import pytest
from blake3 import blake3

from portllm.certifying.certificate import read_certificate, write_certificate
from portllm.checkpoint.open import open_checkpoint
from portllm.fleets.fleet import plan_fleet
from portllm.fleets.state import STATE_FILE, State
from portllm.merging.in_place import merge_in_place, undo_merge
from portllm.merging.merge import merge
from portllm.merging.options import MergeOptions
from portllm.patch.adapter_folder import load_patch, write_record
from portllm.porting.port import port
from portllm.study.run import study_results, study_status
from portllm.verifying.signature import PublicKey
from portllm.verifying.verify import verify
from tests.safetensors_files import contents

HERE = Path(__file__).parent
VERSIONS = sorted(entry.name for entry in HERE.iterdir() if (entry / "versions.json").exists())

WHERE = {"patch": "base", "patch-rows": "base", "ported-twice": "later", "signed": "evolved"}
"""The models of patches; all others are of `evolved`."""
LONG_AGO = 1_000_000_000
"""As `make.py` has it."""


@pytest.fixture(params=VERSIONS)
def old(request, tmp_path, monkeypatch):
    """A copy of a version's files, and the current folder; the programs are those that wrote them."""
    folder = shutil.copytree(HERE / request.param, tmp_path / "old")
    versions = json.loads((folder / "versions.json").read_text())
    now = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: versions.get(name) or now(name))
    monkeypatch.chdir(folder)
    return folder


def written(folder):
    """Every file but model cards, which the first version did not write."""
    return {name: data for name, data in contents(folder).items() if Path(name).name != "README.md"}


def weights(folder):
    return {name: data for name, data in contents(folder).items() if name.endswith(".safetensors") and "/" not in name}


def wrong(verification):
    return [(check.subject, check.finding) for check in verification.checks if not check.holds]


@pytest.mark.parametrize(
    "name", ["patch", "patch-rows", "ported", "ported-rows", "ported-auto", "ported-twice", "signed"]
)
def test_a_patch_verifies_and_its_record_is_written_as_it_was(name, old):
    trust = PublicKey(Path("key.pem")) if name == "signed" else None
    found = verify(Path(name), base=open_checkpoint(f"models/{WHERE.get(name, 'evolved')}"), trust=trust)
    assert (found.verified, wrong(found)) == (True, [])
    before = Path(name, "patch.json").read_bytes()
    write_record(Path(name), load_patch(Path(name)).record)
    assert Path(name, "patch.json").read_bytes() == before


def test_a_port_of_an_old_patch_is_the_old_port(old):
    port(load_patch(Path("ported")), evolved=open_checkpoint("models/later"), out=Path("again"))
    assert written(old / "again") == written(old / "ported-twice")


@pytest.mark.parametrize("name", ["merged", "in-place"])
def test_a_merged_model_verifies(name, old):
    found = verify(Path(name), base=open_checkpoint("models/evolved"))
    assert (found.verified, wrong(found)) == (True, [])


def test_a_merge_again_gives_the_old_manifest(old):
    merge(
        load_patch(Path("ported")),
        into=open_checkpoint("models/evolved"),
        out=Path("again/merged"),
        options=MergeOptions(shard_bytes=100),
    )
    assert written(old / "again" / "merged") == written(old / "merged")


def describe_part(journal, part):
    """Rewrites the first line of a journal for a part that was copied, and so has another inode."""
    first, *others = journal.read_text().splitlines(keepends=True)
    text = json.dumps({**json.loads(first.partition(" ")[2]), "folder": part.stat().st_ino})
    journal.write_text("".join([f"{blake3(text.encode()).hexdigest(8)} {text}\n", *others]))


def test_a_merge_that_died_is_gone_on_with_from_its_journal(old):
    for file in Path("models/evolved").glob("*.safetensors"):
        os.utime(file, (LONG_AGO, LONG_AGO))  # as it was when the run died
    describe_part(Path("killed/.merged.journal"), Path("killed/.merged.part"))
    first = "model-00001-of-00002.safetensors"
    os.utime(Path("killed/.merged.part", first), (LONG_AGO, LONG_AGO))
    into = open_checkpoint("models/evolved")
    merge(load_patch(Path("ported")), into=into, out=Path("killed/merged"), options=MergeOptions(shard_bytes=100))
    assert written(old / "killed") == {f"merged/{name}": data for name, data in written(old / "merged").items()}
    assert Path("killed/merged", first).stat().st_mtime == LONG_AGO  # it was kept, not written again


@pytest.mark.parametrize("name", ["in-place", "in-place-killed"])
def test_a_merge_in_place_is_taken_back(name, old):
    undo_merge(Path(name))
    assert {key: data for key, data in contents(old / name).items() if "journal" not in key} == contents(
        old / "models" / "evolved"
    )


def test_a_merge_in_place_that_died_is_finished_from_the_bytes_that_it_kept(old):
    merge_in_place(load_patch(Path("ported")), Path("in-place-killed"))
    assert weights(Path("in-place-killed")) == weights(Path("in-place"))
    assert verify(Path("in-place-killed")).verified


def test_of_a_finished_fleet_nothing_is_missing_and_its_state_is_written_as_it_was(old):
    plan = plan_fleet(Path("fleet/fleet.toml"))
    assert plan.todo == ("keep", "keep")
    before = Path("fleet/out", STATE_FILE).read_bytes()
    State(plan.work.output, plan.rows.values())
    assert Path("fleet/out", STATE_FILE).read_bytes() == before


@pytest.mark.parametrize("name", ["certificate", "certificate-free"])
def test_a_certificate_is_read_verified_and_written_as_it_was(name, old):
    certificate = read_certificate(Path(name))
    assert (certificate.bound is None) == (name == "certificate-free")
    assert verify(Path(name)).verified
    before = Path(name, "certificate.json").read_bytes()
    write_certificate(Path(name), certificate)
    assert Path(name, "certificate.json").read_bytes() == before


def _told_then(now, then):
    """What is told now, without what was not told then."""
    if isinstance(then, dict):
        return {key: _told_then(now[key], value) for key, value in then.items()}
    if isinstance(then, list) and then and isinstance(then[0], dict):
        return [_told_then(*pair) for pair in zip(now, then, strict=True)]
    return now


def test_a_finished_study_is_done_and_its_table_is_the_old_one(old):
    file, out = Path("study/small.toml"), Path("study/out")
    file.write_text('dtype = "auto"\n' + file.read_text())  # as it was scored
    status = study_status(file, out=out)
    assert (status.left.steps, status.n_steps) == ((), len(list((out / "steps").iterdir())))
    text = (out / "results.json").read_text().replace("not told apart from nothing", "indistinguishable from zero")
    then, now = json.loads(text), study_results(file, out=out).to_json()
    assert _told_then(now, then) == then
