"""The figure of a comparison: what is drawn, and the same bytes for the same comparison."""

from __future__ import annotations

import itertools
import subprocess
import sys
import warnings
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from bncli.errors import USAGE, BncliError
from bncli.report.compare.figure import draw
from bncli.report.figure import THINNED, FigureStyle, rendered, save
from bncli.results.compare import Comparison
from tests.report.conftest import check_everything_is_inside, laid_out, seven_arms

pytest.importorskip("matplotlib")


def render(comparison: Comparison, kind: str) -> bytes:
    return rendered(lambda figure: draw(figure, comparison), kind)


def words(comparison: Comparison) -> list[str]:
    """Every text on the figure, which is drawn and not saved."""
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    figure = Figure()
    draw(figure, comparison)
    return [text.get_text() for text in figure.findobj(Text)]


def test_every_comparison_can_be_drawn_without_a_warning(example):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = render(example, "svg")
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert b"date" not in svg.lower().replace(b"dejavu", b"")


def test_matplotlib_settings_of_the_user_have_no_effect(examples):
    import matplotlib

    before = render(examples["two arms"], "svg")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        assert render(examples["two arms"], "svg") == before
        assert matplotlib.rcParams["font.size"] == 30


def test_the_suffix_chooses_the_kind_of_file(examples, tmp_path):
    save(draw, examples["no runs yet"], tmp_path / "a.png")
    save(draw, examples["no runs yet"], tmp_path / "a.SVG")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "a.SVG").read_bytes().startswith(b"<?xml")


@pytest.mark.parametrize("name", ["curves.eps", "curves", "svg"])
def test_another_suffix_is_refused_before_anything_is_drawn(examples, tmp_path, name):
    with pytest.raises(BncliError, match=r"\.svg, \.png or \.pdf") as refused:
        save(draw, examples["two arms"], tmp_path / name)
    assert refused.value.exit_code == USAGE
    assert name in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_library_is_named(monkeypatch, examples):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BncliError, match="pip install matplotlib") as refused:
        render(examples["two arms"], "svg")
    assert refused.value.exit_code == USAGE


def test_importing_the_report_loads_no_matplotlib_and_no_torch():
    code = (
        "import sys; from bncli.report import export, files, table, text; "
        "from bncli.report.compare import curves, export, figure, table; "
        "print({'matplotlib', 'torch', 'numpy'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"


def test_steps_ratio_and_interval_stand_beside_each_arm(examples):
    shown = "\n".join(words(examples["six arms"])).split("\n")
    for text in ("12.1x fewer", "9.81–14.9", "> 3.45x more", "> 2,308", "median 1,911", "diverged", "reference"):
        assert text in shown


def test_every_curve_and_every_name_has_its_arm_s_letter(examples):
    six = words(examples["six arms"])
    assert [six.count(letter) for letter in "abcdef"] == [1] * 6
    assert "b  batch norm" in six


def test_letters_on_curves_do_not_cover_each_other(examples):
    from matplotlib.figure import Figure

    found = examples["two arms"]
    same = replace(found, arms=(found.arms[0], replace(found.arms[1], curve=found.arms[0].curve)))
    figure = Figure()
    draw(figure, same)
    places = {text.get_text(): text.get_position() for text in figure.axes[0].texts}
    assert abs(places["a"][0] - places["b"][0]) + abs(places["a"][1] - places["b"][1]) > 0.1


def test_the_key_explains_the_marks_that_occur_and_no_other(examples):
    two, six = ("\n".join(words(examples[name])) for name in ("two arms", "six arms"))
    assert "Cross:" not in two
    assert "triangle" not in two
    assert "Cross:" in six
    assert "triangle" in six


def test_dollar_signs_in_names_are_text_and_no_formula(examples):
    found = examples["two arms"]
    arm = replace(found.arms[1], arm="$x^$")
    odd = replace(found, plan=replace(found.plan, name="a $x^$ b", data="$\\frac"), arms=(found.arms[0], arm))
    assert render(odd, "svg").count(b"a $x^$ b: optimizer steps") == 1


def test_an_arm_at_the_target_from_the_start_is_drawn_too(examples):
    found = examples["two arms"]
    runs = [replace(run, result=replace(run.result, steps_to_target=0.0)) for run in found.runs]
    arm = replace(found.arms[1], steps=replace(found.arms[1].steps, value=0.0))
    assert render(replace(found, runs=tuple(runs), arms=(found.arms[0], arm)), "png").startswith(b"\x89PNG")


def test_several_targets_add_the_ratio_by_target(examples):
    two = words(examples["two arms"])
    assert "times fewer steps, by target" in two
    assert "target: held-out accuracy" in two
    assert "times fewer steps, by target" not in words(examples["six arms"])


# --- widths -------------------------------------------------------------------------------------------------------


def drawn(comparison: Comparison, style: FigureStyle):
    return laid_out(lambda figure: draw(figure, comparison, style))


@pytest.mark.parametrize("width", [3.3, pytest.param(5.0, marks=pytest.mark.slow), 6.8, 11.0])
@pytest.mark.parametrize("name", ["two arms", "six arms", "seven arms", "no runs yet"])
def test_at_every_width_all_words_are_readable_and_inside_the_figure(examples, name, width):
    figure = drawn(seven_arms() if name == "seven arms" else examples[name], FigureStyle(width))
    check_everything_is_inside(figure, width)
    runs = figure.axes[1]
    places = [text.get_window_extent() for text in runs.texts if text.get_text() and width < 9]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(places, 2))


def test_panels_stand_below_each_other_in_a_column_and_beside_each_other_on_a_page(examples):
    for width, beside in ((3.3, False), (6.8, True)):
        left, right = drawn(examples["two arms"], FigureStyle(width)).axes[:2]
        assert (left.get_position().x1 < right.get_position().x0) == beside
        assert (left.get_position().y0 > right.get_position().y1) != beside


def test_without_a_caption_there_is_no_title_and_the_figure_is_lower(examples):
    with_one, without = (drawn(examples["two arms"], FigureStyle(3.3, caption)) for caption in (True, False))
    assert (without._suptitle, without._supxlabel) == (None, None)
    assert without.get_figheight() < with_one.get_figheight() - 0.5


def test_hundreds_of_evaluations_are_thinned_and_the_caption_says_so(examples):
    many = seven_arms()
    assert max(len(arm.curve) for arm in many.arms) > 1000
    figure = drawn(many, FigureStyle())
    curves = [line for line in figure.axes[0].lines if len(line.get_xdata()) > 2]
    assert len(curves) == 7
    assert all(len(line.get_xdata()) <= 150 for line in curves)
    assert THINNED in figure._supxlabel.get_text().replace("\n", " ")
    assert THINNED not in " ".join(words(examples["two arms"])).replace("\n", " ")


@pytest.mark.parametrize("width", [3.3, 6.8])
def test_no_line_of_the_grid_runs_through_the_words_above_runs(examples, width):
    runs = drawn(examples["six arms"], FigureStyle(width)).axes[1]
    words = [text for text in runs.texts if not text.get_text().endswith("×")]  # which stand beside a mark
    assert len(words) == 12
    assert all(text.get_bbox_patch().get_facecolor() == (1, 1, 1, 1) for text in words)


def test_runs_that_missed_are_one_mark_with_their_number(examples):
    runs = drawn(examples["six arms"], FigureStyle()).axes[1]
    assert {text.get_text() for text in runs.texts if text.get_text().endswith("×")} == {"3×", "4×", "5×"}
