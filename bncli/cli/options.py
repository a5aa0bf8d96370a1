"""Options that several commands share, so that each is declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MOST_THREADS = 1024  # far more crash OpenMP

Recipe_ = Annotated[str, typer.Argument(metavar="RECIPE", help="YAML recipe; - reads standard input.")]
Recipes = Annotated[list[str] | None, typer.Argument(metavar="[RECIPE]...", help="YAML recipes; - is standard input.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override a field; may be repeated.")
]
ArmName = Annotated[str | None, typer.Option("--arm", metavar="NAME", help="Use only this arm of the recipe.")]
Device = Annotated[str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps.")]
AllowCode = Annotated[bool, typer.Option("--allow-code", help="Allow your own model or kernel to be imported.")]
DryRun = Annotated[bool, typer.Option("--dry-run", "-n", help="Show what would be done and train nothing.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only, no progress.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Csv = Annotated[bool, typer.Option("--csv", help="Print CSV instead of a table.")]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print Markdown instead of a table.")]
Plot = Annotated[Path | None, typer.Option(metavar="FILE.svg|png", help="Draw it to a file (needs bncli[plot]).")]
Html = Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write a self-contained report.")]
Threads = Annotated[
    int | None,
    typer.Option(min=1, max=MOST_THREADS, help="CPU threads.  [default: torch's choice]", show_default=False),
]
RequireTarget = Annotated[bool, typer.Option("--require-target", help="Exit with 1 if a run misses its target.")]
RequireClaims = Annotated[bool, typer.Option("--require-claims", help="Exit with 1 if a claim is not shown.")]
