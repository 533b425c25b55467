"""How a notebook shows a result: by the page of its room, found when it is shown, so that no result knows its page."""

import importlib


class ShownInNotebook:
    """A result whose room has a `page` with a function `notebook`, from the result to HTML."""

    __slots__ = ()

    def _repr_html_(self) -> str:
        room = type(self).__module__.rpartition(".")[0]
        return str(importlib.import_module(f"{room}.page").notebook(self))
