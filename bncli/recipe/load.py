"""Recipe loading: from a file to its base run, its arms, and the origin of each value."""

from __future__ import annotations

import functools
import hashlib
import json
import operator
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os.path import exists, expanduser  # which raise nothing for a name that no file can have
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from bncli.errors import FileError, RecipeError, UsageError
from bncli.recipe.check import MOST_MISTAKES, check, refuse_code, suggestion, words
from bncli.recipe.epochs import given_in_epochs, in_steps
from bncli.recipe.mnist import files_of
from bncli.recipe.overrides import arms_of, base_of, fixed_by, leaves, override, value_at, write_out
from bncli.recipe.sections import MNIST_5K, NO_EFFECT, Mnist, Recipe, RecipeFile
from bncli.recipe.yaml import Keys, Mistake, Tree, dotted, parse
from bncli.storage import read_plain

MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Arm:
    """One way of training that `compare` tries: a resolved recipe, and the grid's fields that it fixes."""

    name: str
    recipe: Recipe
    fixed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Loaded:
    """A recipe file, checked: the base run, its arms, and where each value came from."""

    name: str
    source: str
    file: RecipeFile
    base: Recipe
    arms: tuple[Arm, ...]
    where: dict[Keys, str]

    @property
    def in_epochs(self) -> set[Keys]:
        """The fields, the base's and the arms', that the file or an override gives in epochs."""
        return given_in_epochs(self.where)

    @property
    def reference(self) -> str:
        """The arm that the others are compared with: the one named, or the first; a file without arms is one itself."""
        return self.file.reference or (self.arms[0].name if self.arms else self.name)

    def arm(self, name: str) -> Arm:
        """The arm of that name; a file without arms is one of its own name. Raises UsageError for any other."""
        arms = {arm.name: arm for arm in self.arms} or {self.name: Arm(self.name, self.base)}
        if name not in arms:
            hint = suggestion(name, list(arms)) if self.arms else f"{self.source} has no arms"
            raise UsageError(hint, field="arm", value=name)
        return arms[name]

    def provenance(self, arm: Arm) -> Iterator[tuple[str, Any, str]]:
        """Every field of an arm's run: its path, its value, and the file's name and line, the flag or `default`."""
        folder = f"{Path(self.source).parent}/"
        base, in_epochs = dict(leaves(plain(self.base))), self.in_epochs
        for keys, value in leaves(plain(arm.recipe)):
            changed = None if arm.recipe is self.base else self.where.get(("arms", arm.name, *keys))
            same = (keys in base and base[keys] == value) or keys in in_epochs
            inherited = self.where.get(keys) if same else None
            at = ("arms", arm.name, *keys) if changed else keys
            note = " (epochs)" if at in in_epochs else ""
            yield dotted(keys), value, (changed or inherited or "default").removeprefix(folder) + note


def load(path: str, sets: Sequence[str] = (), allow_code: bool = False, sets_from: str = "sets") -> Loaded:
    """Read a recipe, apply overrides and check all of it.

    Args:
        path: a YAML file; "-" is standard input.
        sets: overrides, each "key.path=value" as in "optimizer.lr=0.1", applied in order.
        allow_code: accept a recipe that names a model of the user's own, which would be imported and run.
        sets_from: what messages and provenance call the overrides.

    Returns:
        The recipe: its `base` run and its `arms`, each with the resolved `recipe` that `train` takes.

    Raises:
        RecipeError: with every mistake that was found, in the order of the lines.
    """
    source = "standard input" if path == "-" else path
    tree, permission = parse(read(path), source), None
    if isinstance(tree.root, dict):
        write_out(tree)
        override(tree, sets, sets_from)
        _find_beside(tree)
        check(tree)
        if not (tree.mistakes or allow_code):
            refuse_code(tree)
            permission = "allow_code"
    elif not tree.mistakes:
        sections = "a recipe has the sections data, model, optimizer and train: see the example smoke"
        found = "is empty" if tree.root is None else f"is {words(tree.root)}"
        raise RecipeError(f"{source}: {found}; {sections}")
    if tree.mistakes:
        lines = list(dict.fromkeys(map(str, sorted(tree.mistakes, key=lambda mistake: _line(mistake, source)))))
        more = [f"and {len(lines[MOST_MISTAKES + 1 :]):,} more"] * (len(lines) > MOST_MISTAKES + 1)
        raise RecipeError(*lines[: MOST_MISTAKES + 1], *more, permission=permission)
    root = tree.root
    arms = [Arm(name, Recipe.model_validate(run), fixed_by(root, name)) for name, run in arms_of(root).items()]
    base = base_of(root)
    file = RecipeFile.model_validate(in_steps(root | base))
    name = "" if path == "-" else Path(path).stem.lstrip(".")  # of ...yaml it is .., the folder above
    return Loaded(name or "recipe", source, file, Recipe.model_validate(base), tuple(arms), tree.where)


