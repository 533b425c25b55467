"""A heatmap of layers by kinds of modules: the stronger the color, the larger the number. Pure."""

from collections.abc import Mapping, Sequence

from portllm.measures.places import TensorPlace
from portllm.show.html.figure import Rows, drawing
from portllm.show.html.markup import Html, element
from portllm.show.printable import one_line

WIDTH = 360.0
LEFT = 36.0
TURN = 0.71
"""Cosine and sine of the angle at which names of columns stand."""

LETTER = 6.2
"""Width of a letter, about."""

LONGEST = 20
"""Letters of a name that are shown; the table has all of it."""

FAINTEST = 0.06
"""How much of the color a number of zero has."""

Cells = Mapping[TensorPlace, float]
"""A share for each place."""


def heatmap(cells: Cells, stack: str, *, title: str, told: str, largest: float, largest_text: str) -> Html:
    """One stack of layers from top to bottom, its kinds of modules from left to right.

    Args:
        cells: What to draw; places of other stacks, and those that are not matrices, are passed over.
        stack: Which layers.
        title: Name of the picture.
        told: In words, what is to be seen.
        largest: The number that has the full color.
        largest_text: The same for people.
    """
    kinds, layers = kinds_of(cells, stack), layers_of(cells, stack)
    names = short_names(kinds)
    right = max((len(name) for name in names), default=0) * LETTER * TURN * 0.8
    top = max((len(name) for name in names), default=0) * LETTER * TURN + 10
    width = (WIDTH - LEFT - right) / max(1, len(kinds))
    height = 16.0 if len(layers) <= 16 else 11.0 if len(layers) <= 48 else 6.0
    every = max(1, round(11 / height))
    parts = [_column_name(name, LEFT + (number + 0.5) * width, top - 5) for number, name in enumerate(names)]
    for row, layer in enumerate(layers):
        y = top + row * height
        if row % every == 0:
            parts.append(element("text", str(layer), x=LEFT - 6, y=y + height / 2 + 4, class_="small end faint"))
        for column, kind in enumerate(kinds):
            found = cells.get(
                TensorPlace(stack, layer, kind), cells.get(TensorPlace(stack, layer, kind, is_expert=True))
            )
            if found is not None:
                parts.append(_cell(LEFT + column * width, y, width, height, strength(found, largest)))
    bottom = top + len(layers) * height
    parts += _legend(LEFT, bottom + 12, largest_text)
    return drawing(WIDTH, bottom + 40, title, told, parts)


def cell_rows(cells: Mapping[TensorPlace, str], stack: str) -> Rows:
    """The same as a table: a line for each layer, a column for each kind."""
    kinds = kinds_of(cells, stack)
    found = {(place.layer, place.kind): text for place, text in cells.items() if place.stack == stack}
    return [
        ("layer", *kinds),
        *(
            (str(layer), *(found.get((layer, kind), "") for kind in kinds))
            for layer in layers_of(cells, stack)
        ),
    ]  # fmt: skip


def stacks_of(cells: Mapping[TensorPlace, object]) -> list[str]:
    """The stacks of layers that have a cell, sorted."""
    return sorted({place.stack for place in cells if _is_drawn(place)})


def kinds_of(cells: Mapping[TensorPlace, object], stack: str) -> list[str]:
    """The kinds of modules of a stack, sorted; neither norms nor biases."""
    return sorted({place.kind for place in cells if place.stack == stack and _is_drawn(place)})


def layers_of(cells: Mapping[TensorPlace, object], stack: str) -> list[int]:
    """The layers of a stack, rising."""
    return sorted({place.layer for place in cells if place.stack == stack and _is_drawn(place)})


def short_names(kinds: Sequence[str]) -> list[str]:
    """The last part of each name, or the whole name where two end alike; of a long one, its end.

    Example:
        >>> short_names(["mlp.up_proj", "self_attn.q_proj"]), short_names(["a.w", "b.w"])
        (['up_proj', 'q_proj'], ['a.w', 'b.w'])
    """
    kinds = [one_line(kind) for kind in kinds]
    ends = [kind.rpartition(".")[2] for kind in kinds]
    names = [end if ends.count(end) == 1 else kind for end, kind in zip(ends, kinds, strict=True)]
    return [name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}" for name in names]


def strength(value: float, largest: float) -> float:
    """How much of the color a number has: in proportion to the largest, never nothing.

    Example:
        >>> strength(0.0, 2.0), strength(2.0, 2.0), strength(9.0, 2.0)
        (0.06, 1.0, 1.0)
    """
    share = min(1.0, value / largest) if largest > 0 else 0.0
    return FAINTEST + (1 - FAINTEST) * share


def _is_drawn(place: TensorPlace) -> bool:
    return place.layer >= 0 and place.is_matrix


def _column_name(name: str, x: float, y: float) -> Html:
    return element("text", name, x=x, y=y, class_="small", transform=f"rotate(-45 {x:.1f} {y:.1f})")


def _cell(x: float, y: float, width: float, height: float, shade: float) -> Html:
    return element(
        "rect", x=x + 0.5, y=y + 0.5, width=width - 1, height=height - 1, class_="heat", fill_opacity=f"{shade:.3f}"
    )


def _legend(x: float, y: float, largest_text: str) -> list[Html]:
    steps = 8
    boxes = [_cell(x + 16 * step, y, 16, 10, strength(step / (steps - 1), 1.0)) for step in range(steps)]
    ends = (("0", x, "small faint"), (largest_text, x + 16 * steps, "small faint end"))
    return [*boxes, *(element("text", text, x=place, y=y + 22, class_=kind) for text, place, kind in ends)]
