"""Pages of made-up results of every command: what they hold, and how they look in a real browser without a window."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bncli.report import figure
from bncli.report.compare import page as of_comparison
from bncli.report.gradcheck import page as of_gradcheck
from bncli.report.page import WIDEST, blocks, inline
from bncli.report.profile import page as of_profile
from bncli.report.table import AlignedTable
from bncli.report.text import Column
from bncli.results.compare import Comparison, Note, Ratio
from bncli.results.environment import Interval
from bncli.results.profile import Speedup
from tests.report import conftest, made_up_costs
from tests.report.compare.test_claims import RATE, SHIFT
from tests.report.gradcheck.made_up_checks import BAD, GOOD
from tests.report.test_layers import points, probed

COMMAND = "bncli compare 'my recipe.yaml' --html page.html"
ORIGIN = COMMAND, "data: {source: digits}\nmodel: {kind: mlp}\n"
COMMANDS = [["bncli", "gradcheck", "--kernel", BAD.kernel, "--only", failure.case] for failure in BAD.failures]


def seven_arms() -> Comparison:
    """Long names, three fields in the grid, three targets, claims, probes: as wide as a comparison gets."""
    found = conftest.six_arms()
    values = {"optimizer.lr": 0.3, "optimizer.momentum": 0.9, "optimizer.weight_decay": 0.0005}
    last = replace(
        found.arms[1],
        arm="a_name_of_48_characters_without_any_space_in_it_",
        ratio=Ratio(0.075, Interval(0.0612, 0.0915), "means", 1e-9, 2e-9),
    )
    runs = conftest.report_runs(last.arm, conftest.spread(9_000), 2_000)
    arms = tuple(
        replace(arm, point=values, also=conftest.two_arms().arms[bool(place)].also)
        for place, arm in enumerate((*found.arms, last))
    )
    plan = replace(
        found.plan,
        arms=tuple(arm.arm for arm in arms),
        grid={field: (value, 2 * value) for field, value in values.items()},
        also=conftest.two_arms().plan.also,
    )
    claims = (replace(RATE, arm=arms[6].arm, over="plain"), replace(SHIFT, over="plain"))
    made = replace(found, plan=plan, arms=arms, runs=(*found.runs, *runs), claims=claims)
    return probed(made, points(("inputs", "gradients")))


PAGES: dict[str, Callable[[], str]] = {
    "two arms": lambda: of_comparison.to_html(conftest.two_arms(), *ORIGIN),
    "seven arms": lambda: of_comparison.to_html(seven_arms(), *ORIGIN),
    "kernels": lambda: of_profile.to_html(made_up_costs.resnet(), None, *ORIGIN),
    "kernels beside a baseline": lambda: of_profile.to_html(
        made_up_costs.with_errors(), made_up_costs.made_gate(), *ORIGIN
    ),
    "steps": lambda: of_profile.to_html(made_up_costs.step_profile(), None, *ORIGIN),
    "gradients that pass": lambda: of_gradcheck.to_html(GOOD, [], COMMAND),
    "gradients that fail": lambda: of_gradcheck.to_html(BAD, COMMANDS, COMMAND),
}
MADE: dict[str, str] = {}


def made(name: str) -> str:
    """A page, made once for all tests."""
    if name not in MADE:
        MADE[name] = PAGES[name]()
    return MADE[name]


# --- the text of a page -------------------------------------------------------------------------------------------

VOID = {"meta", "br", "path", "use", "rect", "line"}


class Page(HTMLParser):
    """Tags, words and attributes of a page; sees to it that every tag is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def values(self, *names: str) -> list[str]:
        return [value or "" for name, value in self.attributes if name in names]

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_well_formed_and_loads_nothing(name: str) -> None:
    page = Page(made(name))
    assert {"script", "link", "iframe", "img"}.isdisjoint(page.tags)
    assert all(value.startswith("#") for value in page.values("src", "href", "xlink:href"))
    assert not re.search(r"url\((?!#)|@import", made(name))
    identifiers = page.values("id")
    assert len(identifiers) == len(set(identifiers))


def test_a_result_gives_the_same_page_each_time() -> None:
    assert PAGES["two arms"]() == made("two arms")


@pytest.mark.parametrize("name", PAGES)
def test_a_page_says_how_it_was_made(name: str) -> None:
    text = Page(made(name)).text
    assert COMMAND in text
    assert ("data: {source: digits} model: {kind: mlp}" in text) == (not name.startswith("gradients"))
    assert "cpu (Example CPU <4 GHz>, Linux x86_64)" in text
    assert "torch 2.13.0, Python 3.12.1, bncli 0.1.0; 2026-01-02" in text


