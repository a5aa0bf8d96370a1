"""Recipes that bncli comes with, and their schema: beside the package in a clone, inside it where it is installed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bncli.errors import UsageError

SCHEMA = max((each / "recipes" / "recipe.schema.json" for each in Path(__file__).parents[1:3]), key=Path.is_file)


def files() -> dict[str, Path]:
    """By name: recipes without their ending, as in `own/npz`, and the Python files that recipes need, with it."""
    found = [file for files in ("*.yaml", "own/*.yaml", "own/*.py") for file in sorted(SCHEMA.parent.glob(files))]
    return {file.relative_to(SCHEMA.parent).as_posix().removesuffix(".yaml"): file for file in found}


def purposes() -> dict[str, str]:
    """What each is for: the first clause of its header or its docstring."""
    texts = {name: re.sub(r"\s*\n(# +)?", " ", file.read_text()) for name, file in files().items()}
    clause = re.compile(r'(?:Purpose: +|""")(.+?)(?:[.:;] |(?<=\?) |""")')
    return {name: clause.findall(text)[0] for name, text in texts.items()}


def text(name: str) -> str:
    """An example as it is, but with the schema's place on this machine. Raises UsageError for a name that is none."""
    file = files().get(name.removeprefix("recipes/").removesuffix(".yaml"))
    if file is None:
        from bncli.recipe.check import suggestion

        raise UsageError(suggestion(name, [*files(), "list"]), field="example", value=name)
    return re.sub(r"\$schema=\S+", f"$schema={SCHEMA.as_uri()}", file.read_text(), count=1)


def fields(path: str = "", section: str | None = None) -> Iterator[tuple[str, str]]:
    """The dotted fields of all kinds of a recipe's sections with their descriptions, from the schema, which is fast."""
    schema: dict[str, Any] = json.loads(SCHEMA.read_text())
    for name, field in (schema["$defs"][section] if section else schema)["properties"].items():
        yield f"{path}{name}", field.get("description", "")
        for member in field.get("anyOf", field.get("oneOf", [field])):
            if "$ref" in member:
                yield from fields(f"{path}{name}.", member["$ref"].rpartition("/")[2])
