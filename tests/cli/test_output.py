from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from bncli.cli.output import Output, chosen_form
from bncli.errors import FileError, UsageError
from bncli.report.figure import FigureStyle

FORMS = ("json", "csv", "markdown", "latex")


def test_a_result_is_printed_in_one_form() -> None:
    assert chosen_form(json=False, csv=False) == "table"
    assert [chosen_form(**{form: form == each for form in FORMS}) for each in FORMS] == list(FORMS)
    for two in itertools.combinations(FORMS, 2):
        with pytest.raises(UsageError, match="--json, --csv, --markdown and --latex: choose one"):
            chosen_form(**{form: form in two for form in FORMS})


def test_what_could_not_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    for output in (Output(plot=missing / "a.svg"), Output(html=missing / "a.html")):
        with pytest.raises(FileError, match="does not exist"):
            output.check()
    with pytest.raises(FileError, match="does not exist"):
        Output().check(None, missing / "trace.json")


@pytest.mark.parametrize("style", [FigureStyle(3.3), FigureStyle(caption=False)])
def test_a_style_without_a_plot_is_refused(style: FigureStyle, tmp_path: Path) -> None:
    option = "--no-caption" if style.width_inches is None else "--plot-width"
    with pytest.raises(UsageError, match=f"^{option}: without --plot FILE nothing is drawn"):
        Output(style=style).check()
    Output(plot=tmp_path / "a.pdf", style=style).check()


def test_files_are_written_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot, page = tmp_path / "a.svg", tmp_path / "a.html"
    output = Output("json", plot, page)
    output.show("result", {"json": str.upper})
    output.write("result", lambda _, path, style: [path, tmp_path / "b.svg"], lambda result: f"<p>{result}</p>")
    assert page.read_text() == "<p>result</p>"
    out, err = capsys.readouterr()
    assert out == "RESULT\n"
    assert err.splitlines() == [
        f"Plot written to {plot}",
        f"Plot written to {tmp_path / 'b.svg'}",
        f"Report written to {page}",
    ]
