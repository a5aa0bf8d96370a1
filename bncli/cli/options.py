"""Options that several commands share, so that each is declared once."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

MOST_THREADS = 1024  # far more crash OpenMP

Recipe_ = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML recipe; - reads standard input.")]
Recipes = Annotated[
    Optional[list[str]], typer.Argument(metavar="[RECIPE]...", help="YAML recipes; - reads standard input.")  # noqa: UP045
]
Set = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override a field of the recipe; may be repeated."),
]
Device = Annotated[str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:1 or mps.")]
AllowCode = Annotated[bool, typer.Option("--allow-code", help="Import your own model or kernel where it is named.")]
DryRun = Annotated[bool, typer.Option("--dry-run", "-n", help="Show what would be done and train nothing.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress; results and errors only.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of a table.")]
Csv = Annotated[bool, typer.Option("--csv", help="Print CSV instead of a table.")]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print Markdown instead of a table.")]
Threads = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(min=1, max=MOST_THREADS, help="CPU threads.  [default: torch's choice]", show_default=False),
]
RequireTarget = Annotated[bool, typer.Option("--require-target", help="Exit 1 when a target is missed.")]
