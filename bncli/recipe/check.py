"""Every check of a recipe in one pass, in the recipe's own words: what was expected, what was found, what was meant."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from bncli.errors import CODE_OF_YOURS
from bncli.recipe.layers import contradictions
from bncli.recipe.overrides import (
    KINDS,
    arms_of,
    base_of,
    fields,
    fixed_by,
    kinds,
    members,
    merge,
    model_at,
    nested,
    value_at,
)
from bncli.recipe.sections import ARM_NAME, FUNCTION_PATH, Recipe, RecipeFile
from bncli.recipe.yaml import Keys, Tree, dotted

Found = tuple[Keys, str]  # where a mistake is, and the sentence about it
SAME_FOR_ALL_RUNS = (
    "data",
    *(f"train.{name}" for name in ("target", "steps", "evaluate_every", "stop_at_target", "seed")),
)

# --- spelling -----------------------------------------------------------------------------------------------------


def edit_distance(one: str, other: str) -> int:
    """Insertions, deletions, substitutions and swaps of neighbours (optimal string alignment)."""
    before, above = [0] * (len(other) + 1), list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        row = [i]
        for j, b in enumerate(other, 1):
            best = min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (a != b))
            if i > 1 and j > 1 and a == other[j - 2] and one[i - 2] == b:
                best = min(best, before[j - 2] + 1)
            row.append(best)
        before, above = above, row
    return above[-1]


def nearest(word: str, names: Sequence[str]) -> list[str]:
    """The names that a wrong one was probably meant to be: fewest edits, and few of them; else those it begins."""
    most = max(1, len(word) // 3)
    edits = {name: edit_distance(word, name) for name in names if abs(len(word) - len(name)) <= most}
    fewest = min(edits.values(), default=most + 1)
    if fewest <= most:
        return [name for name in edits if edits[name] == fewest]
    return [name for name in names if len(word) > 1 and name.startswith(word)]


def suggestion(word: str, names: Sequence[str]) -> str:
    """A question with the nearest valid names, or the whole list when none is near."""
    near = nearest(word, names)
    return f"did you mean {listed(near)}?" if near else f"expected {listed(names)}"


def listed(names: Sequence[Any]) -> str:
    *most, last = map(str, names)
    return f"{', '.join(most)} or {last}" if most else last


# --- the checks ---------------------------------------------------------------------------------------------------


def check(tree: Tree) -> None:
    """Note every mistake of a recipe file's tree in it. What an arm inherits from the base is noted once."""
    root: dict[str, Any] = tree.root
    base, arms = base_of(root), arms_of(root)
    inherited = run_mistakes(base)
    together = [] if mistakes(Recipe, base) else inherited
    for keys, text in mistakes(RecipeFile, root | base) + together:
        tree.refuse(keys, text)
    for name, arm in arms.items():
        for keys, text in run_mistakes(arm):
            if (keys, text) not in inherited:
                tree.refuse(("arms", name, *keys), text)
    _check_grid(tree, arms or {"": base})
    reference = root.get("reference")
    if isinstance(reference, str) and reference not in arms:
        hint = suggestion(reference, list(arms)) if arms else "the recipe has no arms"
        tree.refuse(("reference",), f"there is no arm {reference}; {hint}")


def refuse_code(tree: Tree) -> None:
    """Note every model of the user's own that a recipe without mistakes names."""
    base = base_of(tree.root)
    arms: list[tuple[Keys, dict[str, Any]]] = [(("arms", name), arm) for name, arm in arms_of(tree.root).items()]
    for keys, run in [((), base), *arms]:
        module = run["model"].get("module")
        if module and (run is base or module != base["model"].get("module")):
            tree.refuse((*keys, "model", "module"), f"{module} is {CODE_OF_YOURS}")


def run_mistakes(run: dict[str, Any]) -> list[Found]:
    """What is wrong in the sections of one run, or if nothing is, what they are wrong about together."""
    return mistakes(Recipe, run) or list(contradictions(Recipe.model_validate(run)))


def _check_grid(tree: Tree, arms: dict[str, dict[str, Any]]) -> None:
    grid = tree.root.get("grid")
    for path, values in grid.items() if isinstance(grid, dict) else ():
        if not isinstance(values, list):
            continue
        free = [name for name in arms if path not in fixed_by(tree.root, name)]
        by_arm = {name: list(_grid_mistakes(path, values, arms[name])) for name in free}
        for keys, text in dict.fromkeys(found for each in by_arm.values() for found in each):
            wrong = [name for name in free if (keys, text) in by_arm[name]]
            of = "" if len(wrong) == len(free) else f"in arm {' and '.join(wrong)}: "
            tree.refuse(("grid", path, *keys), of + text)
        for index, value in enumerate(values):
            if value in values[:index]:
                tree.refuse(("grid", path, index), f"{words(value)} is there twice")


def _grid_mistakes(path: str, values: Sequence[Any], run: dict[str, Any]) -> Iterator[Found]:
    """What is wrong with the values for one field in one run and was not wrong before, by their index."""
    keys = tuple(path.split("."))
    if any(path == same or path.startswith(f"{same}.") for same in SAME_FOR_ALL_RUNS):
        yield (), "is the same for every run of a comparison, so it cannot be tuned"
    elif model_at(keys, run, Recipe) or keys[-1] in KINDS:
        yield (), "chooses a whole section; make an arm of each choice"
    elif path not in fields(Recipe, run) and value_at(run, keys) is None:
        found = [text for at, text in mistakes(Recipe, merge(run, nested(keys, None))) if at == keys[: len(at)]]
        yield (), found[0] if found else "is not in the recipe"
    else:
        before = run_mistakes(run)
        for index, value in enumerate(values):
            for at, text in run_mistakes(merge(run, nested(keys, value))):
                if (at, text) not in before:
                    below = at[len(keys) :] if at[: len(keys)] == keys else None
                    yield (index, *(below or ())), text if below is not None else f"in {dotted(at)}: {text}"


