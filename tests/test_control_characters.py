"""No control character of a file, a name, an option or a message reaches a terminal, Markdown, CSV or LaTeX.

Every text of every result, recipe and event gets all of them, and none may be in what is shown.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from bncli.cli.console import log, print_error, print_result
from bncli.errors import BncliError, Unavailable, UsageError
from bncli.report import dry_run
from bncli.report import page as pages
from bncli.report.compare import export as compare_export
from bncli.report.compare.table import ComparisonReport
from bncli.report.figure import rendered
from bncli.report.files import to_json
from bncli.report.gradcheck import text as gradcheck_text
from bncli.report.gradcheck.table import GradcheckReport
from bncli.report.profile import baseline, export
from bncli.report.profile.kernels import KernelReport
from bncli.report.profile.steps import StepReport
from bncli.report.table import Visible
from bncli.report.train import run_table
from bncli.results.compare import Note
from bncli.results.serialize import Mismatch, from_plain, to_plain
from bncli.results.train import ProbePoint, RunningStatistics
from tests.cli.conftest import RECIPE, Ran, bncli
from tests.cli.conftest import folder as folder  # a fixture
from tests.report import conftest, made_up_costs
from tests.report.compare.test_claims import RATE, SHIFT
from tests.report.gradcheck.made_up_checks import BAD
from tests.report.test_dry_run import PLANNED
from tests.report.test_progress import KINDS

C0_C1 = [*range(0x20), 0x7F, *range(0x80, 0xA0)]
OTHERS = [0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]  # line separators, changes of direction
ALL = "".join(chr(code) for code in C0_C1 + OTHERS if chr(code) not in "\t\n")
# What rich itself sends to a terminal: styles, moves of the cursor.
OF_RICH = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\r(?=\x1b\[)")
Place = tuple[str, ...]


class Screen(io.StringIO):
    """A terminal or a pipe."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal

    @property
    def leaked(self) -> str:
        """The control characters in what was written."""
        return "".join(sorted(set(OF_RICH.sub("", self.getvalue()) if self.terminal else self.getvalue()) & set(ALL)))


# --- results ------------------------------------------------------------------------------------------------------


def texts(plain: Any, place: Place = ()) -> Iterator[Place]:
    """The places of the texts in plain data, those of a list as one; keys have places too."""
    if isinstance(plain, str):
        yield place
    for key, value in plain.items() if isinstance(plain, dict) else ():
        yield (*place, "key", key)
        yield from texts(value, (*place, key))
    for value in plain if isinstance(plain, list | tuple) else ():
        yield from texts(value, (*place, "*"))


def spoiled(plain: Any, places: set[Place], place: Place = ()) -> Any:
    """The plain data with all control characters behind the texts in those places."""
    if isinstance(plain, str):
        return plain + ALL if place in places else plain
    if isinstance(plain, dict):
        return {
            key + ALL if (*place, "key", key) in places else key: spoiled(value, places, (*place, key))
            for key, value in plain.items()
        }
    return [spoiled(each, places, (*place, "*")) for each in plain] if isinstance(plain, list | tuple) else plain


def free_texts(result: Any) -> set[Place]:
    """The places of texts that may be any: not one of several that a field allows, nor a number that is no float."""
    plain, found = to_plain(result), set()
    for place in dict.fromkeys(texts(plain)):
        with contextlib.suppress(Mismatch):
            from_plain(type(result), spoiled(plain, {place}))
            found.add(place)
    return found


def comparison() -> Any:
    made = conftest.two_arms()
    runs = [replace(each, result=replace(each.result, evaluations=each.result.evaluations[:2])) for each in made.runs]
    failed = replace(made.runs[0], key="failed", result=None, failure="it died")
    facts = {"failure": "it died", "runs": 1, "arms": ["plain"], "run": "lr 1"}
    notes = (
        Note.of("words", words="a sentence"),
        Note.of("failed", **facts),
        Note.of("diverged", "plain", diverged=5, runs=5),
    )
    arms = [replace(each, curve=each.curve[:3]) for each in made.arms]
    arms[0] = replace(arms[0], failures=("seed 1: died",), fixed=("model.hidden",))
    return replace(made, arms=tuple(arms), runs=(*runs[::9], failed), notes=notes, remarks=notes, claims=(RATE, SHIFT))


