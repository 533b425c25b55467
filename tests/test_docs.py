"""The pages say what the code says."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import portllm
from portllm import errors

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def read(path):
    return (ROOT / path).read_text(encoding="utf-8")


def error_classes():
    return {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.PortLLMError) and value is not errors.PortLLMError
    }


def shell_commands(text):
    """The lines of a page's verbatim blocks that call the program, without their comments."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    shell = (block for kind, block in blocks if kind in ("", "sh", "bash"))
    lines = (line.split(" #")[0].strip() for block in shell for line in block.replace("\\\n", " ").splitlines())
    return [line for line in lines if line.startswith("portllm ")]


def python_in(text):
    """The Python on a page, one block after the other."""
    return "".join(re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL))


def options_of_commands():
    """The options of every command, from the generated reference."""
    sections = re.split(r"^## portllm ", read("docs/commands.md"), flags=re.MULTILINE)[1:]
    return {section.split()[0]: set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", section)) for section in sections}


def test_the_errors_page_explains_every_error_and_no_other():
    explained = set(re.findall(r"^#{2,3} (\w+)$", read("docs/errors.md"), flags=re.MULTILINE))
    assert explained == error_classes()


def test_the_tree_in_the_docstring_of_errors_names_every_error():
    assert error_classes() <= set(re.findall(r"^ +(\w+Error)\b", errors.__doc__, flags=re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_on_a_page_exists_with_its_options(page):
    known = options_of_commands()
    for line in shell_commands(page.read_text(encoding="utf-8")):
        name, *words = line.split()[1:]
        assert name in known, line
        assert {word for word in words if word.startswith("-")} <= known[name], line


def test_the_readme_shows_commands():
    assert len(shell_commands(read("README.md"))) > 3


def write_rows(folder):
    """The data files that the pages name."""
    for name, kinds in (("train", ("cause", "treatment")), ("test", ("treatment", "cause"))):
        rows = [json.dumps({"question": f"measles {kind}?", "type": kind}) for kind in kinds]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    prompts = [json.dumps({"question": f"measles {number}?"}) for number in range(24)]
    (folder / "prompts.jsonl").write_text("\n".join(prompts))


MAY_BE_NO = ("--max-loss", "--method align")
"""Commands with these say yes or no by a limit, and no is status 3."""


def run_page(page, portllm, made):
    for line in shell_commands(read(page)):
        done = portllm(*shlex.split(line)[1:])
        may_be_no = any(option in line for option in MAY_BE_NO)
        assert done.status in ((0, 3) if may_be_no else (0,)), f"{line}\n{done.err}"
    assert any(Path(made).glob("*.safetensors"))


@pytest.mark.parametrize(("page", "made"), [("README.md", "my-model-v2"), ("docs/data.md", "my-patch")])
def test_the_commands_of_a_page_run_in_the_order_they_stand_in(portllm, tmp_path, monkeypatch, page, made):
    from tests import language, models

    monkeypatch.chdir(tmp_path)
    base = language.make_reader(tmp_path / "base-v1")
    models.make_evolved(base, tmp_path / "base-v2", drift=0.00003)  # so little that `check` says it holds
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, tmp_path / "base-v2")
    models.make_adapter(base, tmp_path / "my-adapter")
    write_rows(tmp_path)
    run_page(page, portllm, made)


@pytest.mark.slow
def test_the_commands_of_the_readme_run_on_the_built_in_model(portllm, tmp_path, monkeypatch):
    from tests import models

    monkeypatch.chdir(tmp_path)
    assert portllm("inspect", "builtin:smollm2-135m", "--export", "base-v1").status == 0
    models.make_evolved(tmp_path / "base-v1", tmp_path / "base-v2", drift=0.00003)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "base-v1" / name, tmp_path / "base-v2")
    models.make_adapter(tmp_path / "base-v1", tmp_path / "my-adapter")
    write_rows(tmp_path)
    run_page("README.md", portllm, "my-model-v2")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def pages_of_the_site():
    """The pages in the navigation of mkdocs.yml."""
    return re.findall(r"^ +- .*: (\S+\.md)$", read("mkdocs.yml"), flags=re.MULTILINE)


def test_every_page_is_in_the_navigation_of_the_site_once_and_no_other():
    shown = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "studies").rglob("*.md")]
    shown += [ROOT / "bench" / "README.md", *(ROOT / "bench" / "results").glob("*.md")]
    assert sorted(pages_of_the_site()) == sorted(str(page.relative_to(ROOT)) for page in shown)


def test_every_how_to_is_linked_from_the_readme():
    linked = set(re.findall(r"\((docs/how-to/[\w-]+\.md)\)", read("README.md")))
    assert linked == {page for page in pages_of_the_site() if page.startswith("docs/how-to/")}


def test_the_generated_pages_are_up_to_date():
    done = subprocess.run(
        [sys.executable, "-m", "scripts.gen_docs", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_every_port_method_has_a_page():
    from portllm.methods.table import METHODS

    assert sorted(METHODS) == sorted(page.stem for page in (ROOT / "docs" / "methods").glob("*.md"))


def test_the_newest_entry_of_the_changelog_is_the_version_of_the_package():
    newest = re.search(r"^## \[([^\]]+)\]", read("CHANGELOG.md"), flags=re.MULTILINE)
    declared = tomllib.loads(read("pyproject.toml"))["project"]["version"]
    assert newest
    assert newest[1] == declared == portllm.__version__


def test_constraints_pin_every_package_to_one_version():
    lines = [line for line in read("constraints.txt").splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9.-]+==[0-9][\w.]*", line)] == []
    assert lines == sorted(lines)
    assert "torch==2.13.0" in lines
