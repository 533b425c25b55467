"""What is handed to others: the source distribution, the wheels, and the words on how to install."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from portllm.installed import EXTRAS, how_to_get, needed, why_not

ROOT = Path(__file__).parents[1]
FOR_DEVELOPERS = {"dev", "docs"}
METADATA = re.compile(r"PKG-INFO|setup\.cfg|src/portllm\.egg-info/.*")


def tracked():
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("this is no clone: what belongs to the source is not known")
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what git tracks."""
    folder = tmp_path_factory.mktemp("source")
    for name in tracked():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def build(source, kind, out, **environment):
    """The file that setuptools builds of a source folder."""
    program = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=source, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_the_source_distribution_holds_the_whole_repository(source, tmp_path):
    with tarfile.open(build(source, "sdist", tmp_path, PORTLLM_PURE="1")) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert {name for name in names if not METADATA.fullmatch(name)} == {
        name for name in tracked() if (ROOT / name).is_file()
    }


@pytest.mark.slow
def test_a_wheel_without_the_loops_is_for_any_machine_and_holds_every_file_of_the_package(source, tmp_path):
    wheel = build(source, "wheel", tmp_path, PORTLLM_PURE="1")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    loops = {f"portllm/native/{name}" for name in ("kernels.c", "loops.h")}
    package = {name.removeprefix("src/") for name in tracked() if name.startswith("src/portllm/")}
    assert names == package - loops


def test_every_extra_for_users_says_what_it_is_for():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(EXTRAS) == set(declared) - FOR_DEVELOPERS


def test_what_an_extra_needs_includes_what_the_extras_in_it_need_and_nothing_else():
    names = {package.requirement.split(">")[0] for package in needed("eval")}
    assert names == {"datasets", "lm_eval", "peft", "transformers"}
    assert not {package.requirement for package in needed("live")} & {package.requirement for package in needed()}


def test_a_package_that_is_missing_or_too_old_does_not_suit(monkeypatch):
    from portllm import installed

    monkeypatch.setattr(installed, "requires", lambda _: ["numpy>=999", "no-such-package-at-all", "numpy>=1"])
    assert [(package.found is None, package.suits) for package in needed()] == [
        (False, False), (True, False), (False, True),
    ]  # fmt: skip


def test_a_package_in_another_version_is_not_called_missing(monkeypatch):
    from portllm import installed

    monkeypatch.setattr(installed, "requires", lambda _: ['numpy>=999; extra == "live"', 'no-such; extra == "live"'])
    numpy = installed.version("numpy")
    assert why_not(ImportError("cannot import name 'x'", name="numpy"), "live") == (
        f"needed: numpy>=999 ({numpy}), no-such (not installed). Run: pip install 'numpy>=999' no-such."
    )


def test_a_package_that_is_there_and_broken_keeps_its_own_words():
    said = why_not(ImportError("libcudart.so.13: cannot open shared object file", name="torch"), "ray")
    assert said.startswith("'torch': cannot be imported: libcudart.so.13: cannot open shared object file. Run:")


def test_the_gate_runs_every_python_that_is_promised():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    promised = re.findall(r"Python :: (3\.\d+)", " ".join(declared))
    tried = re.search(r"^ +python: \[(.*)\]$", (ROOT / ".github" / "workflows" / "gate.yml").read_text(), re.MULTILINE)
    assert tried
    assert re.findall(r"3\.\d+", tried[1]) == promised


def test_a_program_that_was_never_installed_names_its_source_folder(monkeypatch):
    from portllm import installed

    def unknown(_):
        raise installed.PackageNotFoundError

    monkeypatch.setattr(installed, "requires", unknown)
    assert how_to_get("live", "sign") == "Run, in the source folder of PortLLM: pip install -e '.[live,sign]'"


def test_nothing_says_that_an_index_has_this_package():
    by_name = re.compile(
        r"""(?:pip3?|pipx|uv pip|uv tool|uv) (?:install|run|add)(?: -\S+)* ['"]?portllm\b|uv[x] portllm\b"""
    )
    texts = [name for name in tracked() if Path(name).suffix in (".md", ".py", ".toml", ".yml", ".yaml", "")]
    assert len(texts) > 100
    said = {
        name: found
        for name in texts
        if (ROOT / name).is_file() and (found := by_name.findall((ROOT / name).read_text(encoding="utf-8")))
    }
    assert said == {}
