"""The paper's numbers: complete, unambiguous, and tied to their budgets."""

import json

import pytest
from meda_kv.data import paper_table
from vfm_core.errors import UserError


@pytest.mark.parametrize(
    ("number", "models", "methods", "columns"), [(1, 3, 6, 11), (2, 2, 6, 4), (3, 2, 6, 3), (4, 3, 6, 1)]
)
def test_every_cell_is_there_once(number, models, methods, columns):
    table = paper_table(number)
    keys = {(row["model"], row["method"], row["column"]) for row in table.rows}
    assert len(keys) == len(table.rows) == models * methods * columns
    assert len(table.columns) == columns
    assert {row["column"] for row in table.rows} == set(table.columns)


@pytest.mark.parametrize("number", range(1, 6))
def test_only_the_full_cache_has_ratio_one(number):
    for row in paper_table(number).rows:
        assert (row["ratio"] == 1.0) == (row["method"] == "full")
        assert row["ratio"] in (1.0, 0.1 if number == 1 or "-" in row["column"] else 0.2)


def test_numbers_by_name():
    assert paper_table(1).value("meda", "IR", model="InternVL-v1.5-7B") == 1.2
    assert paper_table(1).value("full", "T-1", model="LLaVA-v1.5-13B") == 39.8
    assert paper_table(2).value("look-m", "context", model="LongVILA-8B") == 2.51
    assert paper_table(3).value("pyramidkv", "recall", model="LLaVA-Video-32B") == 28.1
    assert paper_table(4).value("meda", "WorldQA", model="LongVA-7B") == 27.5
    assert paper_table(5).value("meda-no-alloc", "Spot-the-Diff") == 17.5
    assert paper_table(5).value("meda-no-both", "YouTube") == 27.2


def test_the_abstracts_two_numbers_belong_to_two_budgets():
    table = paper_table(6)

    def relative(column, ratio):
        return table.value("meda", column, ratio=ratio) / table.value("full", column)

    assert 1 - relative("GiB", 0.2) == pytest.approx(0.72, abs=0.005)
    assert 1 / relative("ms/token", 0.2) == pytest.approx(1.78, abs=0.005)
    assert 1 / relative("ms/token", 0.05) == pytest.approx(2.82, abs=0.005)
    assert relative("GiB", 0.05) == pytest.approx(0.15, abs=0.005)
    assert "0.2" in table.note and "0.05" in table.note


def test_a_number_that_is_not_there_or_not_unique_is_told():
    with pytest.raises(UserError, match="3 numbers"):
        paper_table(1).value("meda", "NH")
    with pytest.raises(UserError, match="no such number"):
        paper_table(1).value("streaming", "NH", model="LLaVA-NeXT-7B")
    with pytest.raises(UserError, match="no such table"):
        paper_table(7)


def test_tables_are_json():
    table = json.loads(paper_table(6).to_json())
    assert table["source"] == "arXiv 2502.17599"
    assert len(table["rows"]) == 10
