"""Every model type of the table: what `tests.model_types` says of it is so, and nothing is wrong in silence."""

import json

import pytest

from tests.model_types import OUT, RIGHT

FOUND = json.loads(OUT.read_text(encoding="utf-8"))


def test_no_cell_is_wrong():
    cells = [cell for classes in FOUND.values() for found in classes.values() for cell in found.values()]
    assert not [cell for cell in cells if cell.startswith("WRONG")]
    assert sum(cell == RIGHT for cell in cells) > 0.8 * sum(cell != "none" for cell in cells)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", FOUND)
def test_an_adapter_of_every_kind_is_merged_right_or_refused(model_type):
    from tests.model_types import swept

    assert swept(model_type) == FOUND[model_type]