def run() -> Any:
    points = tuple(ProbePoint("gradients", layer, 10, {"norm": 1.0}) for layer in ("hidden1.linear", "hidden2.linear"))
    diverged = replace(conftest.run_result(None, status="diverged"), probes=points)
    return replace(diverged, running_statistics=(RunningStatistics("hidden1.norm", 0.1, 1.1),))


GATE = made_up_costs.made_gate()
COMMAND = [["bncli", "gradcheck", "--kernel", f"mine:{ALL}"]]
# What is shown -> it, and the forms in which it is shown.
SHOWN: dict[str, tuple[Any, dict[str, Callable[[Any], object]]]] = {
    "comparison": (
        comparison(),
        {
            "table": ComparisonReport,
            "csv": compare_export.to_csv,
            "markdown": compare_export.to_markdown,
            "latex": compare_export.to_latex,
            "json": to_json,
        },
    ),
    "kernel profile": (
        made_up_costs.with_errors(),
        {
            "table": KernelReport,
            "csv": export.to_csv,
            "markdown": lambda found: export.to_markdown(found, GATE),
            "latex": export.to_latex,
            "json": export.to_json,
            "junit": lambda found: baseline.to_junit(found, GATE),
        },
    ),
    "step profile": (
        made_up_costs.step_profile(),
        {
            "table": StepReport,
            "csv": export.to_csv,
            "markdown": export.to_markdown,
            "latex": export.to_latex,
            "json": export.to_json,
        },
    ),
    "gate": (GATE, {"table": baseline.GateReport}),
    "gradcheck": (
        BAD,
        {
            "table": lambda found: GradcheckReport(found, COMMAND * 2),
            "csv": gradcheck_text.to_csv,
            "markdown": lambda found: gradcheck_text.to_markdown(found, COMMAND * 2),
            "latex": gradcheck_text.to_latex,
            "json": lambda found: gradcheck_text.to_json(found, COMMAND * 2),
            "junit": lambda found: gradcheck_text.to_junit(found, COMMAND * 2),
        },
    ),
    "run": (run(), {"table": lambda found: run_table(found, f"digits{ALL}"), "json": to_json}),
    "dry run": (PLANNED, {"table": dry_run.render, "json": dry_run.to_json}),
}


# Names by which something is looked up, which a table of names has and no file.
LOOKED_UP = ("measure", "norm", "metric")


def printed(result: object, terminal: bool) -> Screen:
    screen = Screen(terminal)
    with contextlib.redirect_stdout(screen):
        print_result(result)
    return screen


