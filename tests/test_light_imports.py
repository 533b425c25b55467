"""What needs headers and bytes only answers at once: it loads no tensor library. Checked in a fresh interpreter."""

import subprocess
import sys

import pytest

from portllm.native import kernels

HEAVY = (
    "jaxtyping",
    "torch",
    "transformers",
    "peft",
    "scipy",
    "gguf",
    "accelerate",
    "huggingface_hub",
    "httpx2",
    "regex",
)

REPORT = f"""
import sys
print("loaded:", *(name for name in {HEAVY!r} if name in sys.modules))
"""


def heavy_modules_after(program, *, cwd=None):
    """Which of the heavy libraries are loaded when `program` has run in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", program + REPORT], capture_output=True, text=True, check=False, timeout=120, cwd=cwd
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.rpartition("loaded:")[2].split()


def command(*words):
    """A program that runs the command line with these words and goes on when it ends."""
    return f"""
import sys
from portllm.cli.main import main
sys.argv = ["portllm", *{words!r}]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""


LIGHT = (
    "portllm",
    "portllm.errors",
    "portllm.checkpoint.model.identity",
    "portllm.checkpoint.open",
    "portllm.checkpoint.safetensors.writer",
    "portllm.cli.main",
    "portllm.patch.adapter_folder",
    "portllm.capturing.adapter",
    "portllm.checking.check",
    "portllm.merging.merge",
    "portllm.merging.plan",
    "portllm.porting.port",
    "portllm.certifying.certify",
    "portllm.certifying.page",
    "portllm.checking.page",
    "portllm.combining.combine",
    "portllm.evaluating.evaluate",
    "portllm.evaluating.page",
    "portllm.exporting.export",
    "portllm.study.results.page",
    "portllm.training.train",
)
"""Modules that load nothing heavy; one after the other in one interpreter, so that the first that does is named."""


def test_light_modules_load_no_heavy_library():
    program = f"""
import importlib, sys
for module in {LIGHT!r}:
    importlib.import_module(module)
    loaded = [name for name in {HEAVY!r} if name in sys.modules]
    assert not loaded, (module, loaded)
"""
    assert heavy_modules_after(program) == []


def test_help_loads_no_heavy_library():
    assert heavy_modules_after(command("--help")) == []


def test_a_command_imports_no_other():
    imported = """
from portllm.cli.commands import COMMANDS
assert [name for name in COMMANDS if f"portllm.cli.{name}" in sys.modules] == ["port"]
"""
    assert heavy_modules_after(command("port", "--help") + imported) == []


def test_inspecting_a_checkpoint_loads_no_heavy_library(tiny):
    assert heavy_modules_after(command("inspect", str(tiny("base")))) == []


def test_inspecting_an_adapter_loads_no_heavy_library(tiny):
    assert heavy_modules_after(command("inspect", str(tiny("adapter")))) == []


def test_capture_and_port_load_no_heavy_library(tiny, tmp_path):
    base, evolved, adapter = str(tiny("base")), str(tiny("evolved")), str(tiny("adapter"))
    captured = command("capture", "--adapter", adapter, "--base", base, "-o", "patch")
    ported = command("port", "patch", "--evolved", evolved, "-o", "ported")
    assert heavy_modules_after(captured + ported, cwd=tmp_path) == []
    assert (tmp_path / "ported" / "patch.json").exists()


@pytest.mark.parametrize("extent", [(), ("--full", "--html", "page.html")])
def test_checking_loads_no_heavy_library(extent, tiny, tmp_path):
    models = ("--base", str(tiny("base")), "--evolved", str(tiny("evolved", drift=0.00003)))
    checked = command("check", str(tiny("adapter")), *models, *extent)
    without_models = "assert not [name for name in sys.modules if name.startswith('portllm.running')]"
    assert heavy_modules_after(checked + without_models, cwd=tmp_path) == []


@pytest.mark.skipif(kernels is None, reason="without the loops in C, torch merges")
def test_merging_a_plain_patch_loads_no_heavy_library(tiny, tmp_path):
    base = tiny("base", hidden=24, inner=40)
    patch = tiny("adapter", of=base, target_modules=["q_proj", "up_proj", "down_proj"])
    assert heavy_modules_after(command("merge", str(patch), "--into", str(base), "-o", "merged"), cwd=tmp_path) == []


