"""One HTML page that needs nothing else."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser

import pytest

from bncli.errors import FileError
from bncli.report.compare import figure
from bncli.report.compare.page import to_html
from bncli.report.figure import INK, MISSING
from bncli.results.compare import Note

VOID = {"meta", "br", "path", "use", "rect"}


class Page(HTMLParser):
    """Notes text and what would be loaded, and sees to it that every tag is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loaded += [value for name, value in attributes if name in ("src", "href") and not value.startswith("#")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def without_matplotlib(monkeypatch):
    def missing(*_args, **_options):
        raise FileError(MISSING)

    monkeypatch.setattr(figure, "render", missing)


def test_the_page_is_well_formed_and_loads_nothing(example):
    page = Page(to_html(example))
    assert page.open == []
    assert page.loaded == []
    assert "script" not in page.tags


def test_the_page_has_tables_notes_machine_and_picture(examples):
    html = to_html(examples["six arms"])
    words = " ".join(Page(html).words)
    for text in (
        "rectified linear units",
        "12.1x",
        "> 2,308",
        "Tuning runs",
        "worker killed by signal 9",
        "torch 2.13.0",
    ):
        assert text in words
    assert html.count("<svg") == 1
    assert "prefers-color-scheme: dark" in html


def test_the_picture_takes_the_colour_of_the_page_s_text(examples):
    html = to_html(examples["two arms"])
    assert INK not in html
    assert "currentColor" in html


def test_without_matplotlib_the_page_says_what_is_missing(examples, without_matplotlib):
    html = to_html(examples["two arms"])
    assert "<svg" not in html
    assert "bncli[plot]" in html
    assert "12.1x" in html


def test_without_a_grid_the_page_has_no_tuning_runs(examples):
    assert "Tuning" not in to_html(examples["no grid"])


def test_the_page_escapes_names_and_notes(examples, without_matplotlib):
    found = examples["two arms"]
    hostile = replace(found.arms[1], arm="<script>alert(1)</script>")
    plan = replace(found.plan, name="<b>", data="&amp; <i>")
    page = Page(
        to_html(
            replace(found, plan=plan, arms=(found.arms[0], hostile), notes=(Note.of("words", words="<img src=x>"),))
        )
    )
    assert {"script", "img", "b", "i"}.isdisjoint(page.tags)
    assert "<script>alert(1)</script>" in page.words
    assert "<img src=x>" in page.words
