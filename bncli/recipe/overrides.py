"""Recipes as plain trees, before validation: shorthands, overrides, arms on top of the base, origins of values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from bncli.recipe.epochs import in_steps
from bncli.recipe.sections import KINDS, Recipe, RecipeFile, Spaced, shorthand_key
from bncli.recipe.yaml import MAX_DEPTH, Keys, Mistake, Tree, dotted, parse

LONGEST_SHOWN = 500  # characters of an override
COMPARISON_KEYS = ("arms", "reference", "grid", "seeds", "claims", "largest_learning_rate")

# --- sections -----------------------------------------------------------------------------------------------------


def members(annotation: Any) -> list[type[BaseModel]]:
    """The section models that a field may hold, itself or in a list: unions and Annotated unfolded."""
    if get_origin(annotation) in (Annotated, tuple):
        return members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [model for member in get_args(annotation) for model in members(member)]
    model = get_origin(annotation) is None and isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return [annotation] if model else []


def kinds(models: Sequence[type[BaseModel]]) -> dict[str, type[BaseModel]]:
    """The section models by the kind (or source) that chooses each; empty where there is nothing to choose."""
    found = [(key, model) for model in models for key in KINDS if key in model.model_fields]
    return {kind: model for key, model in found for kind in get_args(model.model_fields[key].annotation)}


def choose(models: Sequence[type[BaseModel]], plain: Any) -> type[BaseModel] | None:
    """The one of several section models that the data's kind names."""
    if len(models) == 1:
        return models[0]
    named = [plain[key] for key in KINDS if key in plain] if isinstance(plain, dict) else []
    return next((model for kind, model in kinds(models).items() if kind in named), None)


def model_at(keys: Sequence[str | int], plain: Any, root: type[BaseModel]) -> type[BaseModel] | None:
    """The section model that describes the place `keys` of a tree, or None where there is none."""
    model: type[BaseModel] | None = root
    for key in keys:
        if isinstance(key, int):  # of a list, whose field has already given the model
            plain = value_at(plain, [key])
            continue
        field = model.model_fields.get(str(key)) if model else None
        if field is None:
            return None
        plain = plain.get(key) if isinstance(plain, dict) else None
        default = field.get_default()
        if plain is not None:
            model = choose(members(field.annotation), plain)
        else:
            model = type(default) if isinstance(default, BaseModel) else None
    return model


# --- values -------------------------------------------------------------------------------------------------------


def split_path(path: str) -> tuple[str, ...]:
    """`optimizer.lr` -> its keys. What follows `grid.` is one key, itself a path."""
    head, _, rest = path.partition(".")
    return ("grid", rest) if head == "grid" and rest else tuple(path.split("."))


def nested(keys: Sequence[str], value: Any) -> Any:
    for key in reversed(keys):
        value = {key: value}
    return value