# --- pydantic's errors in the recipe's words ----------------------------------------------------------------------


def mistakes(model: type[BaseModel], plain: dict[str, Any]) -> list[Found]:
    """What is wrong with a tree of sections, each as its place and a sentence."""
    try:
        model.model_validate(plain)
    except ValidationError as error:
        found: list[Found] = []
        for each in error.errors(include_url=False):
            keys = _without_tags(each["loc"], model, plain)
            if each["type"] == "too_short" and len(each["input"]) >= each["ctx"]["min_length"]:
                continue  # pydantic has counted right elements only
            if each["type"] in ("union_tag_invalid", "union_tag_not_found"):
                found += _kind_mistakes(model, plain, keys)
            else:
                found.append((keys, _sentence(each, model, plain, keys)))
        return found
    return []


def _without_tags(location: tuple[Any, ...], model: type[BaseModel], plain: Any) -> Keys:
    """pydantic names the chosen member of a union in a location; the recipe has no such level."""
    keys: Keys = ()
    member_named = False
    for key in location:
        if not member_named and len(_choices(model, plain, keys)) > 1:
            member_named = True
        elif not str(key).startswith("["):
            keys, member_named = (*keys, key), False
    return keys


def _choices(model: type[BaseModel], plain: Any, keys: Keys) -> list[type[BaseModel]]:
    """The section models among which the kind of the section at `keys` chooses."""
    owner = model_at(keys[:-1], plain, model) if keys else None
    known = owner is not None and keys[-1] in owner.model_fields
    return members(owner.model_fields[str(keys[-1])].annotation) if owner and known else []


def _kind_mistakes(model: type[BaseModel], plain: Any, keys: Keys) -> Iterator[Found]:
    """A kind that is missing or wrong, and the rest of its section as the kind that was probably meant."""
    section, models = value_at(plain, keys), _choices(model, plain, keys)
    by_kind, names = kinds(models), list(dict.fromkeys(name for each in models for name in each.model_fields))
    key = next(key for key in KINDS if key in names)
    misspelt = [name for name in section if name not in names and key in nearest(name, names)]
    given = section.get(key, section[misspelt[0]] if misspelt else None)
    if key in section:
        yield (*keys, key), _not_among(given, list(by_kind))
    elif not misspelt:
        yield (*keys, key), f"is missing; expected {listed(list(by_kind))}"
    meant = nearest(given, list(by_kind)) if isinstance(given, str) else []
    if len(meant) == 1:
        rest = mistakes(by_kind[meant[0]], {**section, key: meant[0]})
        yield from (((*keys, *at), text) for at, text in rest)
    else:
        wrong = [name for name in section if name not in names]
        yield from (((*keys, name), f"unknown key; {suggestion(name, names)}") for name in wrong)


def _sentence(error: Any, model: type[BaseModel], plain: Any, keys: Keys) -> str:
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    owner = model_at(keys[:-1], plain, model)
    if kind == "extra_forbidden":
        return _unknown(str(keys[-1]), owner, _choices(model, plain, keys[:-1]))
    if kind == "missing":
        return "is missing"
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error" and owner:
        annotation = owner.model_fields[str(keys[-1])].annotation
        return _not_among(value, get_args(annotation))
    choice = kinds(_choices(model, plain, keys))
    if choice and kind in ("model_type", "model_attributes_type"):
        return f"expected {', '.join(choice)} or a mapping, found {words(value)}"
    expected = _PATTERNS[context["pattern"]] if "pattern" in context else _EXPECTED.get(kind, "").format(**context)
    return f"expected {expected}, found {words(value)}" if expected else str(error["msg"])


def _unknown(key: str, owner: type[BaseModel] | None, siblings: Sequence[type[BaseModel]]) -> str:
    """About a key that a section does not have: perhaps the section has it under another kind."""
    if owner is None:
        return "unknown key"
    others = [kind for kind, model in kinds(siblings).items() if key in model.model_fields]
    mine = [kind for kind, model in kinds(siblings).items() if model is owner]
    if others:
        return f"unknown key; it belongs to {listed(others)}, not to {listed(mine)}"
    return f"unknown key; {suggestion(key, sorted(owner.model_fields, key=lambda name: name not in KINDS))}"


def _not_among(value: Any, names: Sequence[Any]) -> str:
    near = nearest(value, list(names)) if isinstance(value, str) else []
    hint = f"; did you mean {listed(near)}?" if near else ""
    return f"expected {listed(names)}, found {words(value)}{hint}"


def words(value: Any) -> str:
    """A value for a sentence: short ones as JSON, which tells text from numbers."""
    names = {list: "a list", tuple: "a list", dict: "a mapping", type(None): "nothing"}
    shown = "an empty list" if value == [] else names.get(type(value)) or json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 60 else f"{shown[:50]} ..."


_PATTERNS = {
    ARM_NAME: "a name of letters, digits, spaces, +, - and _",
    FUNCTION_PATH: "package.module:function",
}
_EXPECTED = {
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "finite_number": "a finite number",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "at most {le:g}",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "string_too_long": "at most {max_length} characters",
}
