"""Cells and figures of a profile."""

from __future__ import annotations

from bncli.report.profile.text import memory_column, percent, quartiles, samples_cell
from bncli.report.text import Cell


def test_memory_below_a_mib_is_in_kib():
    assert memory_column("peak", [0.5, None, 0.00618]).header == "peak\nKiB"
    assert [cell.main for cell in memory_column("peak", [0.5, None, 0.00618]).cells] == ["512", "–", "6.33"]
    assert memory_column("peak", [0.5, 2.0]).header == "peak\nMiB"
    assert [cell.main for cell in memory_column("peak", [0.5, 2.0]).cells] == ["0.500", "2.00"]
    assert memory_column("peak", [None]).header == "peak\nMiB"


def test_quartiles_are_of_the_samples_and_one_sample_has_no_spread():
    found = quartiles((1.0, 2.0, 3.0, 4.0, 5.0))
    assert (found.low, found.median, found.high) == (2.0, 3.0, 4.0)
    assert samples_cell((1.0, 2.0, 3.0, 4.0, 5.0)) == Cell("3.00", "±33%")
    assert samples_cell((7.0,)) == Cell("7.00")
    assert samples_cell(()) == Cell("–")


def test_a_share_that_rounds_to_nothing_is_not_nothing():
    assert percent(0.001) == "< 1%"
    assert percent(0.0) == "0%"
    assert percent(None) == "–"
