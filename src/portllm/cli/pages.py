"""Where a command's page goes, if one is asked for: refused before any work, written when the result is there."""

from datetime import date
from pathlib import Path

from portllm import __version__
from portllm.cli.terminal import say
from portllm.files.one_file import check_page_free, write_page
from portllm.show.names import short_name


def named(model: str) -> str:
    """What a model is called in a title: its name, not where it lies.

    Example:
        >>> named("/models/v2/"), named("org/model@main")
        ('v2', 'org/model@main')
    """
    return (Path(model).name or model) if Path(model).exists() else short_name(model)


def written() -> dict[str, str]:
    """When a page was written, and by which version; the page itself is a function of the result alone."""
    today = date.today()
    return {"date": f"{today.day} {today:%B %Y}", "program": f"PortLLM {__version__}"}


class Page:
    """What `--html` and `--overwrite` ask for.

    Args:
        file: Where, or None.
        overwrite: Whether a file there may be replaced; without one, nothing is.

    Raises:
        OutputExistsError: Something is there that may not be replaced.
    """

    def __init__(self, file: Path | None, *, overwrite: bool) -> None:
        self._file, self._overwrite = file, overwrite
        if file is not None:
            check_page_free(file, overwrite=overwrite)

    @property
    def is_wanted(self) -> bool:
        """Whether there is to be one."""
        return self._file is not None

    def write(self, text: str) -> None:
        """Write it, and say where."""
        if self._file is None:
            raise AssertionError("a page is written where one is asked for")
        write_page(self._file, text, overwrite=self._overwrite)
        say(f"page {self._file}", err=True)
