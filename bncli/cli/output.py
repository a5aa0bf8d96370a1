"""Where a command's result goes: printed in one form, and written to the files that the options name."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bncli.cli.console import log, print_result
from bncli.errors import UsageError
from bncli.report.figure import DEFAULT_STYLE, FigureStyle, check_path


@dataclass(frozen=True)
class Output:
    """What the options ask for.

    form: how the result is printed: table, json, csv, markdown or latex. plot, html, junit: files to be written beside
    it. style: how the plot is laid out.
    """

    form: str = "table"
    plot: Path | None = None
    html: Path | None = None
    quiet: bool = False
    style: FigureStyle = DEFAULT_STYLE
    junit: Path | None = None

    def check(self, *others: Path | None) -> None:
        """Refuse before any work what could not be written after it. others: further files of the command."""
        from bncli.report.files import check_writable

        asked = ["--plot-width"] * (self.style.width_inches is not None) + ["--no-caption"] * (not self.style.caption)
        if self.plot:
            check_path(self.plot)
        elif asked:
            raise UsageError(f"{', '.join(asked)}: without --plot FILE nothing is drawn; give one")
        for file in (self.plot, self.html, self.junit, *others):
            if file:
                check_writable(file)

    def show(self, result: Any, forms: Mapping[str, Callable[[Any], object]]) -> None:
        """Print the result. forms: the name of each form -> what makes it of the result."""
        print_result(forms[self.form](result))

    def write(
        self,
        result: Any,
        plot: Callable[[Any, Path, FigureStyle], Sequence[Path]] | None = None,
        html: Callable[[Any], str] | None = None,
        junit: Callable[[Any], str] | None = None,
    ) -> None:
        """Write the files. plot: draws figures at a path in a style, returns where. html, junit: make the text."""
        from bncli.report.files import write_atomically

        if self.plot and plot:
            for file in plot(result, self.plot, self.style):
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


def chosen_form(**asked: bool) -> str:
    """The form that was asked for, by its option's name, or table. Refuses two of them."""
    names = [name for name, wanted in asked.items() if wanted]
    if len(names) > 1:
        *first, last = [f"--{name}" for name in asked]
        raise UsageError(f"{', '.join(first)} and {last}: choose one, the result is printed once")
    return names[0] if names else "table"
