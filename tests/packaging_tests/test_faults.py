"""docs/faults.md against the rows and tests that it names."""

import re

from benchmarks.chaos.rows import ROWS
from tests.packaging_tests.project import CHECKOUT


def table() -> str:
    return (CHECKOUT / "docs" / "faults.md").read_text()


def test_each_row_is_in_the_table_of_faults_and_each_that_it_names_can_be_run() -> None:
    text = table()
    listed = re.findall(r"^\| (\d+) \|", text, re.M)
    assert listed == [str(number) for number in range(1, len(listed) + 1)]
    assert set(ROWS) <= set(listed)
    assert set(re.findall(r"\brow (\d+)", text)) == set(ROWS)


def test_each_test_that_the_table_of_faults_names_is_there() -> None:
    named = re.findall(r"`((?:\w+/\w+\.py)?(?:::\w+)?)`", table())
    file = ""
    for name in filter(None, named):
        path, _, test = name.partition("::")
        file = path or file
        text = (CHECKOUT / "tests" / file).read_text()
        assert not test or f"def {test}(" in text, name
    assert len(named) > 40