@pytest.mark.parametrize("name", PAGES)
def test_a_page_can_be_read_aloud(name: str) -> None:
    page = Page(made(name))
    assert '<html lang="en">' in made(name)
    levels = [int(tag[1]) for tag in page.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert set(levels[1:]) == {2}
    assert page.tags.count("table") == page.tags.count("caption")
    assert {"col", "row"} <= set(page.values("scope"))
    figures = re.findall(r"<svg[^>]*>", made(name))
    assert all('role="img" aria-label="Figure: ' in each for each in figures)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("two arms", "To held-out accuracy 0.95, batch norm needed 12.1 times fewer steps than plain"),
        ("two arms", "batch norm 0.3 10/10 67.2 60.5–74.0 12.1x fewer 9.81–14.9"),
        ("two arms", "Further columns: first hit, p (Holm), ms/step, parameters"),
        ("two arms", "Tuning runs"),
        ("seven arms", "Warnings 52 of 56 runs are done, 1 failed"),
        ("seven arms", "Claims"),
        ("seven arms", "Inside the layers"),
        ("kernels", "fused is 2.31 times faster than native (2.24–2.38), geometric mean over shapes, for 6 kinds of"),
        ("kernels", "Measured ceilings: copy 11.9 GB/s"),
        ("kernels beside a baseline", "2 ok, 1 regressed, 1 cannot tell: FAILED"),
        ("kernels beside a baseline", "mine:norm is wrong: dx is wrong"),
        ("kernels beside a baseline", "Not in the baseline: bn fp32 contiguous, 60x100, fused"),
        ("steps", "batch norm: a training step takes 83.1 ms with fused, 1.23 times faster than native (1.20–1.27)."),
        ("steps", "Memory of a training step"),
        ("steps", "Norm layers: what to change batch norm, stem.norm: momentum 0.9"),
        ("steps", "ran out of memory"),
        ("gradients that pass", "All 174 cases passed; 1 group not checked."),
        ("gradients that pass", "channels_last_3d in half precision: Metal has no float64"),
        ("gradients that pass", "How tolerances are derived"),
        ("gradients that fail", "64 of 168 cases FAILED. It looks like: statistics treated as constants."),
        ("gradients that fail", f"bncli gradcheck --kernel {BAD.kernel} --only train-float64-4x3-double"),
        ("gradients that fail", "dL/dx in its three parts"),
    ],
)
def test_a_page_has_the_answer_and_what_it_rests_on(name: str, found: str) -> None:
    assert found in Page(made(name)).text


def test_what_was_not_checked_stands_behind_the_groups_and_before_the_parts_of_the_gradient() -> None:
    text = Page(made("gradients that pass")).text
    assert text.index("Groups of cases") < text.index("Not checked") < text.index("dL/dx in its three parts")


@pytest.mark.usefixtures("no_matplotlib")
def test_several_means_of_a_kernel_are_one_sentence_from_the_slowest_to_the_fastest() -> None:
    found = made_up_costs.resnet()
    slowest = replace(found.means[0], faster=Speedup(1.96, Interval(0.188, 3.2)), cores_lacked=0.5)
    page = Page(of_profile.to_html(replace(found, means=(slowest, *found.means[1:])), None, *ORIGIN))
    assert (
        "fused is between not distinguishable from native (1.96x!, 0.188–3.20) and 2.31 times faster than native "
        "(2.24–2.38), geometric mean over shapes, for 6 kinds of operation, dtype and layout."
    ) in page.text


@pytest.fixture
def no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def test_names_and_notes_are_escaped(no_matplotlib: None) -> None:
    found = conftest.two_arms()
    hostile = replace(found.arms[1], arm="<script>alert(1)</script>")
    plan = replace(found.plan, name="<b>", data="&amp; <i>")
    changed = replace(found, plan=plan, arms=(found.arms[0], hostile), notes=(Note.of("words", words="<img src=x>"),))
    page = Page(of_comparison.to_html(changed, "bncli '<u>'", "<s>"))
    assert {"script", "img", "b", "i", "u", "s"}.isdisjoint(page.tags)
    for words in ("<script>alert(1)</script>", "<img src=x>", "bncli '<u>'"):
        assert words in page.text


def test_without_matplotlib_a_page_says_what_is_missing(no_matplotlib: None) -> None:
    page = of_comparison.to_html(conftest.two_arms(), *ORIGIN)
    assert "<svg" not in page
    assert "No figure: plots need matplotlib, which is not installed; install it with: pip install matplotlib" in (
        Page(page).text
    )


def test_sections_without_content_are_left_out(no_matplotlib: None) -> None:
    page = Page(of_comparison.to_html(conftest.no_grid(), "bncli compare x.yaml", ""))
    for heading in ("Tuning runs", "Claims", "Warnings", "The recipe", "Inside the layers"):
        assert heading not in page.text


