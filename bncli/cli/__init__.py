"""The command line. Heavy imports (torch, pydantic, scipy) happen inside commands so that `--help` stays fast."""

from __future__ import annotations

import errno
import gc
import sys
from typing import Annotated

import typer

from bncli import __version__
from bncli.cli import compare, gradcheck, profile, train
from bncli.cli.completion import complete
from bncli.cli.console import StopAtOnce, print_error
from bncli.errors import CHECK_FAILED, INTERRUPTED, BncliError

app = typer.Typer(
    name="bncli",
    help="How many training steps does batch normalization save, what does it cost, are its gradients right?",
    epilog="Exit codes: 0 success; 1 a check or a run failed; 2 a mistake in a recipe, an option or the data; "
    "3 a device or kernel is not available; 4 diverged; 130 interrupted (143 by SIGTERM).",
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
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


for command in (train.train, compare.compare, gradcheck.gradcheck, profile.profile):
    complete(command)
    app.command()(command)


def main() -> None:
    """The console script: runs a command and turns a user's mistake into a message and an exit code."""
    gc.disable()  # while modules load there is no garbage, and looking for it is an eighth of importing torch
    try:
        app()
    except BncliError as error:
        print_error(error)
        sys.exit(error.exit_code)
    except StopAtOnce as stopped:
        sys.exit(stopped.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EIO):
            raise
        print(f"bncli: the result cannot be written: {error.strerror}", file=sys.stderr)
        sys.exit(CHECK_FAILED)
