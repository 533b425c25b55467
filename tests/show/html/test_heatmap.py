"""A cell for each matrix of a stack, the stronger the larger; the table beside it says the same."""

import re

from portllm.measures.places import TensorPlace
from portllm.show.html.heatmap import cell_rows, heatmap, stacks_of, strength

SHARES = {("h", 0, "attn.q"): 0.01, ("h", 0, "mlp.up"): 0.02, ("h", 1, "attn.q"): 0.04, ("v", 0, "attn.q"): 0.5}
CELLS = {TensorPlace(*place): share for place, share in SHARES.items()}
SKIPPED = {
    TensorPlace("h", 0, "input_layernorm"): 1.0,
    TensorPlace("h", 0, "attn.q.bias"): 1.0,
    TensorPlace("", -1, "head"): 1.0,
}


def drawn(cells, stack="h"):
    picture = heatmap(cells, stack, title="t", told="d", largest=0.04, largest_text="4 %")
    rects = re.findall(r'<rect x="([\d.]+)" y="([\d.]+)" .*?fill-opacity="([\d.]+)"', picture)
    return [(float(x), float(y), float(shade)) for x, y, shade in rects][:-8]  # the last eight are the legend's


def test_each_matrix_of_the_stack_is_one_cell_and_nothing_else_is():
    assert len(drawn(CELLS | SKIPPED)) == 3
    assert len(drawn(CELLS, "v")) == 1
    assert stacks_of(CELLS | SKIPPED) == ["h", "v"]


def test_the_largest_has_the_full_color_and_the_others_in_proportion():
    shades = [shade for _, _, shade in drawn(CELLS)]
    assert shades == [round(strength(share, 0.04), 3) for share in (0.01, 0.02, 0.04)]
    assert shades[-1] == 1.0


def test_layers_go_down_and_kinds_go_right():
    (x_q, y_0, _), (x_up, same, _), (x_again, y_1, _) = drawn(CELLS)
    assert x_q == x_again < x_up
    assert y_0 == same < y_1


def test_experts_stand_where_other_matrices_do():
    assert len(drawn({TensorPlace("h", 3, "experts.up", is_expert=True): 0.04})) == 1


def test_the_table_has_a_line_for_each_layer_and_is_blank_where_there_is_no_matrix():
    rows = cell_rows({place: f"{share:g}" for place, share in (CELLS | SKIPPED).items()}, "h")
    assert rows == [("layer", "attn.q", "mlp.up"), ("0", "0.01", "0.02"), ("1", "0.04", "")]


def test_a_model_that_did_not_move_is_drawn_in_the_faintest_color():
    still = heatmap({TensorPlace("h", 0, "q"): 0.0}, "h", title="t", told="d", largest=0.0, largest_text="0 %")
    assert 'fill-opacity="0.060"' in still
