"""docs/models.md says what the tests check."""

from .table import DOCUMENT, with_table


def test_the_table_is_fresh():
    text = DOCUMENT.read_text()
    assert text == with_table(text), "run: python tests/families/table.py --write"
