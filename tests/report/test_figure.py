"""What all figures share: their kinds of file, their style, and that none is asked for in vain."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bncli.errors import USAGE, FileError
from bncli.report.figure import check_path, rendered


@pytest.mark.parametrize(("name", "kind"), [("a.svg", "svg"), ("b.PNG", "png"), ("c.pdf", "pdf")])
def test_the_suffix_is_the_kind(name, kind):
    pytest.importorskip("matplotlib")
    assert check_path(Path(name)) == kind


@pytest.mark.parametrize("name", ["curves.eps", "curves", "svg"])
def test_another_suffix_is_refused_with_those_that_there_are(name):
    with pytest.raises(FileError, match=rf"{name}: a plot's file name must end in \.svg, \.png or \.pdf") as refused:
        check_path(Path(name))
    assert refused.value.exit_code == USAGE


def test_without_matplotlib_the_extra_is_named_before_any_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for ask in (lambda: check_path(Path("a.svg")), lambda: rendered(lambda figure: None, "svg", 100)):
        with pytest.raises(FileError, match=r'pip install "bncli\[plot\]"'):
            ask()


def test_a_figure_of_any_result_is_the_same_bytes_each_time():
    pytest.importorskip("matplotlib")

    def draw(figure):
        figure.subplots().plot([1, 2], [3, 4])

    for kind, begins in (("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")):
        assert rendered(draw, kind, 80) == rendered(draw, kind, 80)
        assert rendered(draw, kind, 80).startswith(begins)