def test_a_figure_takes_the_colours_of_the_page_and_identifiers_of_its_own() -> None:
    pytest.importorskip("matplotlib")
    svg = figure.rendered(lambda picture: picture.text(0.5, 0.5, "words"), "svg", 100, for_page=True)
    first, second = (inline(svg, 'a "figure"', name) for name in ("f1", "f2"))
    assert figure.INK not in first
    assert "currentColor" in first
    assert ">words</text>" in first
    assert 'aria-label="a &#34;figure&#34;"' in first
    assert not {*re.findall(r'id="([^"]*)', first)} & {*re.findall(r'id="([^"]*)', second)}


def test_the_template_has_the_colours_of_the_figures() -> None:
    for place, colour in enumerate(figure.COLOURS):
        assert f"--c{place}: {colour.lower()};" in made("gradients that pass")


def column(name: str, width: int = 5, **changes: Any) -> Column:
    return Column(name, ["x" * width], **changes)


def test_columns_that_do_not_fit_are_in_further_tables_behind_the_names() -> None:
    names = [column("shape", words=True), column("kernel", words=True)]
    optional = [column("o1", optional=True), column("o2", optional=True)]
    found = [
        [each.name for each in block] for block in blocks(AlignedTable([*names, optional[0], column("a"), optional[1]]))
    ]
    assert found == [["shape", "kernel", "a"], ["shape", "kernel", "o1", "o2"]]
    assert len(list(blocks(AlignedTable([*names, *optional])))) == 1  # where there are no others
    wide = [column(f"c{place}", WIDEST // 3) for place in range(5)]
    assert [len(block) for block in blocks(AlignedTable([names[0], *wide]))] == [3, 3, 2]


# --- a page in a browser ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window; it may not load anything of its own."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    quiet = ("background-networking", "component-update", "sync", "gpu")
    switches = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in quiet)]
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=chromium, args=switches)
        yield started
        started.close()


@dataclass
class Opened:
    """A page in a tab, what it has asked for, and what it has complained of."""

    tab: Any
    requests: list[str]
    messages: list[str]

    def ask(self, script: str, *argument: float) -> Any:
        return self.tab.evaluate(script, *argument)

    def resize(self, width: int) -> None:
        self.tab.set_viewport_size({"width": width, "height": 844})


@pytest.fixture(scope="module")
def opened(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Opened]:
    """Loads a page anew, in the one tab of all tests, at a width and in light or dark."""
    folder = tmp_path_factory.mktemp("pages")
    page = Opened(browser.new_page(), [], [])
    page.tab.on("request", lambda request: page.requests.append(request.url))
    page.tab.on("console", lambda message: page.messages.append(message.text))
    page.tab.on("pageerror", lambda error: page.messages.append(str(error)))

    def open_page(name: str, width: int, scheme: str = "light") -> Opened:
        file = folder / f"{name}.html"
        file.write_text(made(name), encoding="utf-8")
        page.resize(width)
        page.tab.emulate_media(media="screen", color_scheme=scheme)
        page.requests.clear()
        page.messages.clear()
        page.tab.goto(file.as_uri())
        return page

    return open_page


# Words of the cells, headings and notes that reach beyond the width, where they are displayed at all.
BEYOND = """slack => [...document.querySelectorAll('h1, h2, p, li, th, td, small, pre, figure > div, svg text')]
    .filter(each => each.checkVisibility({contentVisibilityAuto: true}))
    .filter(each => {
        const box = each.getBoundingClientRect();
        return box.width > 1 && (box.left < -slack || box.right > document.documentElement.clientWidth + slack);
    }).map(each => each.textContent.trim())"""
WIDTHS = (390, 768, 1280)


@pytest.mark.browser
@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_off_screen_and_nothing_is_loaded(name: str, opened: Callable[..., Opened]) -> None:
    page = opened(name, WIDTHS[0])
    for unfolded in ("false", "true"):
        page.ask(f"document.querySelectorAll('details').forEach(each => each.open = {unfolded})")
        for width in WIDTHS:
            page.resize(width)
            assert page.ask("innerWidth") == width
            assert page.ask("document.documentElement.scrollWidth <= innerWidth"), width
            assert page.ask(BEYOND, 1) == [], width
    assert len(page.requests) == 1  # the file itself
    assert page.messages == []


@pytest.mark.browser
def test_the_card_of_an_arm_on_a_phone_begins_with_its_ratio_and_its_steps(opened: Callable[..., Opened]) -> None:
    places = """[...document.querySelector('tbody tr').children].map(cell => [
        cell.getBoundingClientRect().y, cell.getBoundingClientRect().x, cell.dataset.name ?? 'arm'
    ])"""
    names = [name for *_, name in sorted(opened("seven arms", 390).ask(places))]
    assert names[:4] == ["arm", "steps vs reference", "steps to target", "lr"]


