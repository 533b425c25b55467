"""How many of the old specialist's answers ports kept on measured updates: what comes with the program, by method.

The numbers are those of the studies in `studies/results` in which addition and align carried the same patches, gathered
by `scripts/gather_answers.py`. They are counts on rows that nothing was fitted or chosen on, not a fitted curve.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean

from portllm.checking.outcomes import ABOUT

FILE = "answers.json"

FEWEST = 3
"""Of fewer cases nothing is said."""


@dataclass(frozen=True, slots=True)
class Carried:
    """A patch that was carried through an update by several methods.

    Attributes:
        base: The model.
        patch: Task, evolution and seed.
        drift: Of the weights that the patch changes, relative to their norm.
        kept: By method, the share of rows that are answered as by the old specialist.
    """

    base: str
    patch: str
    drift: float
    kept: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Answers:
    """What became of the answers of patches whose weights drifted about as far.

    Attributes:
        bases: The models.
        n: How many cases. A patch counts once for each link of a chain.
        kept: By method, the least and the mean share of answers that stayed the old specialist's.
    """

    bases: tuple[str, ...]
    n: int
    kept: Mapping[str, tuple[float, float]]

    def to_json(self) -> dict[str, object]:
        """As JSON values."""
        kept = {method: {"least": least, "mean": mean} for method, (least, mean) in self.kept.items()}
        return {"bases": list(self.bases), "cases": self.n, "kept": kept}


def answers_about(drift: float, carried: Sequence[Carried] | None = None) -> Answers | None:
    """The answers of ports on updates from a third of a drift to three times of it; None of fewer than `FEWEST`.

    Args:
        drift: Of the weights that a patch changes, relative to their norm.
        carried: What was measured; what comes with the program where None is given.

    Example:
        >>> seen = [Carried("m", str(n), 0.01, {"add": 0.5, "align": 0.9 + 0.01 * n}) for n in range(3)]
        >>> answers_about(0.02, seen).kept["add"], answers_about(0.05, seen)
        ((0.5, 0.5), None)
    """
    known = shipped() if carried is None else carried
    found = [each for each in known if drift / ABOUT <= each.drift <= drift * ABOUT]
    if len(found) < FEWEST:
        return None
    by_method = {method: [each.kept[method] for each in found] for method in found[0].kept}
    kept = {method: (min(shares), fmean(shares)) for method, shares in by_method.items()}
    return Answers(tuple(dict.fromkeys(each.base for each in found)), len(found), kept)


@cache
def shipped() -> tuple[Carried, ...]:
    """What comes with the program."""
    values = json.loads(Path(__file__).with_name(FILE).read_text(encoding="utf-8"))
    return tuple(Carried(**value) for value in values)
