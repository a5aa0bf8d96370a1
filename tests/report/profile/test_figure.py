"""Figures of a profile: what is drawn, at which width, and when means stand for bars."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bncli.errors import USAGE, BncliError
from bncli.report.figure import FigureStyle, save
from bncli.report.profile.figure import (
    MOST_BARS,
    bar_panels,
    clusters,
    draw,
    roofline,
    row_heights,
)
from bncli.results.environment import Interval
from bncli.results.profile import Ceilings, Profile, Speedup
from tests.report.conftest import check_everything_is_inside, laid_out
from tests.report.made_up_costs import (
    CEILINGS,
    hundred_rows,
    kernel_profile,
    nothing_measured,
    one_case,
    resnet,
    step_profile,
    with_errors,
)

pytest.importorskip("matplotlib")


def texts(profile: Profile) -> set[str]:
    """What stands in the figure, which is laid out but not rendered; a warning fails."""
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    figure = Figure(layout="constrained")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(figure, profile)
        figure.draw_without_rendering()
    return {artist.get_text() for artist in figure.findobj(Text)}


LOW_LIMITS = replace(CEILINGS, copies=((2**20, 12.2), (2**28, 12.1)), gflop_per_s=9.0)
DRAWN = {
    "errors": (with_errors(), {"bn+relu\nfp32\n0.80 flop/B", "bn, bf16, contiguous, evaluation, affine none"}),
    "bars below the roofline": (
        kernel_profile(3, layouts=("contiguous", "channels_last")),
        {"bn+relu, fp32, channels_last", "copy at 256 MiB: 11.9 GB/s", "copy at\n1 MiB:\n41.2 GB/s"},
    ),
    "nothing": (nothing_measured(), {"nothing was measured"}),
    "no ceilings": (replace(one_case(), ceilings=Ceilings((), None)), {"native", "256x64x56x56"}),
    "low limits": (
        replace(kernel_profile(1), ceilings=LOW_LIMITS),
        {
            "copy at 256 MiB: 12.1 GB/s",
            "compute limit",
        },
    ),
    "step": (
        step_profile(),
        {"normalization", "convolution, linear", "gaps", "batch norm: training, fused", "83.1 ms (1.23x vs native)"},
    ),
    "a step of unknown shares": (
        replace(step_profile(), rows=(replace(step_profile().rows[0], shares_ms={}),)),
        {"102 ms"},
    ),
    "no step": (replace(step_profile(), rows=()), {"nothing was measured"}),
}


@pytest.mark.parametrize(("profile", "words"), DRAWN.values(), ids=DRAWN)
def test_every_profile_is_drawn_without_a_warning(profile: Profile, words: set[str]) -> None:
    assert words <= texts(profile)


def test_the_figure_names_kernels_operations_ceilings_and_machine(tmp_path: Path) -> None:
    """The same profile also gives the same bytes. An SVG holds its text as comments."""
    for name in ("a.svg", "b.SVG"):
        save(draw, one_case(), tmp_path / name)
    svg = (tmp_path / "a.svg").read_text()
    assert svg == (tmp_path / "b.SVG").read_text()
    words = ("native", "fused", "256x64x56x56", "copy at 256 MiB: 11.9 GB/s", "118 GFLOP/s", "2 threads", "fp32")
    for each in (*words, "2026-01-02"):
        assert each in svg


def test_a_png_is_written_for_its_suffix_and_another_is_refused(tmp_path: Path) -> None:
    save(draw, step_profile(), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(BncliError, match=r"\.svg, \.png or \.pdf") as refused:
        save(draw, one_case(), tmp_path / "a.eps")
    assert refused.value.exit_code == USAGE
    assert not (tmp_path / "a.eps").exists()


# --- bars ---------------------------------------------------------------------------------------------------------


def test_a_panel_is_an_operation_dtype_and_layout_with_bars_for_each_shape() -> None:
    panels = bar_panels(resnet().rows, 160)
    assert list(panels)[:2] == ["bn, bf16, contiguous", "bn+relu, bf16, contiguous"]
    assert len(panels) == 6
    shapes = ("256x64x56x56", "256x128x28x28", "256x256x14x14")
    assert {name: len(bars) for name, bars in panels["bn, bf16, contiguous"].items()} == dict.fromkeys(shapes, 2)


def test_a_bar_reaches_from_its_slow_to_its_fast_quartile() -> None:
    (panel,) = bar_panels(one_case().rows, 160).values()
    assert all(bar.low < bar.value < bar.high for bars in panel.values() for bar in bars)


def test_bars_are_not_squeezed_by_a_copy_that_is_many_times_as_fast() -> None:
    from matplotlib.figure import Figure

    for speed, words in ((13.0, ""), (4000.0, " (copy: 4,000, beyond the axis)")):
        figure = Figure(layout="constrained")
        draw(figure, replace(one_case(), ceilings=Ceilings(((2**28, speed),), None)))
        bars = figure.axes[1]
        assert max(bar.get_width() for bar in bars.patches) > 0.3 * bars.get_xlim()[1]
        assert bars.get_xlabel().replace("\n", " ") == f"GB/s of the minimum bytes to move{words}"


def test_too_many_bars_become_geometric_means_and_the_figure_stays_small() -> None:
    rows = kernel_profile(9, kernels=("native", "fused", "compiled", "flaggems", "native")).rows
    (panel,) = bar_panels(rows, 160).values()
    assert list(panel) == ["bn, fp32, contiguous", "bn+relu, fp32, contiguous"]
    assert sum(map(len, panel.values())) <= MOST_BARS
    panels = bar_panels(hundred_rows().rows, 160)
    assert sum(len(bars) for panel in panels.values() for bars in panel.values()) == 96
    assert sum(row_heights(panels, 3)) < 9


# --- the roofline -------------------------------------------------------------------------------------------------


def test_the_clusters_have_the_definition_s_flop_for_each_byte() -> None:
    found = clusters(resnet().rows)
    assert [cluster.intensity for cluster in found] == pytest.approx([2.6 / 2, 3.0 / 2, 3.2 / 2])
    assert {kernel: len(speeds) for kernel, speeds in found[0].speeds.items()} == {"native": 6, "fused": 6}


def test_the_points_of_the_roofline_fill_its_width() -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    profile = resnet()
    roofline(axes, profile.rows, profile.ceilings, {"native": "#111111", "fused": "#222222"})
    low, high = axes.get_xlim()
    places = [float(line.get_xdata()[0]) for line in axes.lines if line.get_marker() == "o"]
    assert len(places) == 6
    assert max(places) - min(places) > 0.7 * (high - low)
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        "bn+add+relu\nbf16\n1.3 flop/B",
        "bn\nbf16\n1.5 flop/B",
        "bn+relu\nbf16\n1.6 flop/B",
    ]


def test_copies_without_room_for_their_names_are_not_drawn() -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    copies = Ceilings(((2**20, 12.3), (2**24, 12.2), (2**28, 12.1)), None)
    roofline(axes, resnet().rows, copies, {"native": "#111111", "fused": "#222222"})
    lines = [line for line in axes.lines if len(line.get_xdata()) == 2 and line.get_xdata()[0] == 0]
    assert [line.get_ydata()[0] for line in lines] == [12.1]
    assert len(axes.texts) == 1


# --- steps --------------------------------------------------------------------------------------------------------


def test_a_bar_of_the_only_arm_is_named_without_it() -> None:
    found = texts(replace(step_profile(), rows=step_profile().rows[:2]))
    assert {"training, native", "training, fused"} <= found


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "83.1 ms (1.23x vs native)"),
        ({"cores_lacked": 3.0}, "83.1 ms!"),
        ({"faster": Speedup(1.02, Interval(0.97, 1.08))}, "83.1 ms"),
        ({"faster": Speedup(1.23, Interval(1.2, 1.27), of_medians=0.8)}, "83.1 ms"),
    ],
)
def test_a_ratio_is_said_where_nothing_is_marked_and_its_interval_excludes_1(changes: Any, words: str) -> None:
    native, fused, *_ = step_profile().rows
    found = texts(replace(step_profile(), rows=(native, replace(fused, **changes))))
    assert words in found
    assert any("measured while other programs" in text for text in found) == ("!" in words)


# --- widths -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [3.3, pytest.param(6.8, marks=pytest.mark.slow), 11.0])
@pytest.mark.parametrize("profile", [one_case(), resnet(), hundred_rows(), with_errors(), step_profile()])
def test_at_every_width_all_words_are_inside_the_figure(profile: Profile, width: float) -> None:
    figure = laid_out(lambda figure: draw(figure, profile, FigureStyle(width)))
    check_everything_is_inside(figure, width)


def test_without_a_caption_neither_title_nor_machine_is_written() -> None:
    from matplotlib.figure import Figure

    for profile in (one_case(), step_profile()):
        figure = Figure(layout="constrained")
        draw(figure, profile, FigureStyle(3.3, caption=False))
        assert (figure._suptitle, figure._supxlabel) == (None, None)
