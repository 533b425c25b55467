"""What `import portllm` offers is what its stub imports, for a type checker and for the program alike."""

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from importlib.metadata import version
from inspect import getdoc, isclass, isfunction, signature
from pathlib import Path

import pytest

import portllm
from portllm.cli.commands import COMMANDS

STUB = ast.parse(Path(portllm.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
HOMES = {
    alias.asname: f"portllm.{node.module}"
    for node in STUB.body
    if isinstance(node, ast.ImportFrom) and node.module
    for alias in node.names
}
"""What a type checker knows: only a name that is imported under a name, its own, is public in a stub."""


def test_what_a_type_checker_knows_is_what_is_listed_and_no_name_is_given_twice():
    named = [alias.asname for node in STUB.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(named) == sorted(portllm.__all__) == sorted(dir(portllm))


def test_every_public_name_is_where_the_stub_says():
    homes = {name: importlib.import_module(home) for name, home in HOMES.items()}
    assert [name for name, home in homes.items() if getattr(portllm, name) is not getattr(home, name)] == []


def test_no_public_name_is_that_of_a_subpackage():
    # Importing a submodule sets it as an attribute of the package, in the place of a function of the same name.
    assert set(HOMES) & {module.name for module in pkgutil.iter_modules(portllm.__path__)} == set()


def test_every_public_function_and_class_has_a_docstring_of_its_own():
    offered = {name: getattr(portllm, name) for name in HOMES}
    assert [name for name, value in offered.items() if isfunction(value) and not getdoc(value)] == []
    generated = {name: f"{name}(" for name, value in offered.items() if isclass(value)}
    assert [name for name, start in generated.items() if (offered[name].__doc__ or start).startswith(start)] == []


def test_every_command_of_the_program_is_a_function_of_the_library():
    assert set(COMMANDS) - {"demo", "study"} <= set(portllm.__all__)


def test_every_error_is_public():
    errors = {name for name, value in vars(portllm.errors).items() if isclass(value) and issubclass(value, Exception)}
    assert errors <= set(portllm.__all__)


def test_a_place_may_be_given_as_a_text_wherever_a_path_may():
    strict = []
    for name in sorted(HOMES):
        for parameter in signature(getattr(portllm, name)).parameters.values() if name.islower() else ():
            hint = str(parameter.annotation)
            if re.search(r"Path|Checkpoint|Patch\b", hint) and not re.search(r"\bstr\b", hint):
                strict.append(f"{name}({parameter})")
    assert strict == []


def test_importing_the_package_reads_no_stub_and_imports_nothing_of_it():
    code = "import sys, portllm; print(*sorted(name for name in sys.modules if name.startswith(('portllm', 'lazy'))))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["portllm"]


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = portllm.no_such_name


def test_the_version_is_the_one_that_is_installed():
    assert portllm.__version__ == version("portllm")


def test_windows_is_refused_in_one_sentence_when_the_package_is_imported():
    program = "import sys; sys.platform = 'win32'; import portllm"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr.endswith("ImportError: PortLLM runs on Linux and macOS; on Windows, run it in WSL.\n")
