"""Bars of GB/s: which are drawn, how far they reach, and when means stand for them."""

from __future__ import annotations

from bncli.report.profile.bars import MOST_BARS, facets, facets_height
from tests.report.made_up_costs import hundred_rows, kernel_profile, one_case, resnet


def test_a_facet_is_an_operation_dtype_and_layout_with_a_group_of_bars_a_shape():
    found = facets(resnet().rows)
    assert [facet.title for facet in found][:2] == ["bn, bf16, contiguous", "bn+relu, bf16, contiguous"]
    assert len(found) == 6
    assert {name: len(bars) for name, bars in found[0].groups.items()} == {
        "256x64x56x56": 2, "256x128x28x28": 2, "256x256x14x14": 2,
    }  # fmt: skip


def test_a_bar_reaches_from_its_slow_to_its_fast_quartile():
    for facet in facets(one_case().rows):
        for group in facet.groups.values():
            for bar in group:
                assert bar.low < bar.value < bar.high


def test_too_many_bars_become_geometric_means_and_the_picture_stays_small():
    rows = kernel_profile(9, kernels=("native", "fused", "compiled", "flaggems", "native")).rows
    (facet,) = facets(rows)
    assert facet.bars <= MOST_BARS
    assert list(facet.groups) == ["bn, fp32, contiguous", "bn+relu, fp32, contiguous"]
    assert facets_height(facets(hundred_rows().rows), 3) < 9


def test_a_hundred_rows_are_all_drawn():
    assert sum(facet.bars for facet in facets(hundred_rows().rows)) == 96
