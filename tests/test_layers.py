"""Every module stands in the layer table; import-linter (`make layers`) checks who imports whom."""

import pkgutil
import re
import tomllib
from pathlib import Path

import portllm

PYPROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
OUTSIDE = {"portllm", "portllm.many", "portllm.patch", "portllm.pipeline"}
"""Packages whose `__init__` holds nothing but a docstring, or the list of public names."""


def placed_modules():
    contract = next(c for c in PYPROJECT["tool"]["importlinter"]["contracts"] if c["id"] == "layers")
    return {name for line in contract["layers"] for name in re.findall(r"[\w.]+", line)}


def modules_of_the_package():
    return {info.name for info in pkgutil.walk_packages(portllm.__path__, "portllm.")}


def unplaced(modules, placed):
    return sorted(m for m in modules - OUTSIDE if not any(m == p or m.startswith(p + ".") for p in placed))


def test_every_module_stands_in_a_layer():
    assert unplaced(modules_of_the_package(), placed_modules()) == []


def test_a_module_outside_the_layers_is_noticed():
    assert unplaced({"portllm.utils", "portllm.checkpointing"}, placed_modules()) == [
        "portllm.checkpointing",
        "portllm.utils",
    ]


def test_the_layer_table_names_no_module_that_is_gone():
    assert placed_modules() <= modules_of_the_package()


def test_no_module_is_longer_than_400_lines():
    sources = Path(portllm.__file__).parent.rglob("*.py")
    assert [path.name for path in sources if len(path.read_text(encoding="utf-8").splitlines()) > 400] == []
