from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from bncli.cli.output import FORMS, Output
from bncli.errors import FileError, UsageError
from bncli.report.figure import FigureStyle


def asked(**options: Any) -> Output:
    context = Mock(params={"quiet": False, **options})
    return Output.of(context)


def test_a_result_is_printed_in_one_form() -> None:
    assert asked(json=False).form == "table"
    assert [asked(**{form: form == each for form in FORMS}).form for each in FORMS] == list(FORMS)
    for two in itertools.combinations(FORMS, 2):
        with pytest.raises(UsageError, match="--json, --csv, --markdown and --latex: choose one"):
            asked(**{form: form in two for form in FORMS})


def test_files_and_style_are_those_of_the_options() -> None:
    assert asked(plot="a.svg", html=None, plot_width=3.3, no_caption=True) == Output(
        plot=Path("a.svg"), style=FigureStyle(3.3, caption=False)
    )


def test_what_could_not_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    for output in (Output(plot=missing / "a.svg"), Output(html=missing / "a.html"), Output(junit=missing / "a.xml")):
        with pytest.raises(FileError, match="does not exist"):
            output.check()
    with pytest.raises(FileError, match="does not exist"):
        Output().check(None, missing / "trace.json")


def test_a_wrong_suffix_is_refused_before_any_work(tmp_path: Path) -> None:
    for output, suffix in ((Output(html=tmp_path / "a.pdf"), "html"), (Output(junit=tmp_path / "a.json"), "xml")):
        with pytest.raises(UsageError, match=rf"must end in \.{suffix}"):
            output.check()


@pytest.mark.parametrize("style", [FigureStyle(3.3), FigureStyle(caption=False)])
def test_a_style_without_a_plot_is_refused(style: FigureStyle, tmp_path: Path) -> None:
    option = "--no-caption" if style.width_inches is None else "--plot-width"
    with pytest.raises(UsageError, match=f"^{option}: without --plot FILE nothing is drawn"):
        Output(style=style).check()
    Output(plot=tmp_path / "a.pdf", style=style).check()


def test_files_are_written_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot, page, report = (tmp_path / f"a.{ending}" for ending in ("svg", "html", "xml"))
    output = Output("json", plot, page, junit=report)
    output.show("result", {"json": str.upper})
    figures = {ending: lambda figure, found, style: figure.text(0, 0, found) for ending in ("", "-layers")}
    output.write("result", figures, lambda result: f"<p>{result}</p>", "<{}/>".format)
    assert "<!-- result -->" in (tmp_path / "a-layers.svg").read_text()
    assert report.read_text() == "<result/>"
    assert page.read_text() == "<p>result</p>"
    out, err = capsys.readouterr()
    assert out == "RESULT\n"
    assert err.splitlines() == [
        f"Plot written to {plot}",
        f"Plot written to {tmp_path / 'a-layers.svg'}",
        f"Report written to {page}",
        f"Report written to {report}",
    ]