# The least size in pixels of the words of the figures that are displayed, and how many figures that are.
FIGURES = """() => [...document.querySelectorAll('svg')].filter(svg => svg.checkVisibility()).map(svg =>
    Math.min(...[...svg.querySelectorAll('text')].map(text => parseFloat(getComputedStyle(text).fontSize))) *
    svg.getBoundingClientRect().width / svg.viewBox.baseVal.width)"""


@pytest.mark.browser
@pytest.mark.parametrize("name", ["seven arms", "kernels", "steps"])
def test_the_words_of_a_figure_can_be_read(name: str, opened: Callable[..., Opened]) -> None:
    pytest.importorskip("matplotlib")
    page = opened(name, WIDTHS[0])
    for width in WIDTHS:
        page.resize(width)
        sizes = page.ask(FIGURES)
        assert len(sizes) == made(name).count("<figure>"), width
        assert min(sizes) >= 7.5, width


# Words with too little contrast to what is behind them (WCAG 2: 4.5): their text, colour and background.
PALE = """() => {
    const channels = colour => colour.match(/[\\d.]+/g).map(Number);
    const light = colour => {
        const [r, g, b] = channels(colour).slice(0, 3).map(c => c / 255)
            .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = each => {
        for (; each; each = each.parentElement) {
            const colour = getComputedStyle(each).backgroundColor;
            if ((channels(colour)[3] ?? 1) > 0) return colour;
        }
    };
    document.querySelectorAll('details').forEach(each => each.open = true);
    const own = each => [...each.childNodes].some(node => node.nodeType == 3 && node.textContent.trim());
    return [...document.body.querySelectorAll('*')].filter(own).filter(each => each.checkVisibility()).map(each => {
        const front = getComputedStyle(each)[each.closest('svg') ? 'fill' : 'color'];
        const [a, b] = [light(front), light(behind(each))].sort((x, y) => y - x);
        return [(a + 0.05) / (b + 0.05), each.textContent, front, behind(each)];
    }).filter(([contrast]) => contrast < 4.5);
}"""


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_all_words_stand_out_in_light_and_dark(name: str, scheme: str, opened: Callable[..., Opened]) -> None:
    page = opened(name, 1280, scheme)
    assert page.ask(PALE) == []
    dark = page.ask("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")


A4_WIDTH, MARGIN = 703, 20  # pixels between the margins of A4, and less than half of a margin


@pytest.mark.browser
@pytest.mark.parametrize("name", PAGES)
def test_print_shows_everything_and_cuts_nothing(name: str, opened: Callable[..., Opened], tmp_path: Path) -> None:
    page = opened(name, A4_WIDTH, "dark")
    page.tab.emulate_media(media="print")
    assert page.ask(BEYOND, MARGIN) == []
    hidden = "[...document.querySelectorAll('details td')].filter(each => !each.getBoundingClientRect().height).length"
    assert page.ask(hidden) == 0
    assert page.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    pdf = page.tab.pdf(prefer_css_page_size=True)
    assert pdf.startswith(b"%PDF")
    if shutil.which("pdftotext") is None:
        pytest.skip("needs pdftotext: apt-get install poppler-utils")
    (tmp_path / "page.pdf").write_bytes(pdf)
    text = subprocess.run(
        ["pdftotext", "-layout", tmp_path / "page.pdf", "-"], capture_output=True, text=True, check=True
    )
    printed = re.sub(r"\s", "", text.stdout)
    for cell in page.ask(
        "[...document.querySelectorAll('tr')].map(row => row.lastElementChild.firstChild.textContent)"
    ):
        assert not missing_words(cell, printed)


@pytest.mark.browser
def test_the_first_failures_begin_on_the_first_printed_page_and_are_broken_between_rows(
    browser: Any, tmp_path: Path
) -> None:
    if shutil.which("pdftotext") is None:
        pytest.skip("needs pdftotext: apt-get install poppler-utils")
    cases = [f"train/float32/channels_last/4x3x5x{place}/plain/running_mean" for place in range(18)]
    many = replace(BAD, failures=tuple(replace(BAD.failures[0], case=case) for case in cases))
    (tmp_path / "many.html").write_text(of_gradcheck.to_html(many, [["bncli", case] for case in cases], COMMAND))
    tab = browser.new_page()
    tab.goto((tmp_path / "many.html").as_uri())
    (tmp_path / "many.pdf").write_bytes(tab.pdf(prefer_css_page_size=True))
    tab.close()
    printed = ["pdftotext", "-l", "1", tmp_path / "many.pdf", "-"]
    first = subprocess.run(printed, capture_output=True, text=True, check=True).stdout
    assert "run it again" in first
    assert cases[0] in first  # in the command, whose words are whole


def missing_words(cell: str, printed: str) -> list[str]:
    """Words of a cell that a print lacks; they may stand in several lines."""
    return [word for word in cell.split() if word not in printed]
