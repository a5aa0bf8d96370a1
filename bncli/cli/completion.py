"""What a shell completes: recipes, their arms and fields, and names of kernels and the like. No torch, no pydantic."""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Callable
from pathlib import Path
from typing import get_type_hints

import typer

from bncli.measure.profile.shapes import SETS
from bncli.names import KERNELS
from bncli.recipe import examples


def complete(command: Callable[..., None]) -> None:
    """Give a command's parameters their completions."""
    command.__annotations__ = get_type_hints(command, include_extras=True)  # values, which Typer takes as they are
    for parameter, annotation in command.__annotations__.items():
        for option in getattr(annotation, "__metadata__", ()):
            option.autocompletion = COMPLETED.get(parameter)


def recipes(incomplete: str) -> list[str]:
    """YAML files in the folder that is typed and in those below it; a shell completes other files by itself."""
    return _files(incomplete[: incomplete.rfind("/") + 1], "", "*.y*ml")


def runs(incomplete: str) -> list[str]:
    """Folders of runs that can be continued, in the folder that is typed and in those below it."""
    return [str(Path(file).parent) for file in _files(incomplete, "*/", "checkpoint.pt")]


def _files(start: str, folder: str, name: str) -> list[str]:
    """Files whose paths begin so, at most two folders further down; none that a terminal might take for commands."""
    found = (sorted(glob.glob(f"{glob.escape(start)}{folder}{below}{name}")) for below in ("", "*/", "*/*/"))
    return [file for files in found for file in files if file.isprintable()]


def arms(context: typer.Context) -> list[str]:
    """The arms of the recipe on the line; in bash their spaces are escaped, unless the word begins with a quote."""
    from bncli.recipe.yaml import parse

    found: list[str] = []
    for word in filter(os.path.isfile, context.args):  # a line that is not complete has no parameters yet
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # no recipe, or one without arms
            found += parse(Path(word).read_text(), word).root["arms"]
    quoted = os.environ.get("COMP_WORDS", "'").split("\n")[-1][:1] in ("'", '"')  # other shells quote by themselves
    return [name if quoted else name.replace(" ", "\\ ") for name in found if name.isprintable()]


def names(*known: str) -> Callable[[str], list[str]]:
    """The last of several names that commas separate."""
    return lambda incomplete: [incomplete[: incomplete.rfind(",") + 1] + name for name in known]


COMPLETED = {  # parameter -> what completes it
    "recipe": recipes,
    "recipes": recipes,
    "resume": runs,
    "example": lambda: [("list", "their names"), *examples.purposes().items()],
    "arm": arms,
    "sets": lambda: [(f"{field}=", text) for field, text in dict(examples.fields()).items()],
    "kernels": names(*KERNELS),
    "shapes": names(*SETS),
    "dtypes": names("fp32", "bf16", "fp16", "fp64"),
    "layouts": names("contiguous", "channels_last", "strided"),
    "device": names("auto", "cpu", "cuda", "mps"),
}
