"""What all figures share: their kinds of file, their style, and that none is asked for in vain."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bncli.errors import USAGE, FileError
from bncli.report.figure import (
    COLOURS,
    INK,
    MOST_PLACES,
    FigureStyle,
    check_path,
    legend_above,
    line_style,
    rendered,
    thinned,
    write_caption,
)


@pytest.mark.parametrize(("name", "kind"), [("a.svg", "svg"), ("b.PNG", "png"), ("c.pdf", "pdf")])
def test_the_suffix_is_the_kind(name, kind):
    pytest.importorskip("matplotlib")
    assert check_path(Path(name)) == kind


@pytest.mark.parametrize("name", ["curves.eps", "curves", "svg"])
def test_another_suffix_is_refused_with_those_that_there_are(name):
    with pytest.raises(FileError, match=rf"{name}: a plot's file name must end in \.svg, \.png or \.pdf") as refused:
        check_path(Path(name))
    assert refused.value.exit_code == USAGE


def test_without_matplotlib_the_library_is_named_before_any_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for ask in (lambda: check_path(Path("a.svg")), lambda: rendered(lambda figure: None, "svg", 100)):
        with pytest.raises(FileError, match="pip install matplotlib"):
            ask()


def test_a_figure_of_any_result_is_the_same_bytes_each_time():
    pytest.importorskip("matplotlib")

    def draw(figure):
        figure.subplots().plot([1, 2], [3, 4])

    for kind, begins in (("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")):
        assert rendered(draw, kind, 80) == rendered(draw, kind, 80)
        assert rendered(draw, kind, 80).startswith(begins)


PDF = """
import sys
from bncli.report.figure import rendered
draw = lambda figure: figure.subplots().set_title("kernels: ± 3 × 5")
sys.stdout.buffer.write(rendered(draw, "pdf", 80))
"""


def test_a_pdf_is_the_same_bytes_in_every_process_and_holds_its_text_as_true_type() -> None:
    pytest.importorskip("matplotlib")
    first, second = (
        subprocess.run(
            [sys.executable, "-c", PDF], capture_output=True, check=True, env={**os.environ, "PYTHONHASHSEED": seed}
        )
        for seed in ("1", "2")
    )
    assert first.stdout == second.stdout
    assert b"/CreationDate" not in first.stdout
    assert b"/FontFile2" in first.stdout
    assert b"/Type3" not in first.stdout


# --- layout -------------------------------------------------------------------------------------------------------


PROSE = (
    "digits, 1,297 training and 500 held-out examples; 3 seeds at every point of the grid, 10 more at points that may "
    "be the best; budget 3,000 steps. Dot: a run; diamond: geometric mean (median where runs missed) with its interval."
)


def empty_figure(width: float, height: float = 2.0):
    matplotlib_figure = pytest.importorskip("matplotlib.figure")
    return matplotlib_figure.Figure(figsize=(width, height), layout="constrained")


@pytest.mark.parametrize("width", [3.3, 6.8, 11.0])
def test_title_and_notes_fit_the_width_and_the_figure_grows_by_their_height(width: float) -> None:
    figure = empty_figure(width)
    write_caption(figure, FigureStyle(width), "digits: optimizer steps to held-out accuracy 0.95", PROSE, "end")
    figure.draw_without_rendering()
    title, notes = figure._suptitle, figure._supxlabel
    assert title.get_window_extent().x1 <= figure.bbox.x1
    assert 0.75 * figure.bbox.x1 < notes.get_window_extent().x1 <= figure.bbox.x1
    assert figure.get_figheight() > 2 + 0.1 * notes.get_text().count("\n")
    assert notes.get_text().endswith("\nend")


def test_without_a_caption_nothing_is_written() -> None:
    figure = empty_figure(3.3)
    write_caption(figure, FigureStyle(3.3, caption=False), "title", "notes")
    assert (figure._suptitle, figure._supxlabel, figure.get_figheight()) == (None, None, 2)


def test_a_legend_has_as_many_columns_as_fit() -> None:
    from matplotlib.patches import Patch

    names = ["batch norm", "layer norm", "$x^$", "group norm with 4 groups"]
    figures = {width: empty_figure(width) for width in (3.3, 11.0)}
    for figure in figures.values():
        part = legend_above(figure, [Patch(label=name) for name in names])
        figure.draw_without_rendering()
        (legend,) = figure.subfigs[0].legends
        assert legend.get_window_extent().x1 <= figure.bbox.x1
        assert part.bbox.height / figure.dpi == pytest.approx(2)
    assert figures[3.3].get_figheight() > figures[11.0].get_figheight() > 2


def test_one_long_name_does_not_put_all_names_of_a_legend_below_each_other() -> None:
    from matplotlib.patches import Patch

    names = [
        "plain",
        "batch norm",
        "layer norm",
        "rectified linear units instead of sigmoid",
        "weight norm",
        "group norm",
    ]
    figure = empty_figure(6.8)
    legend_above(figure, [Patch(label=name) for name in names])
    figure.draw_without_rendering()
    (legend,) = figure.subfigs[0].legends
    assert legend.get_window_extent().x1 <= figure.bbox.x1
    assert len({round(text.get_window_extent().x0) for text in legend.get_texts()}) >= 2


# --- curves -------------------------------------------------------------------------------------------------------


def test_lines_differ_in_style_as_well_as_in_colour_and_none_has_the_colour_of_text() -> None:
    styles = [str((line_style(index)["color"], line_style(index)["linestyle"])) for index in range(28)]
    assert len(set(styles)) == 28
    assert all(line_style(k)["linestyle"] != line_style(k + 1)["linestyle"] for k in range(7))
    assert INK not in COLOURS


def test_many_evaluations_are_drawn_as_medians_at_evenly_spaced_places_of_a_log_axis() -> None:
    noisy = [(float(step), 1.0 if step % 10 else 0.0) for step in range(1, 15001)]
    found = thinned(noisy)
    assert 100 < len(found) <= MOST_PLACES
    assert found == sorted(found)
    gaps = [math.log(after[0] / before[0]) for before, after in itertools.pairwise(found) if before[0] > 300]
    assert max(gaps) < 1.2 * min(gaps)
    assert {value for step, value in found if step > 300} == {1.0}


def test_few_evaluations_are_drawn_as_they_are() -> None:
    few = [(float(step), 0.1 * step) for step in range(1, MOST_PLACES + 1)]
    assert thinned(few) == few
    assert thinned([]) == []
