"""The table of families in their README is that of the tests."""

from pathlib import Path

from matrix import COLUMNS, REFUSED, UPSTREAM, table
from tiny import EVERY, VARIANTS

from grip_hf.families import table as architectures

README = Path(architectures.__file__).with_name("README.md")


def test_the_readme_has_the_table_of_the_tests():
    text = README.read_text(encoding="utf-8")
    assert text.split("<!-- families -->")[1].split("<!-- /families -->")[0].strip() == table()


def test_limits_are_about_families_and_columns():
    assert {VARIANTS.get(name, name) for name in EVERY} == set(architectures.FAMILIES)
    for limits in (UPSTREAM, REFUSED):
        assert set(limits) <= {*COLUMNS, "logits_to_keep"}
        assert all(set(families) <= set(EVERY) for families in limits.values())
