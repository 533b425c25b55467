"""A folder from a stranger, with links where this program writes: nothing of the user's is written or removed."""

import json
import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from portllm.checkpoint.open import open_checkpoint
from portllm.errors import CheckpointError, OutputError, PlanRefusedError, PortLLMError
from portllm.files.seal import render_sealed
from portllm.merging import tensor as make_tensor
from portllm.merging.in_place import merge_in_place, undo_merge
from portllm.merging.merge import merge
from portllm.merging.options import MergeOptions
from portllm.patch.adapter_folder import load_patch
from portllm.porting.port import port
from tests.processes import die, in_child
from tests.safetensors_files import contents

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

MARK = "portllm-unfinished.json"


@pytest.fixture
def home(tmp_path):
    """What is the user's: a text, and a model."""
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / ".bashrc").write_text("# mine\n")
    return folder


@pytest.fixture
def patch(tiny):
    return load_patch(tiny("adapter"))


@pytest.fixture(scope="module")
def merged(tiny, tmp_path_factory):
    """A model with a merge in place that can be taken back, or must be finished."""
    folder = shutil.copytree(tiny("base", max_shard_size="3KB"), tmp_path_factory.mktemp("merged") / "model")
    merge_in_place(load_patch(tiny("adapter")), folder)
    (folder / MARK).write_text('{"unfinished": "undo"}\n')
    return folder


@pytest.fixture
def evil(merged, home, tmp_path):
    """Such a model; the user has the same."""
    shutil.copytree(merged, home / "model")
    return shutil.copytree(merged, tmp_path / "evil")


def link(name, target):
    shutil.rmtree(name) if name.is_dir() and not name.is_symlink() else name.unlink(missing_ok=True)
    name.symlink_to(target)


def second_name(name, target):
    name.unlink(missing_ok=True)
    name.hardlink_to(target)


def say(evil, **said):
    note = evil / ".portllm-undo" / "undo.json"
    note.write_text(render_sealed({**json.loads(note.read_text()), **said}))


def folder_of_links(name, home):
    name.mkdir()
    for inner, target in (("undo.json", home / ".bashrc"), ("model.safetensors", home / "model" / "config.json")):
        (name / inner).symlink_to(target)
    return name


def folder_with_more(name, home):
    (folder_of_links(name, home) / "more").symlink_to(home)


def first_shard(folder):
    return sorted(folder.glob("*.safetensors"))[0]


PLANTS = {
    "the manifest is a link": lambda evil, home: link(evil / "portllm.json", home / ".bashrc"),
    "the manifest is a second name": lambda evil, home: second_name(evil / "portllm.json", home / ".bashrc"),
    "the manifest is to be a text": lambda evil, home: say(evil, manifest="echo owned\n"),
    "the manifest is to be JSON": lambda evil, home: say(evil, manifest='{"a": 1}'),
    "the manifest's part is a link": lambda evil, home: link(evil / ".portllm.json.part", home / ".bashrc"),
    "the mark is a link": lambda evil, home: link(evil / MARK, home / ".bashrc"),
    "the mark's part is a link": lambda evil, home: link(evil / f".{MARK}.part", home / ".bashrc"),
    "the mark's part is a link, as it was": lambda evil, home: link(evil / f"{MARK}.part", home / ".bashrc"),
    "the mark's part is a second name": lambda evil, home: second_name(evil / f".{MARK}.part", home / ".bashrc"),
    "a shard is a link": lambda evil, home: link(first_shard(evil), first_shard(home / "model")),
    "a shard is a second name": lambda evil, home: second_name(first_shard(evil), first_shard(home / "model")),
    "the old bytes are a link": lambda evil, home: link(evil / ".portllm-undo", home / "model" / ".portllm-undo"),
    "the old weights are a link": lambda evil, home: link(
        evil / ".portllm-undo" / "model.safetensors", home / "model" / ".portllm-undo" / "model.safetensors"
    ),
    "what is given up is a link": lambda evil, home: link(evil / ".portllm-undo.gone", home / "model"),
    "what is given up is links": lambda evil, home: folder_of_links(evil / ".portllm-undo.gone", home),
    "what is given up is more": lambda evil, home: folder_with_more(evil / ".portllm-undo.gone", home),
    "the part is a link": lambda evil, home: link(evil / "..portllm-undo.part", home / "model"),
    "the journal is a link": lambda evil, home: link(evil / "..portllm-undo.journal", home / ".bashrc"),
    "the journal is a second name": lambda evil, home: second_name(evil / "..portllm-undo.journal", home / ".bashrc"),
    "the old output is a link": lambda evil, home: link(evil / "..portllm-undo.old", home / "model"),
}


