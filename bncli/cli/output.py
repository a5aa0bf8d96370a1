"""Where a command's result goes: printed in one form, and written to the files that the options name."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from bncli.cli.console import log, print_result
from bncli.errors import UsageError

if TYPE_CHECKING:
    from bncli.report.figure import FigureStyle

FORMS = ("json", "csv", "markdown", "latex")


@dataclass(frozen=True)
class Output:
    """What the options of a command ask for.

    form: how the result is printed: table or one of FORMS. plot, html, junit: files to be written beside it. style: how
    the plot is laid out; None for its own style.
    """

    form: str = "table"
    plot: Path | None = None
    html: Path | None = None
    quiet: bool = False
    style: FigureStyle | None = None
    junit: Path | None = None

    @classmethod
    def of(cls, context: typer.Context) -> Output:
        """The options of the command that runs, of which it need not have all. Raises UsageError for two forms."""
        from bncli.report.figure import FigureStyle

        asked = context.params
        chosen = [form for form in FORMS if asked.get(form)]
        if len(chosen) > 1:
            *first, last = [f"--{form}" for form in FORMS if form in asked]
            raise UsageError(f"{', '.join(first)} and {last}: choose one, the result is printed once")
        files = {name: Path(asked[name]) for name in ("plot", "html", "junit") if asked.get(name)}
        style = FigureStyle(asked.get("plot_width"), not asked.get("no_caption"))
        return cls((chosen or ["table"])[0], quiet=asked["quiet"], style=style, **files)

    def check(self, *others: Path | None) -> None:
        """Refuse before any work what could not be written after it. others: further files of the command."""
        from bncli.report.figure import DEFAULT_STYLE, check_path
        from bncli.storage import check_writable

        style = self.style or DEFAULT_STYLE
        asked = ["--plot-width"] * (style.width_inches is not None) + ["--no-caption"] * (not style.caption)
        if self.plot:
            check_path(self.plot)
        elif asked:
            raise UsageError(f"{', '.join(asked)}: without --plot FILE nothing is drawn; give one")
        for file, suffix in ((self.html, ".html"), (self.junit, ".xml")):
            if file and file.suffix not in ("", suffix):
                raise UsageError(f"{file}: this report's file name must end in {suffix}")
        for file in (self.plot, self.html, self.junit, *others):
            if file:
                check_writable(file)

    def show(self, result: Any, forms: Mapping[str, Callable[[Any], object]]) -> None:
        """Print the result. forms: the name of each form -> what makes it of the result."""
        print_result(forms[self.form](result))

    def write(
        self,
        result: Any,
        figures: Mapping[str, Callable[..., None]],
        html: Callable[[Any], str] | None = None,
        junit: Callable[[Any], str] | None = None,
    ) -> None:
        """Write the files. figures: what their names end in, without the suffix -> what draws them, see `figure.save`.

        html, junit: make the text.
        """
        from bncli.report.figure import DEFAULT_STYLE, save
        from bncli.storage import write_atomically

        for ending, draw in figures.items():
            if self.plot:
                file = self.plot.with_stem(self.plot.stem + ending)
                save(draw, result, file, self.style or DEFAULT_STYLE)
                log(f"Plot written to {file}", self.quiet)
        for path, make in ((self.html, html), (self.junit, junit)):
            if path and make:
                write_atomically(path, make(result))
                log(f"Report written to {path}", self.quiet)


def origin(recipes: Mapping[str, Any], **others: Any) -> tuple[str, str]:
    """This command, and as YAML the arms' resolved recipes with other sections; what all arms have is written once."""
    from bncli.recipe.yaml import dump

    found = list(recipes.values()) or [{}]
    common = {key: value for key, value in found[0].items() if all(each.get(key) == value for each in found)}
    arms = {name: {key: each[key] for key in each if key not in common} for name, each in recipes.items()}
    sections = {**common, **({"arms": arms} if len(found) > 1 else {}), **others}
    return shlex.join(["bncli", *sys.argv[1:]]), dump(sections) if sections else ""