def leaves(value: Any, keys: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """The values of a tree with their paths; a list counts as one value."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from leaves(item, (*keys, key))
    else:
        yield keys, value


def value_at(root: Any, keys: Sequence[str | int], default: Any = None) -> Any:
    for key in keys:
        inside = key in root if isinstance(root, dict) else isinstance(root, list) and key in range(len(root))
        if not inside:
            return default
        root = root[key]
    return root


# --- shorthands, overrides and arms -------------------------------------------------------------------------------


def write_out(tree: Tree) -> None:
    """Write out what a recipe may leave out: `norm: batch` is `norm: {kind: batch}`, an arm without changes is {}."""
    _write_sections(tree, tree.root, ())
    arms = value_at(tree.root, ["arms"])
    for name, changes in arms.items() if isinstance(arms, dict) else ():
        arms[name] = {} if changes is None else changes
        _write_sections(tree, changes, ("arms", name))
    grid = value_at(tree.root, ["grid"])
    for path, values in grid.items() if isinstance(grid, dict) else ():
        with contextlib.suppress(ValidationError):  # a list, or one with mistakes, which is left for the checks
            grid[path] = Spaced.model_validate(values).values()


def _write_sections(tree: Tree, sections: Any, keys: Keys) -> None:
    for name, value in sections.items() if isinstance(sections, dict) else ():
        at, kind = (*keys, name), shorthand_key(name)
        if kind and isinstance(value, str | list if name == "probes" else str | bool | int | float):
            sections[name] = {kind: value}
            elements = [(*at, index) for index in range(len(value))] if isinstance(value, list) else []
            tree.where |= {(*at, kind, *each[len(at) :]): tree.where[each] for each in [at, *elements]}
        elif name not in ("arguments", *COMPARISON_KEYS):
            _write_sections(tree, value, at)


def override(tree: Tree, sets: Sequence[str], sets_from: str) -> None:
    """Apply each "key.path=value", in order. Values are read exactly as the file's are; their place is `sets_from`."""
    for text in sets:
        path, equals, value = text.partition("=")
        source = f"{sets_from} {text if text.isprintable() else repr(text)}"[:LONGEST_SHOWN]
        keys = split_path(path.strip())
        if not equals or "" in keys or len(keys) > MAX_DEPTH:
            tree.mistakes.append(Mistake(source, "expected key.path=value, as in optimizer.lr=0.1"))
            continue
        around = [keys[:end] for end in range(1, len(keys))]
        full = [at for at in around if not isinstance(value_at(tree.root, at), dict | None)]
        if full:
            within = f"{dotted(full[0])} is a value and has no field {keys[len(full[0])]}"
            tree.mistakes.append(Mistake(source, within))
        else:
            _set(tree, keys, parse(value, source, keys))


def _set(tree: Tree, keys: tuple[str, ...], new: Tree) -> None:
    """Put a value that was read for `keys` into the tree, and forget the places of what it replaces."""
    tree.mistakes += new.mistakes
    tree.unread |= new.unread
    if keys not in new.where:  # it could not be read
        return
    around: dict[Keys, str] = {keys[:end]: new.source for end in range(1, len(keys))}
    new.root = nested(keys, new.root)
    new.where |= around
    write_out(new)
    if keys in (("arms",), ("grid",)):  # these are replaced; a section's fields are changed one by one
        merged = tree.root | new.root
    else:
        merged = merge(tree.root, new.root, RecipeFile)
        arms, changes = tree.root.get("arms"), new.root.get("arms")
        if isinstance(arms, dict) and isinstance(changes, dict):
            merged["arms"] = arms | {name: merge(arms.get(name, {}), changed) for name, changed in changes.items()}
    tree.root = merged
    where = around | tree.where | {at: place for at, place in new.where.items() if at not in around}
    missing = object()
    tree.where = {at: place for at, place in where.items() if value_at(tree.root, at, missing) is not missing}


def merge(base: Any, changes: Any, model: type[BaseModel] | None = Recipe) -> Any:
    """`changes` on top of `base`. A section that changes its kind keeps only the fields that the new kind has too."""
    if not (isinstance(base, dict) and isinstance(changes, dict)):
        return changes
    merged = dict(base)
    for key, value in changes.items():
        old: Any = merged.get(key)
        models = members(model.model_fields[key].annotation) if model and key in model.model_fields else []
        chosen = choose(models, {**old, **value}) if isinstance(old, dict) and isinstance(value, dict) else None
        if chosen and any(kind in value and value[kind] != old.get(kind) for kind in KINDS):
            kept = chosen.model_fields if len(models) > 1 else ()  # init's one model: its fields belong to one kind
            old = {name: item for name, item in old.items() if name in kept}
        if models and isinstance(old, dict) and isinstance(value, dict) and ("epochs" in old) != ("epochs" in value):
            old = None  # epochs replace {points_per_doubling: n}, and the other way round
        merged[key] = merge(old, value, chosen)
    return merged


def with_kinds(run: dict[str, Any]) -> dict[str, Any]:
    """A run in which a section that needs no kind has its default's: `schedule: {warmup: 9}` is a constant one."""
    found = dict(run)
    for name, field in Recipe.model_fields.items():
        default, section = field.get_default(), run.get(name, {})
        if (
            isinstance(default, BaseModel)
            and isinstance(section, dict)
            and section.keys() <= default.model_dump().keys()
        ):
            found[name] = {**default.model_dump(include={"kind"}), **section}
    return found


def base_of(root: dict[str, Any]) -> dict[str, Any]:
    """The base run, its epochs in steps."""
    return in_steps(_written_base(root))


def _written_base(root: dict[str, Any]) -> dict[str, Any]:
    return with_kinds({key: value for key, value in root.items() if key not in COMPARISON_KEYS})


def arms_of(root: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every arm's run: the base with the arm's changes, its epochs in steps."""
    arms, base = root.get("arms"), _written_base(root)
    changes = arms.items() if isinstance(arms, dict) else ()
    return {name: in_steps(with_kinds(merge(base, change))) for name, change in changes if isinstance(change, dict)}


def fixed_by(root: dict[str, Any], arm: str) -> tuple[str, ...]:
    """The fields of the grid that an arm gives a value to, so that they are not tuned in it."""
    paths = [dotted(keys) for keys, _ in leaves(value_at(root, ("arms", arm), {}))]
    changed = {*paths, *(path.removesuffix(".epochs") for path in paths)}
    grid = root.get("grid")
    return tuple(path for path in grid if path in changed) if isinstance(grid, dict) else ()