@pytest.mark.parametrize("begun", ["to be finished", "to be taken back", "anew"])
@pytest.mark.parametrize("plant", PLANTS)
def test_nothing_that_is_the_users_is_touched_by_undo_or_by_a_merge_in_place(plant, begun, evil, home, patch):
    PLANTS[plant](evil, home)
    if begun != "to be finished":
        (evil / MARK).unlink()
    if begun == "anew":
        link(evil / ".portllm-undo", "nothing")
        (evil / ".portllm-undo").unlink()
    before = contents(home)
    for work in (lambda: merge_in_place(patch, evil), lambda: undo_merge(evil), lambda: undo_merge(evil)):
        with suppress(PortLLMError):
            work()
        assert contents(home) == before


def test_a_manifest_is_put_back_in_place_of_a_link_and_not_through_it(evil, home):
    link(evil / "portllm.json", home / ".bashrc")
    undo_merge(evil)
    assert not os.path.lexists(evil / "portllm.json")
    assert (home / ".bashrc").read_text() == "# mine\n"


def test_a_text_that_is_no_manifest_is_not_put_back(evil):
    say(evil, manifest="echo owned\n")
    before = contents(evil)
    with pytest.raises(CheckpointError, match="contains a file that no in-place merge writes"):
        undo_merge(evil)
    assert contents(evil) == before


def test_a_folder_whose_manifest_could_not_be_put_back_is_not_merged_into(tiny, patch, tmp_path):
    model = shutil.copytree(tiny("base"), tmp_path / "model")
    (model / "portllm.json").write_text("{}")
    with pytest.raises(PlanRefusedError, match="is not a merge manifest and could not be restored"):
        merge_in_place(patch, model)


@pytest.mark.parametrize("change", ["another tensor", "a different shape"])
def test_old_bytes_of_another_model_are_not_written(change, evil, tiny, tmp_path):
    kept = evil / ".portllm-undo" / "model.safetensors"
    data = kept.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    name = next(name for name in header if name != "__metadata__")
    if change == "another tensor":
        header = {("stranger" if key == name else key): value for key, value in header.items()}
        digests = json.loads((evil / ".portllm-undo" / "undo.json").read_text())["digests"]
        say(evil, digests={("stranger" if key == name else key): value for key, value in digests.items()})
    else:
        header[name]["shape"] = [1, *header[name]["shape"]]
    text = json.dumps(header).encode()
    kept.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    before = contents(evil)
    with pytest.raises(CheckpointError, match="does not belong to the model that '.portllm-undo' was saved for"):
        undo_merge(evil)
    assert contents(evil) == before


def test_the_mark_is_told_as_what_it_is_and_no_command_is_given(evil):
    with pytest.raises(CheckpointError, match="from someone else") as error:
        open_checkpoint(evil)
    assert "portllm merge" not in str(error.value)


def test_what_a_killed_undo_leaves_is_removed_by_the_next_even_where_nothing_is_left_to_undo(evil, tiny):
    undo_merge(evil)
    clean = contents(evil)
    gone = evil / ".portllm-undo.gone"
    gone.mkdir()
    (gone / "model.safetensors").write_bytes(b"old")
    (evil / f".{MARK}.part").write_text("{")
    with pytest.raises(OutputError, match="there is no in-place merge to undo"):
        undo_merge(evil)
    assert contents(evil) == clean
    assert not gone.exists()


# ---- beside an output


def killed_merge(patch, into, out):
    """A merge that dies with half of its files finished."""

    def run():
        make_tensor.default_threads = lambda: 1
        told = []

        def progress(*now):
            told.append(now)
            if now[1] > now[2] / 2:
                die()

        merge(patch, into=into, out=out, options=MergeOptions(shard_bytes=3000), progress=progress)

    assert in_child(run) == -signal.SIGKILL
    assert len(list(out.with_name(f".{out.name}.part").glob("*.safetensors"))) > 1


