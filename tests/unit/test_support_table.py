"""docs/support.md says what the tests say."""

from __future__ import annotations

import pytest

from support_table import COLLECTED, PAGE, TABLES, _key, is_gone, is_whole, read, render


def cell(table=TABLES[0], row="row", column="column", outcome="passed", test="tests/t.py::test_x[a]", **more):
    return {"table": table, "row": row, "column": column, "against": "a twin", "test": test} | {
        "outcome": outcome,
        "date": "2026-01-01",
        **more,
    }


def test_page_is_written_from_the_results():
    assert PAGE.read_text(encoding="utf-8") == render(read()), "docs/support.md is stale: run `make support`"


def test_results_name_the_tests_there_are(request):
    collected = request.config.stash[COLLECTED]
    recorded = {_key(each) for each in read()}
    assert not {_key(each) for each in collected} - recorded, "cells without a result: run `make support`"
    if is_whole(request.config):
        assert not [each for each in read() if is_gone(each, collected)], "its test is gone: run `make support`"


def test_a_cell_is_gone_with_its_test_or_file():
    here = cell(test="tests/unit/test_support_table.py::test_x")
    other = cell(test="tests/unit/test_support_table.py::test_y")
    assert not is_gone(here, [here])
    assert is_gone(here, [other])
    assert not is_gone(here, [])  # its file was not collected: it may want a package
    assert is_gone(cell(test="tests/no_such_file.py::test_x"), [])


def test_no_recorded_cell_failed():
    assert [each for each in read() if each["outcome"] == "failed"] == []


def test_a_cell_shows_its_worst_outcome():
    page = render([cell(), cell(outcome="failed", test="tests/t.py::test_y"), cell(column="other")])
    assert "| row | ✗ | ✓ |" in page


def test_a_cell_that_was_not_run_says_why():
    page = render([cell(outcome="skipped", reason="needs a GPU")])
    assert "| row | – |" in page
    assert "row, column: needs a GPU" in page


def test_a_row_without_a_test_for_a_column_is_blank():
    page = render([cell(), cell(row="other", column="new")])
    assert "| other |  | ✓ |" in page
    assert "| row | ✓ |  |" in page


def test_grounds_name_the_test_and_its_twin_once():
    page = render([cell(), cell(row="other", test="tests/t.py::test_x[b]")])
    assert page.count("`tests/t.py::test_x` compares with a twin") == 1


@pytest.mark.parametrize("marker", [pytest.mark.support("PEFT", row="r"), pytest.mark.support("Nowhere", row="r")])
def test_a_marker_that_says_too_little_is_refused(pytester_item, marker):
    from support_table import cells_of

    pytester_item.add_marker(marker)
    with pytest.raises(pytest.UsageError, match="expected @pytest.mark.support"):
        cells_of(pytester_item)


@pytest.fixture
def pytester_item(request):
    """A test item of its own, so that no marker stays on a real one."""
    return pytest.Function.from_parent(request.node.parent, name="unused", callobj=lambda: None)
