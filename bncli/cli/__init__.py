"""The command line. Heavy imports (torch, pydantic, scipy) happen inside commands so that `--help` stays fast."""

from __future__ import annotations

import gc
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from bncli import __version__
from bncli.cli import compare, gradcheck, profile, train
from bncli.cli.completion import complete
from bncli.cli.console import StopAtOnce, print_error, rank, standard_streams, system_errors
from bncli.errors import INTERRUPTED, USAGE, BncliError, UsageError

app = typer.Typer(
    name="bncli",
    help="How many training steps does batch normalization save, what does it cost, are its gradients right?\n\n"
    "Example: bncli compare recipes/digits.yaml",
    epilog="Exit codes: 0 success; 1 a check or a run failed; 2 a mistake in a recipe, an option or the data; "
    "3 a device or kernel is not available; 4 diverged; 130 interrupted (143 by SIGTERM, 129 by SIGHUP).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"bncli {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


class Command(TyperCommand):
    """A command whose help lists its options under the headings that they name, in the order of their declaration."""

    def invoke(self, ctx: Any) -> Any:
        if rank() is not None and self.name != "train":
            if rank():
                raise typer.Exit(USAGE)
            raise UsageError(f"torchrun starts several processes for one run of train; start {self.name} without it")
        try:
            return super().invoke(ctx)
        except StopAtOnce as stopped:  # of which the parser would make 130, whatever the signal
            raise typer.Exit(stopped.exit_code) from stopped

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                heading = getattr(parameter, "rich_help_panel", None)
                kind = "Arguments" if parameter.param_type_name == "argument" else "Options"
                groups.setdefault(heading or kind, []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)


for command in (train.train, compare.compare, profile.profile, gradcheck.gradcheck):
    complete(command)
    app.command(cls=Command)(command)


PARSER_ERROR: Any = typer.BadParameter.__mro__[1]  # click's UsageError, which typer does not export


def main() -> None:
    """The console script: runs a command and turns a user's mistake into a message and an exit code."""
    gc.disable()  # while modules load there is no garbage, and looking for it is an eighth of importing torch
    try:
        with system_errors(), standard_streams():
            sys.exit(app(prog_name="bncli", standalone_mode=False))
    except PARSER_ERROR as error:
        if len(sys.argv) > 1:
            print_error(UsageError(_parser_words(error)))
        else:
            error.show()  # the help
        sys.exit(USAGE)
    except BncliError as error:
        print_error(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _parser_words(error: Any) -> str:
    """A mistake that the option parser found, as bncli says its own: what, and what to do."""
    parameter, near = getattr(error, "param", None), getattr(error, "possibilities", None)
    what = error.message[:1].lower() + error.message[1:].rstrip(".").replace(". Did", "; did")
    if parameter is not None:
        option = next((name for name in parameter.opts if name.startswith("--")), parameter.human_readable_name)
        what = f"{option}: {what}" if what else f"{option} is missing"
    advice = (
        f"did you mean {' or '.join(near)}?" if near else f"see {error.ctx.command_path if error.ctx else 'its'} --help"
    )
    return what if what.endswith("?") else f"{what}; {advice}"
