"""Tables of text."""

from hypothesis import given
from hypothesis import strategies as st

from east_plugins.ops import text

CELLS = st.text(st.characters(codec="ascii", exclude_categories=["C"], exclude_characters="|"), max_size=12)


def test_columns_are_as_wide_as_their_widest_cell():
    assert text.table(("name", "ms"), [("a", "1.5"), ("longer", "12.25")], "<>") == (
        "name       ms\na         1.5\nlonger  12.25"
    )


@given(st.lists(st.tuples(CELLS, CELLS), max_size=5))
def test_every_cell_is_in_its_line_and_right_columns_end_together(rows):
    lines = text.table(("left", "right"), rows, "<>").split("\n")
    assert len(lines) == len(rows) + 1
    for line, (left, right) in zip(lines[1:], rows, strict=True):
        assert line.startswith(left.rstrip()) and line.endswith(right.rstrip())
    ends = {len(line) for line, (_, right) in zip(lines[1:], rows, strict=True) if right and right == right.rstrip()}
    assert len(ends) <= 1


def test_markdown():
    assert text.markdown(("a", "b"), [(1, 2)]) == "| a | b |\n|---|---|\n| 1 | 2 |\n"