@pytest.mark.parametrize("what", SHOWN)
def test_no_text_of_a_result_brings_one_into_any_form(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("NO_COLOR", raising=False)
    result, forms = SHOWN[what]
    plain, places = to_plain(result), {each for each in free_texts(result) if "key" not in each[:-1] or "grid" in each}
    places = {each for each in places if each[-1] not in LOOKED_UP and each[-3:-1] != ("facts", "key")}
    changed = from_plain(type(result), spoiled(plain, places))
    for form, make in forms.items():
        for terminal in (True, False):
            screen = printed(make(changed), terminal)
            assert not screen.leaked, (form, terminal)
            assert ("\u241b" in screen.getvalue()) == (form != "json"), form
    if "json" in forms:  # where they are data
        escaped = printed(forms["json"](changed), terminal=False).getvalue()
        assert re.search(r"\\u001b.*\\u009b.*\\u202e", escaped)


def test_rich_writes_its_own_control_sequences_and_no_other() -> None:
    screen = Screen(terminal=True)
    console = Console(file=screen, force_terminal=True, color_system="standard")
    console.print(Visible(Text.assemble(f"a{ALL}b", ("c", "bold"), "\td\ne")))
    assert not screen.leaked
    assert "\x1b[1mc" in screen.getvalue()
    assert "\u2400\u2401" in screen.getvalue()
    assert len(screen.getvalue().splitlines()) == 2


def test_a_page_and_a_figure_have_none_either() -> None:
    found = pages.Page(f"t{ALL}", ALL, [ALL], [pages.Section(ALL, ALL, notes=[ALL])], [conftest.ENVIRONMENT], [ALL])
    assert not set(pages.render(found, ALL, ALL)) & set(ALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rendered(lambda figure: figure.suptitle(f"t{ALL}"), "png", 30)


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252"])
def test_an_encoding_that_lacks_the_visible_ones_gets_others(encoding: str) -> None:
    for result in (f"a{ALL}\ud800b–±", run_table(conftest.run_result(3.0), f"a{ALL}\ud800b")):
        raw = io.BytesIO()
        with contextlib.redirect_stdout(io.TextIOWrapper(raw, encoding=encoding, write_through=True)):
            print_result(result)
            assert not set(raw.getvalue().decode(encoding)) & set(ALL)
            assert b"???" in raw.getvalue()


# --- events -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize(("kind", "events"), KINDS)
def test_no_text_of_an_event_brings_one_into_the_progress(
    kind: type, events: list[Any], terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    screen = Screen(terminal)
    with contextlib.redirect_stderr(screen), kind(clock=iter(range(0, 10**6, 100)).__next__) as sink:
        for event in events:
            places = {each for each in free_texts(event) if each[-1] not in LOOKED_UP}
            sink(from_plain(type(event), spoiled(to_plain(event), places)))
            sink.bars.refresh()
    assert not screen.leaked
    assert "\u241b" in screen.getvalue()


# --- messages, recipes, options -----------------------------------------------------------------------------------

IN_A_NAME = ALL.replace("\0", "")  # of a file or an option, where there can be no zero


def test_no_message_has_one(capsys: pytest.CaptureFixture[str]) -> None:
    for error in (BncliError(ALL), Unavailable(f"CC={ALL}"), UsageError(ALL, ALL, field=f"a{ALL}", value=ALL)):
        print_error(error)
    log(f"Saved in {ALL}")
    shown = capsys.readouterr()
    assert not set(shown.err) & set(ALL)
    assert shown.err.count("\u241b") == 9


def quoted(text: str) -> str:
    """As YAML writes it between quotation marks, where control characters are escaped."""
    return json.dumps(text)


IN_YAML = "\u202a\u202e\u2066"  # that may stand there without quotation marks
CLAIM = "measure: steps_to_target, arm: normed, over: plain, expect: less"
# What is wrong or odd in a recipe -> the recipe.
RECIPES = {
    "key": lambda: f"{quoted('key' + ALL)}: 1\n{RECIPE}",
    "key of a section": lambda: RECIPE.replace("noise: 0.5", f"noise: 0.5, {quoted('noise' + ALL)}: 1"),
    "key twice": lambda: RECIPE + f"{quoted('key' + ALL)}: 1\n" * 2,
    "kind": lambda: RECIPE.replace("kind: mlp", f"kind: {quoted('mlp' + ALL)}"),
    "number": lambda: RECIPE.replace("steps: 60", f"steps: {quoted('60' + ALL)}"),
    "path": lambda: (
        f"data: {{source: npz, path: {quoted('x' + IN_A_NAME)}}}\n" + RECIPE[RECIPE.index("model:"):]
    ),
    "arm": lambda: RECIPE.replace("normed:", f"{quoted('normed' + ALL)}:"),
    "arm's field": lambda: RECIPE.replace("{norm: batch}", f"{{norm: {quoted('batch' + ALL)}}}"),
    "grid": lambda: RECIPE.replace("{optimizer.lr: ", f"{{{quoted('optimizer.lr' + ALL)}: "),
    "grid's value": lambda: RECIPE.replace("[0.1, 0.5]", f"[0.1, {quoted(ALL)}]"),
    "own model": lambda: RECIPE.replace(
        "kind: mlp, hidden: [16], activation: relu", f"kind: module, module: {quoted('a:b' + ALL)}"
    ),
    "claim": lambda: RECIPE + f"claims: [{{say: {quoted('yes' + ALL)}, {CLAIM}}}]\n",
    "raw": lambda: f"a: b{ALL}\n",
    "raw and allowed": lambda: f"a{IN_YAML}: b{IN_YAML}\nmodel: {{kind{IN_YAML}: mlp, hidden: {IN_YAML}}}\n",
    "raw and not YAML": lambda: f"a: b\n c{IN_YAML}: {{",
    "tag": lambda: f"a: !{IN_YAML} 1\n",
    "anchor": lambda: "a: *b\u009bc\n",
}  # fmt: skip


def check_shows_none(ran: Ran, case: str) -> None:
    assert not set(ran.out + ran.err) & set(ALL), case
    assert ran.out + ran.err, case


def test_no_recipe_brings_one_into_an_error_or_a_dry_run(folder: Path) -> None:
    name = f"r{IN_A_NAME.replace('/', '')}.yaml"
    for case, text in RECIPES.items():
        (folder / name).write_text(text(), encoding="utf-8")
        for command in ("train", "compare"):
            ran = bncli(command, name, "--dry-run")
            check_shows_none(ran, case)
            assert ran.code in (0, 2), case
    check_shows_none(bncli("train", name, "--allow-code"), "a file's name")
    check_shows_none(bncli("train", f"missing{name}"), "no file")


def test_no_option_brings_one_into_an_error(folder: Path) -> None:
    odd = f"x{IN_A_NAME}"
    for arguments in (
        [odd], ["train", odd], [f"--{odd}"], ["train", "small.yaml", f"--{odd}"], ["compare", "small.yaml", odd],
        *(["train", "small.yaml", option, odd] for option in ("--set", "--device", "--arm", "--threads", "--plot")),
        ["train", "small.yaml", "--set", f"optimizer.{odd}=1"], ["train", "small.yaml", "--set", f"optimizer.lr={odd}"],
        ["train", "--example", odd], ["compare", "--from", odd], ["compare", "small.yaml", "--html", f"{odd}/a.html"],
        ["compare", "small.yaml", "--jobs", odd], ["profile", odd], ["profile", "--kernel", odd],
        ["profile", "--kernel", f"{odd}:f"], ["profile", "--shapes", odd], ["profile", "--shape", odd],
        ["profile", "--baseline", odd], ["profile", "--model", f"a:{odd}", "--input", odd],
        ["gradcheck", "--norm", odd],
        ["gradcheck", "--kernel", odd], ["gradcheck", "--dtype", odd], ["gradcheck", "--junit", f"{odd}.xml/a.xml"],
    ):  # fmt: skip
        ran = bncli(*arguments)
        check_shows_none(ran, repr(arguments))
        assert ran.code == 2, arguments


def test_no_name_brings_one_into_what_a_run_prints(folder: Path) -> None:
    name = f"r{IN_A_NAME}"
    (folder / f"{name}.yaml").write_text(RECIPE.replace("steps: 60", "steps: 10"), encoding="utf-8")
    ran = bncli("train", f"{name}.yaml", "--out", f"out{IN_A_NAME}")
    check_shows_none(ran, "train")
    assert "Saved in out\u2401" in ran.err
    assert ran.out.startswith("r\u2401")
    assert os.path.exists(f"out{IN_A_NAME}/result.json")
