"""Options that several commands share, so that each is declared once."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

MOST_THREADS = 1024  # far more crash OpenMP

# Options by the heading under which a command's help has them.
RecipeOption = partial(typer.Option, rich_help_panel="Recipe")
MachineOption = partial(typer.Option, rich_help_panel="Machine")
OutputOption = partial(typer.Option, rich_help_panel="Output")
ThreadsOption = partial(MachineOption, min=1, max=MOST_THREADS, metavar="N")
FolderOption = partial(OutputOption, "--out", "-o", metavar="FOLDER")
CheckOption = partial(typer.Option, rich_help_panel="Exit code")

Recipe_ = Annotated[str, typer.Argument(metavar="RECIPE", help="YAML recipe; - reads standard input.")]
Recipes = Annotated[list[str] | None, typer.Argument(metavar="[RECIPE]...", help="YAML recipes; - is standard input.")]
Set = Annotated[
    list[str] | None, RecipeOption("--set", metavar="KEY.PATH=VALUE", help="Override a field; may be repeated.")
]
ArmName = Annotated[str | None, RecipeOption("--arm", metavar="NAME", help="Use only this arm of the recipe.")]
AllowCode = Annotated[bool, typer.Option("--allow-code", help="Allow your own model or kernel to be imported.")]
DryRun = Annotated[bool, RecipeOption("--dry-run", "-n", help="Show what would be done and train nothing.")]
Device = Annotated[str, MachineOption("--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps.")]
Threads = Annotated[int | None, ThreadsOption(help="CPU threads.  [default: torch's choice]")]
Quiet = Annotated[bool, OutputOption("--quiet", "-q", help="Print results and errors only, no progress.")]
Json = Annotated[bool, OutputOption("--json", help="Print JSON instead of a table.")]
Csv = Annotated[bool, OutputOption("--csv", help="Print CSV instead of a table.")]
Markdown = Annotated[bool, OutputOption("--markdown", help="Print Markdown instead of a table.")]
Latex = Annotated[bool, OutputOption("--latex", help="Print LaTeX tables instead of a table.")]
Plot = Annotated[Path | None, OutputOption(metavar="FILE.svg|png|pdf", help="Draw it to a file (needs matplotlib).")]
PlotWidth = Annotated[
    float | None,
    OutputOption(min=3, max=40, metavar="INCHES", help="Width of --plot; a paper's column has about 3.3."),
]
NoCaption = Annotated[bool, OutputOption("--no-caption", help="Omit title and caption of --plot, for a paper.")]
Junit = Annotated[Path | None, OutputOption(metavar="FILE.xml", help="Write a JUnit report, for CI.")]
Html = Annotated[Path | None, OutputOption(metavar="FILE.html", help="Write a self-contained report.")]
RequireTarget = Annotated[bool, CheckOption("--require-target", help="Exit with 1 if a run does not reach its target.")]
RequireClaims = Annotated[bool, CheckOption("--require-claims", help="Exit with 1 if a claim is not shown.")]
