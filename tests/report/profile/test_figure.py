"""Figures of a profile: every kind can be drawn, and the roofline's columns never overlap."""

from __future__ import annotations

import warnings
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bncli.errors import USAGE, BncliError
from bncli.report.profile.figure import apart, clusters, copy_words, draw, render
from bncli.results.profile import Ceilings
from tests.report.made_up_costs import (
    CEILINGS,
    kernel_profile,
    nothing_measured,
    one_case,
    resnet,
    step_profile,
    with_errors,
)

pytest.importorskip("matplotlib")


def test_many_copies_of_one_speed_share_a_label_that_stays_short():
    two = [(2**20, 12.6), (2**28, 13.6)]
    assert copy_words(two) == "copy: 12.6 GB/s of 1 MiB, 13.6 GB/s of 256 MiB"
    assert copy_words([*two, (2**24, 15.0)]) == "copy: 13.6 GB/s of 256 MiB, 12.6 to 15.0 of 2 smaller sizes"


def words(svg: bytes) -> str:
    """The figure's text, which an SVG of this kind holds as comments beside the outlines of its letters."""
    return svg.decode()


@pytest.mark.parametrize(
    "profile",
    [
        with_errors(),
        nothing_measured(),
        replace(one_case(), ceilings=Ceilings((), None)),
        replace(kernel_profile(1), ceilings=replace(CEILINGS, copies=((2**20, 12.2), (2**28, 12.1)), gflop_per_s=9.0)),
        step_profile(),
        replace(step_profile(), rows=()),
    ],
    ids=["errors", "nothing", "no ceilings", "low roofs", "step", "no step"],
)
def test_every_profile_can_be_drawn_without_a_warning(profile):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ElementTree.fromstring(render(profile, "svg")).tag.endswith("svg")


def test_the_picture_names_kernels_operations_ceilings_machine_threads_dtype_and_date():
    svg = words(render(one_case(), "svg"))
    for each in ("native", "fused", "256x64x56x56", "copy: 11.9 GB/s of 256 MiB", "118 GFLOP/s", "2 threads", "fp32"):
        assert each in svg
    assert "2026-01-02" in svg


def test_the_same_profile_gives_the_same_bytes(tmp_path):
    draw(one_case(), tmp_path / "a.svg")
    draw(one_case(), tmp_path / "b.SVG")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.SVG").read_bytes()


def test_a_png_is_written_for_its_suffix_and_another_is_refused(tmp_path):
    draw(step_profile(), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(BncliError, match=r"\.svg or \.png") as refused:
        draw(one_case(), tmp_path / "a.pdf")
    assert refused.value.exit_code == USAGE
    assert not (tmp_path / "a.pdf").exists()


def test_a_step_s_picture_has_its_classes_its_times_and_its_ratios():
    svg = words(render(step_profile(), "svg"))
    for each in (
        "normalization",
        "convolution, linear",
        "gaps",
        "batch norm: training, fused",
        "83.1 ms",
        "1.23x native",
    ):
        assert each in svg


# --- what is drawn ------------------------------------------------------------------------------------------------


def test_the_clusters_have_the_definition_s_flop_for_each_byte():
    found = clusters(resnet().rows)
    assert [cluster.intensity for cluster in found] == pytest.approx([2.6 / 2, 3.0 / 2, 3.2 / 2])
    assert {kernel: len(speeds) for kernel, speeds in found[0].speeds.items()} == {"native": 6, "fused": 6}


PLACES = st.lists(st.tuples(st.floats(-5, 5), st.floats(0.01, 2)), min_size=1, max_size=12)


@given(PLACES)
def test_columns_moved_apart_keep_their_order_and_do_not_overlap(columns):
    places, widths = sorted(place for place, _ in columns), [width for _, width in columns]
    moved = apart(places, widths)
    for k in range(len(moved) - 1):
        assert moved[k + 1] - moved[k] >= (widths[k] + widths[k + 1]) / 2 - 1e-9


@given(PLACES)
def test_columns_with_room_stay_where_they_are(columns):
    places = [3.0 * index for index in range(len(columns))]
    assert apart(places, [width for _, width in columns]) == pytest.approx(places)