def _find_beside(tree: Tree) -> None:
    """Put the recipe's folder in front of data and modules that are in that folder, and not in the current one."""
    folder = Path(tree.source).parent
    for keys, named in leaves(tree.root):
        field = dotted(keys[2 * (keys[:1] == ("arms",)) :])
        if field in ("data.path", "data.name", "model.module") and isinstance(named, str):
            file = named.partition(":")[0].partition(".")[0] if field == "model.module" else named
            here, beside = (exists(Path(at, file)) or exists(Path(at, f"{file}.py")) for at in ("", folder))
            if beside and not here:
                value_at(tree.root, keys[:-1])[keys[-1]] = str(folder / named)


def _line(mistake: Mistake, source: str) -> float:
    """The line of a mistake in the file; those of the file as a whole come first, those of flags last."""
    number = mistake.place.removeprefix(f"{source}:")
    return int(number) if number.isdecimal() else 0 if mistake.place == source else float("inf")


def read(path: str) -> str:
    """A recipe's text; `-` is standard input. Raises RecipeError for what is not a readable text file."""
    name = "standard input" if path == "-" else path
    try:
        if path != "-":
            raw = read_plain(Path(path), MAX_BYTES, follow=True)
        else:
            raw = sys.stdin.buffer.read(MAX_BYTES + 1) if sys.stdin else b""  # None where it is closed
        if len(raw) > MAX_BYTES:
            raise FileError(f"{name}: is larger than 1 MiB")
        text = raw.decode("utf-8-sig")
    except FileNotFoundError as error:
        names = sorted(other.name for other in Path(path).parent.glob("*.y*ml"))
        hint = f"; {suggestion(Path(path).name, names)}" if names else ""
        raise RecipeError(f"{name}: there is no such file{hint}") from error
    except IsADirectoryError as error:
        own = Path(path, "recipe.yaml")
        hint = f"name the recipe in it, {own}, if it is a run's" if own.exists() else "name a recipe file in it"
        raise RecipeError(f"{name}: is a folder; {hint}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{name}: is not text (byte {error.start} is not UTF-8); a recipe is a YAML file") from error
    except FileError as error:
        raise RecipeError(f"{error}; a recipe is a short YAML file, or - for standard input") from error
    except (OSError, ValueError) as error:  # ValueError: no file can have that name
        raise RecipeError(f"{name}: cannot be read: {getattr(error, 'strerror', error)}") from error
    if "\0" in text:
        raise RecipeError(f"{name}: is a binary file; a recipe is a YAML file")
    return text


# --- recipes as plain data ----------------------------------------------------------------------------------------


def plain(model: BaseModel) -> dict[str, Any]:
    """A section as plain JSON data, its kind first."""
    return model.model_dump(mode="json")


def what_is_trained(recipe: Recipe) -> dict[str, Any]:
    """The fields that decide what a run does, as plain data: all but what is kept of it and when it is saved."""
    found = plain(recipe)
    for name in NO_EFFECT:
        del found["train"][name]
    return found


def digest(data: Any) -> str:
    """A short stable name for plain data: the start of the SHA-256 of its canonical JSON."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:20]


def data_state(recipe: Recipe) -> list[Any]:
    """The path, size and modification time of each file of the recipe's data."""
    named = getattr(recipe.data, "path", None) or getattr(recipe.data, "name", None)
    path = Path(expanduser(named or ""))
    if named in (None, MNIST_5K) or not exists(path):
        return []
    if isinstance(recipe.data, Mnist):
        inside = files_of(named)
    else:
        inside = sorted(Path(folder) / name for folder, _, names in os.walk(path) for name in names)
    return [[str(each), each.stat().st_size, each.stat().st_mtime_ns] for each in inside or [path]]


def with_values(recipe: Recipe, values: dict[str, Any]) -> Recipe:
    """The same recipe with some dotted fields changed.

    Raises KeyError for a field that it does not have and pydantic's ValidationError for a value that is wrong.
    """
    changed = plain(recipe)
    for path, value in values.items():
        *sections, last = path.split(".")
        owner = functools.reduce(operator.getitem, sections, changed)
        if last not in owner:
            raise KeyError(path)
        owner[last] = value
    return Recipe.model_validate(changed)
