"""The package with its types checked while tests run, and its shapes where it names some.

That the shapes of one call agree takes jaxtyping, whose call costs many times that of beartype alone: only modules that
name shapes pay that, and those with names that only the type checker imports, which beartype alone cannot do without.
There, a function within another is left alone: it would be compiled anew, twice, each time the outer one is called.
"""

import sys
from pathlib import Path

from beartype import BeartypeConf, beartype
from beartype.claw import beartype_package
from jaxtyping import install_import_hook

SOURCE = Path(__file__).parents[1] / "src"
CONFIGURATION = BeartypeConf(is_pep484_tower=True)


def check_types():
    """Must come before the package is imported.

    An int passes where a float is asked for, as it does for the type checker.
    """
    assert "portllm" not in sys.modules, "the package was imported before its types could be checked"
    by_jaxtyping = tuple(module_name(file) for file in SOURCE.rglob("*.py") if needs_jaxtyping(file.read_text()))
    install_import_hook(by_jaxtyping, "tests.checked.typed")
    others = BeartypeConf(is_pep484_tower=True, claw_is_pep526=False, claw_skip_package_names=by_jaxtyping)
    beartype_package("portllm", conf=others)


def typed(function):
    """The function with its types checked, if it is made once."""
    return function if "<locals>" in function.__qualname__ else beartype(conf=CONFIGURATION)(function)


def needs_jaxtyping(source):
    """Whether a module names shapes, or types that are not there at run time."""
    return "from portllm.arrays import" in source or "if TYPE_CHECKING:" in source


def module_name(file):
    """The dotted name of a source file."""
    return ".".join(file.relative_to(SOURCE).with_suffix("").parts)