def test_combining_exactly_loads_no_heavy_library(tiny, tmp_path):
    base, adapter = str(tiny("base")), str(tiny("adapter"))
    captured = command("capture", "--adapter", adapter, "--base", base, "-o", "patch")
    assert heavy_modules_after(captured + command("combine", "patch", "patch", "-o", "both"), cwd=tmp_path) == []


def test_the_doctor_asks_the_library_of_the_hub_and_loads_nothing_else_that_is_heavy():
    assert set(heavy_modules_after(command("doctor"))) <= {"huggingface_hub", "httpx2"}


def test_verifying_loads_no_heavy_library(tiny, tmp_path):
    base, adapter = str(tiny("base")), str(tiny("adapter"))
    captured = command("capture", "--adapter", adapter, "--base", base, "-o", "patch")
    verified = command("verify", "patch", "--base", base)
    assert heavy_modules_after(captured + verified, cwd=tmp_path) == []


ROWS = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n'


PATCHES = "--patch", "patch", "--ported", "patch"
WRONG = (
    (("train", "--data", "nothing.jsonl", "-o", "out"), "'nothing.jsonl': cannot be read"),
    (("train", "--data", "rows.jsonl", "--prompt", "{a}", "--completion", "b", "-o", "out"), "no field 'a'"),
    (("train", "--data", "rows.jsonl", "-o", "patch"), "already exists"),
    (("train", "--data", "rows.jsonl", "-o", "out", "--learning-rate", "-1"), "learning_rate is -1"),
    (("train", "--data", "rows.jsonl", "-o", "out"), "has no 'tokenizer.json'"),
    (("evaluate", "--patch", "patch", "--ported", "nothing", "--data", "rows.jsonl"), "'nothing'"),
    (("evaluate", *PATCHES, "--data", "nothing.jsonl"), "'nothing.jsonl': cannot be read"),
    (("evaluate", *PATCHES, "--data", "rows.jsonl"), "has no 'tokenizer.json'"),
    (("certify", *PATCHES, "--data", "nothing.jsonl", "-o", "out"), "'nothing.jsonl': cannot be read"),
    (("certify", *PATCHES, "--data", "rows.jsonl", "-o", "out"), "has no 'tokenizer.json'"),
    (("check", "patch", "--text", "nothing.jsonl"), "'nothing.jsonl': cannot be read"),
    (("check", "patch", "--text", "rows.jsonl"), "has no 'tokenizer.json'"),
    (("port", "patch", "--method", "align", "--text", "nothing.jsonl", "-o", "out"), "'nothing.jsonl': cannot be read"),
    (("combine", "patch", "nothing", "-o", "out"), "'nothing': no such folder"),
    (("combine", "patch", "patch", "-o", "out"), "has no patch.json"),
    (("merge", "nothing", "--into", "base", "-o", "out"), "'nothing': no such folder"),
    (("capture", "--tuned", "nothing", "-o", "out"), "'nothing': no such file or folder"),
    (("sign", "patch", "--key", "nothing.pem"), "'nothing.pem': no such file"),
    (("fleet", "nothing.toml"), "'nothing.toml': cannot be read"),
    (("study", "run", "nothing.toml"), "'nothing.toml': cannot be read"),
)
"""Commands with a wrong input each, and what they say of it."""

NO_BASE = ("combine", "merge", "sign", "fleet", "study")
WITH_EVOLVED = ("evaluate", "certify", "check", "port")


def test_what_is_wrong_with_an_input_is_said_before_a_heavy_library_is_loaded(tiny, tmp_path):
    (tmp_path / "rows.jsonl").write_text(ROWS)
    (tmp_path / "base").symlink_to(tiny("base"))
    (tmp_path / "patch").symlink_to(tiny("adapter"))
    program = f"""
import contextlib, io, sys
from portllm.cli.main import main
for words, said in {WRONG!r}:
    base = () if words[0] in {NO_BASE!r} else ("--base", "base")
    evolved = ("--evolved", "base") if words[0] in {WITH_EVOLVED!r} else ()
    sys.argv = ["portllm", *words, *base, *evolved]
    with contextlib.redirect_stderr(io.StringIO()) as told:
        try:
            main()
        except SystemExit as end:
            assert end.code == 1, end.code
    assert said in told.getvalue(), (words, told.getvalue())
"""
    assert heavy_modules_after(program, cwd=tmp_path) == []


def test_this_check_notices_a_heavy_import():
    assert heavy_modules_after("import portllm.patch.merge") == ["torch"]
