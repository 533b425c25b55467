"""What `import portllm` offers is exactly `__all__`, and every name of it is what it says."""

import importlib
import pkgutil
from importlib.metadata import version

import pytest

import portllm

HOMES = portllm._HOMES


def test_all_public_names_are_listed():
    assert set(portllm.__all__) == {"__version__", *HOMES}


@pytest.mark.parametrize("name", sorted(HOMES))
def test_a_public_name_is_the_object_of_its_home(name):
    assert getattr(portllm, name) is getattr(importlib.import_module(HOMES[name]), name)


def test_no_public_name_is_that_of_a_subpackage():
    # Importing a submodule sets it as an attribute of the package, in the place of a function of the same name.
    assert set(HOMES) & {module.name for module in pkgutil.iter_modules(portllm.__path__)} == set()


def test_every_public_name_has_a_docstring():
    assert [name for name in HOMES if not getattr(portllm, name).__doc__] == []


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        _ = portllm.no_such_name


def test_the_version_is_the_one_that_is_installed():
    assert portllm.__version__ == version("portllm")
