"""The figure: refused before any work where it cannot be made, the same bytes for the same comparison."""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from bncli.errors import USAGE, BncliError
from bncli.report.compare.figure import plot, render

pytest.importorskip("matplotlib")


def test_every_comparison_can_be_drawn_without_a_warning(example):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ElementTree.fromstring(render(example, "svg")).tag.endswith("svg")


def test_the_same_comparison_gives_the_same_bytes(examples):
    for kind in ("svg", "png"):
        assert render(examples["six arms"], kind) == render(examples["six arms"], kind)


def test_the_file_has_no_date(examples):
    assert b"date" not in render(examples["two arms"], "svg").lower().replace(b"dejavu", b"")


def test_a_user_s_own_matplotlib_settings_change_nothing_and_stay_as_they_were(examples):
    import matplotlib

    before = render(examples["two arms"], "svg")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        assert render(examples["two arms"], "svg") == before
        assert matplotlib.rcParams["font.size"] == 30


def test_the_suffix_chooses_the_kind_of_file(examples, tmp_path):
    plot(examples["two arms"], tmp_path / "a.png")
    plot(examples["two arms"], tmp_path / "a.SVG")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "a.SVG").read_bytes().startswith(b"<?xml")


@pytest.mark.parametrize("name", ["curves.pdf", "curves", "svg"])
def test_another_suffix_is_refused_before_anything_is_drawn(examples, tmp_path, name):
    with pytest.raises(BncliError, match=r"\.svg or \.png") as refused:
        plot(examples["two arms"], tmp_path / name)
    assert refused.value.exit_code == USAGE
    assert name in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_extra_is_named(monkeypatch, examples, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BncliError, match=r'pip install "bncli\[plot\]"') as refused:
        render(examples["two arms"], "svg")
    assert refused.value.exit_code == USAGE


def test_nothing_of_the_report_loads_matplotlib_or_torch_until_it_is_needed():
    code = (
        "import sys; from bncli.report import export, files, table, text; "
        "from bncli.report.compare import curves, export, figure, labels, page, table; "
        "print({'matplotlib', 'torch', 'numpy'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"


def svg_words(comparison) -> str:
    """The figure's text, which an SVG of this kind holds as comments beside the outlines of its letters."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    tree = ElementTree.fromstring(render(comparison, "svg"), parser)
    return "\n".join(node.text.strip() for node in tree.iter(ElementTree.Comment))


def test_the_figure_writes_ratio_and_interval_beside_each_arm(examples):
    words = svg_words(examples["six arms"])
    for text in ("12.1x", "9.81–14.9", "&lt; 0.290x", "&gt; 2,308", "median 1,911", "diverged", "reference"):
        assert text in words or text.replace("&lt;", "<").replace("&gt;", ">") in words


def test_few_curves_carry_their_names_and_many_carry_letters(examples):
    two, six = svg_words(examples["two arms"]).split("\n"), svg_words(examples["six arms"]).split("\n")
    assert two.count("batch norm") == 2  # beside its curve and beside its row
    assert all(letter in six for letter in "abcdef")
    assert "b  batch norm" in six


def test_the_key_explains_the_marks_that_occur_and_no_other(examples):
    two, six = svg_words(examples["two arms"]), svg_words(examples["six arms"])
    assert "Cross:" not in two
    assert "triangle" not in two
    assert "Cross:" in six
    assert "triangle" in six


def test_dollar_signs_in_names_are_text_and_no_formula(examples):
    found = examples["two arms"]
    odd = replace(found, plan=replace(found.plan, name="a $x^$ b", data="$\\frac"))
    assert "a $x^$ b: optimizer steps" in svg_words(odd)


def test_an_arm_at_the_target_from_the_start_is_drawn_too(examples):
    found = examples["two arms"]
    runs = [replace(run, result=replace(run.result, steps_to_target=0.0)) for run in found.runs]
    arm = replace(found.arms[1], steps=replace(found.arms[1].steps, value=0.0))
    assert render(replace(found, runs=tuple(runs), arms=(found.arms[0], arm)), "png").startswith(b"\x89PNG")


def test_several_targets_add_the_ratio_by_target(examples):
    words = svg_words(examples["two arms"]).split("\n")
    assert "fewer steps, by target" in words
    assert "target: held-out accuracy" in words
    assert "fewer steps, by target" not in svg_words(examples["six arms"]).split("\n")