BESIDE = {
    "the part is a link": lambda out, home: link(out / ".out.part", home / "model"),
    "the part is a file": lambda out, home: (shutil.rmtree(out / ".out.part"), (out / ".out.part").write_text("x")),
    "the part's shards are links": lambda out, home: [
        link(file, first_shard(home / "model")) for file in (out / ".out.part").glob("*.safetensors")
    ],
    "the part's shards are second names": lambda out, home: [
        second_name(file, first_shard(home / "model")) for file in (out / ".out.part").glob("*.safetensors")
    ],
    "the part holds more links": lambda out, home: [
        (out / ".out.part" / name).symlink_to(home / ".bashrc")
        for name in ("portllm.json", "config.json", "model.safetensors.index.json", "tokenizer.json", "other")
        if not os.path.lexists(out / ".out.part" / name)
    ],
    "the journal is a link": lambda out, home: link(out / ".out.journal", home / ".bashrc"),
    "the journal is a second name": lambda out, home: second_name(out / ".out.journal", home / ".bashrc"),
    "the journal is a pipe": lambda out, home: ((out / ".out.journal").unlink(), os.mkfifo(out / ".out.journal")),
    "the old output is a link": lambda out, home: link(out / ".out.old", home / "model"),
}


@pytest.mark.parametrize("plant", BESIDE)
def test_what_is_planted_beside_an_output_leads_nowhere(plant, tiny, patch, home, tmp_path):
    shutil.copytree(tiny("base", max_shard_size="3KB"), home / "model")
    into, folder = open_checkpoint(tiny("base")), tmp_path / "shared"
    folder.mkdir()
    killed_merge(patch, into, folder / "out")
    expected = contents(merge_elsewhere(patch, into, tmp_path / "expected" / "out"))
    BESIDE[plant](folder, home)
    before = contents(home)
    if plant in ("the part's shards are links", "the part's shards are second names", "the part holds more links"):
        merge(patch, into=into, out=folder / "out", options=MergeOptions(shard_bytes=3000))
        assert contents(folder / "out") == expected
        assert not any(file.is_symlink() or file.stat().st_nlink > 1 for file in (folder / "out").iterdir())
    else:
        with pytest.raises(OutputError, match=r"\.out\.(part|journal|old)"):
            merge(patch, into=into, out=folder / "out", options=MergeOptions(shard_bytes=3000))
        assert not os.path.lexists(folder / "out")
    assert contents(home) == before


def merge_elsewhere(patch, into, out):
    merge(patch, into=into, out=out, options=MergeOptions(shard_bytes=3000))
    return out


# ---- what --overwrite may replace


@pytest.mark.parametrize("spelling", ["/", ".", "..", "{here}", "{parent}", "{alias}", "notes", "repository", "a file"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_output_is_never_replaced(spelling, overwrite, tiny, patch, tmp_path, monkeypatch):
    here = tmp_path / "work" / "here"
    for folder in (here / "notes", here / "repository" / ".git"):
        folder.mkdir(parents=True)
    (here / "notes" / "thesis.txt").write_text("mine")
    (here / "repository" / "config.json").write_text("{}")
    (here / "a file").write_text("mine")
    (tmp_path / "alias").symlink_to("work")
    monkeypatch.chdir(here)
    out = spelling.format(here=here, parent=here.parent, alias=tmp_path / "alias")
    into, evolved = open_checkpoint(tiny("base")), open_checkpoint(tiny("evolved"))
    before = contents(tmp_path), sorted(os.listdir(tmp_path)), sorted(os.listdir(here))
    with pytest.raises(OutputError):
        merge(patch, into=into, out=Path(out), overwrite=overwrite)
    with pytest.raises(OutputError):
        port(patch, base=into, evolved=evolved, out=Path(out), overwrite=overwrite)
    assert (contents(tmp_path), sorted(os.listdir(tmp_path)), sorted(os.listdir(here))) == before


def test_an_output_is_written_through_the_users_own_links_above_it(tiny, patch, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "models").symlink_to("disk")
    into, evolved = open_checkpoint(tiny("base")), open_checkpoint(tiny("evolved"))
    for overwrite in (False, True):
        port(patch, base=into, evolved=evolved, out=tmp_path / "models" / "out", overwrite=overwrite)
    assert sorted(os.listdir(tmp_path / "disk")) == ["out"]
    assert (tmp_path / "models").is_symlink()


def test_a_parent_that_is_a_link_to_nothing_is_told(tiny, patch, tmp_path):
    (tmp_path / "models").symlink_to("nothing")
    into, evolved = open_checkpoint(tiny("base")), open_checkpoint(tiny("evolved"))
    with pytest.raises(OutputError, match="cannot write into"):
        port(patch, base=into, evolved=evolved, out=tmp_path / "models" / "out")
    assert os.listdir(tmp_path) == ["models"]
