"""Recipe validation: all mistakes in one pass, each with what was expected, found and probably meant."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from bncli.errors import CODE_OF_YOURS, DataError
from bncli.names import MEASURES, NORMS, PROBE_CHOICES, PROBES, Measure
from bncli.recipe.epochs import STEPS, epochs_of, given_in_epochs, in_steps, steps_per_epoch
from bncli.recipe.layers import contradictions, input_of, layers, module_names
from bncli.recipe.overrides import arms_of, base_of, fixed_by, kinds, members, merge, model_at, nested, value_at
from bncli.recipe.sections import ARM_NAME, FUNCTION_PATH, KINDS, NO_EFFECT, Npz, Recipe, RecipeFile, Spaced
from bncli.recipe.yaml import Keys, Tree, dotted

MARKS = ("[key]", "[steps]", "[spacing]")  # that pydantic appends: for a mapping's key, and for the tag of a union
Found = tuple[Keys, str]  # where a mistake is, and the sentence about it
SAME_FOR_ALL_RUNS = ("data", *(f"train.{name}" for name in ("target", "steps", "evaluate_every", "seed")))
MOST_MISTAKES = 50  # of a recipe, shown
NOT_TUNED = ("train.stop_at_target", *(f"train.{name}" for name in NO_EFFECT))

# --- spelling -----------------------------------------------------------------------------------------------------


def nearest(word: Any, names: Sequence[Any]) -> list[str]:
    """At most two names that a wrong one was probably meant to be, or else those that it begins; empty for none."""
    if not isinstance(word, str):
        return []
    texts = [name for name in names if isinstance(name, str)]
    # A name of two letters with one of them wrong is half right, and "itit" is half of "init" to difflib.
    cutoffs = [0.6] * (len(word) > 2) + [0.5] * (len(word) <= 4)
    near = next(filter(None, (difflib.get_close_matches(word, texts, n=2, cutoff=cutoff) for cutoff in cutoffs)), [])
    return near or [name for name in texts if len(word) > 1 and name.startswith(word)]


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
    _check_grid(tree, arms or {"": base})
    inherited = run_mistakes(base)
    together = [] if mistakes(Recipe, base) else inherited
    for keys, text in mistakes(RecipeFile, in_steps(root | base)) + together:
        tree.refuse(keys, text)
    for name, arm in arms.items():
        for keys, text in run_mistakes(arm):
            if (keys, text) not in inherited:
                tree.refuse(("arms", name, *keys), text)
    reference = root.get("reference")
    if isinstance(reference, str) and reference not in arms:
        hint = suggestion(reference, list(arms)) if arms else "the recipe has no arms"
        tree.refuse(("reference",), f"there is no arm {reference}; {hint}")
    _check_claims(tree, arms)


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
        if isinstance(values, dict):  # which would be a list by now if it were right
            for keys, text in mistakes(Spaced, values):
                tree.refuse(("grid", path, *keys), text)
            tree.unread.add(("grid", path))
        if not isinstance(values, list):
            continue
        free = [name for name in arms if path not in fixed_by(tree.root, name)]
        by_arm = {name: list(_grid_mistakes(path, values, arms[name])) for name in free}
        for keys, text in dict.fromkeys(found for each in by_arm.values() for found in each):
            wrong = [name for name in free if (keys, text) in by_arm[name]]
            of = "" if len(wrong) == len(free) else f"in arm {' and '.join(wrong)}: "
            tree.refuse(("grid", path, *keys), of + text)
        dependent = {"train.batch_size": [each for each, _ in STEPS], "train.accumulate": ["norm"]}.get(path, [])
        if fields := [dotted(each) for each in given_in_epochs(tree.where) if each[-2] in dependent]:
            named = listed(sorted(fields))
            tree.refuse(("grid", path), f"the steps of an epoch depend on it; give {named} in steps, not in epochs")
        for index, value in enumerate(values):
            if value in values[:index]:
                tree.refuse(("grid", path, index), f"{words(value)} appears twice")


def _grid_mistakes(path: str, values: Sequence[Any], run: dict[str, Any]) -> Iterator[Found]:
    """What is wrong with the values for one field in one run and was not wrong before, by their index."""
    keys = tuple(path.split("."))
    owner = model_at(keys[:-1], run, Recipe)
    known = (owner is not None and keys[-1] in owner.model_fields) or value_at(run, keys) is not None
    if any(path == same or path.startswith(f"{same}.") for same in SAME_FOR_ALL_RUNS):
        yield (), "is the same for every run of a comparison, so it cannot be tuned"
    elif path in NOT_TUNED or path.startswith("train.checkpoint.") or keys[0] == "probes":
        yield (), "steps to target do not depend on it, so it cannot be tuned; set it in the base or in an arm"
    elif model_at(keys, run, Recipe) or keys[-1] in KINDS:
        yield (), "chooses a whole section; make each choice an arm"
    elif not known:
        found = [text for at, text in mistakes(Recipe, merge(run, nested(keys, None))) if at == keys[: len(at)]]
        yield (), found[0] if found else "is not in the recipe"
    else:
        before = run_mistakes(run)
        for index, value in enumerate(values):
            for at, text in run_mistakes(merge(run, nested(keys, value))):
                if (at, text) not in before:
                    inside = at[: len(keys)] == keys
                    yield (index, *(at[len(keys) :] if inside else ())), text if inside else f"in {dotted(at)}: {text}"


def _check_claims(tree: Tree, arms: dict[str, dict[str, Any]]) -> None:
    """Note what is wrong with each claim beside the rest of the recipe."""
    claims = tree.root.get("claims")
    if claims and not arms:
        tree.refuse(("claims",), "the recipe has no arms; a claim is about two of them")
        return
    claims = claims if isinstance(claims, list) else []
    measures = [value_at(claim, ("measure",)) for claim in claims]
    # Costs to the target are judged over the tuning seeds too.
    by_report = [each for each in measures if not str(each).endswith("_to_target") or not tree.root.get("grid")]
    if by_report and value_at(tree.root, ("seeds", "report")) == 1:
        tree.refuse(("seeds", "report"), f"{by_report[0]} is judged by pairs of runs, one a seed: expected at least 2")
    search = in_steps(tree.root).get("largest_learning_rate")
    for index, claim in enumerate(claims):
        for key, text in _claim_mistakes(claim, arms, search) if isinstance(claim, dict) else ():
            tree.refuse(("claims", index, key), text)
    if search is not None and "largest_learning_rate" not in measures:
        tree.refuse(("largest_learning_rate",), "no claim is about it, so no search is made; add one, or leave it out")


def _claim_mistakes(claim: dict[str, Any], arms: dict[str, dict[str, Any]], search: Any) -> Iterator[tuple[str, str]]:
    """The wrong key of a claim, and why. search: the section that says how the largest learning rate is found."""
    named = {key: claim[key] for key in ("arm", "over") if isinstance(claim.get(key), str)}
    for key, name in named.items():
        if name not in arms:
            yield key, f"there is no arm {name}; {suggestion(name, list(arms))}"
    if len(named) == 2 and claim["arm"] == claim["over"]:
        yield "over", f"is the same arm as arm, {claim['arm']}; a claim compares two"
    name = claim.get("measure")
    measure = MEASURES.get(name) if isinstance(name, str) else None
    if measure is None:
        return
    runs = {name: arms[name] for name in dict.fromkeys(named.values()) if name in arms}
    if measure.probe:
        unmeasured = [name for name, run in runs.items() if measure.probe not in _probed(run)]
        if unmeasured:
            add = f"add {measure.probe} to probes.measure"
            yield "measure", f"the probe {measure.probe} is not measured in arm {' and '.join(unmeasured)}; {add}"
        yield from (("measure", why) for arm, run in runs.items() for why in _nothing_measured(measure, arm, run))
    if name == "largest_learning_rate" and search is None:
        yield "measure", "needs the section largest_learning_rate, as in {steps: 300, accuracy: 0.8}"
    elif name == "largest_learning_rate" and isinstance(steps := value_at(search, ("steps",)), int):
        yield from (("measure", why) for arm, run in runs.items() for why in _search_mistakes(steps, arm, run))
    smoothing = [value_at(run, ("train", "label_smoothing"), 0) for run in runs.values()]
    if claim.get("when") == "equal loss" and any(each != smoothing[0] for each in smoothing):
        yield "when", "losses with different train.label_smoothing are not comparable"
    if name.endswith("_to_target") and any(value_at(run, ("train", "target")) is None for run in runs.values()):
        yield "measure", "needs train.target"
    for key, has in (("when", measure.probe is not None), ("layer", measure.per_layer)):
        if claim.get(key) is not None and not has:
            yield key, f"{name} has {'one value for a run' if key == 'when' else 'no layers'}; leave {key} out"
    layer = claim.get("layer") if measure.per_layer else None
    if isinstance(layer, str):
        yield from (("layer", why) for arm, run in runs.items() for why in _unknown_layer(layer, arm, run))
    metrics = {value_at(run, ("train", "target", "metric"), "accuracy") for run in runs.values()}
    within = {"shift.cosine": 2, "saturation.share": 1, "saturation.dead": 1}
    within |= {"final": 1, "best": 1} if metrics == {"accuracy"} else {}
    for key in ("at_least", "at_most"):
        bound = claim.get(key)
        if isinstance(bound, int | float) and measure.compared == "ratio" and bound <= 0:
            yield key, f"{name} is compared as a ratio: expected a number above 0, found {words(bound)}"
        elif isinstance(bound, int | float) and abs(bound) > within.get(name, math.inf):
            yield key, f"a difference of {name} is within -{within[name]} and {within[name]}, found {words(bound)}"


def _nothing_measured(measure: Measure, arm: str, run: dict[str, Any]) -> Iterator[str]:
    """Why an arm's model has no layer in which a probe measures a value; the user's own model is not known here."""
    try:
        recipe = Recipe.model_validate(run)
    except ValidationError:  # noted elsewhere
        return
    activation, norm = getattr(recipe.model, "activation", None), NORMS.get(recipe.norm.kind)
    if activation is None:  # the user's own model
        return
    if measure.activations and activation not in measure.activations:
        yield f"{measure.name} is of {listed(measure.activations)}, and arm {arm} has {activation}"
    if measure.norm == "any" and norm is None:
        yield f"arm {arm} has no norm; the covariance of its activations depends on their scale"
    if measure.norm == "cancels scale" and not (norm and norm.cancels_scale):
        yield f"arm {arm} has no norm in which the scale of a weight has no effect"


def _unknown_layer(layer: str, arm: str, run: dict[str, Any]) -> Iterator[str]:
    """Why an arm's model has no layer of that name, where the recipe alone tells its layers."""
    if run_mistakes(run):  # noted elsewhere
        return
    recipe = Recipe.model_validate(run)
    model = None if isinstance(recipe.data, Npz) else layers(recipe, *input_of(recipe))
    names = list(module_names(model)) if model else [layer]
    if layer not in names:
        near = nearest(layer, names) or names[-1:]
        yield f"arm {arm} has no layer {layer}; did you mean {listed(near)}?"


def _search_mistakes(steps: int, arm: str, run: dict[str, Any]) -> Iterator[str]:
    """What is wrong with an arm's run in the steps of the search for the largest learning rate, and only there."""
    if run_mistakes(run):  # noted elsewhere
        return
    for at, text in run_mistakes(merge(run, {"train": {"steps": steps, "evaluate_every": 1}})):
        yield f"in arm {arm}, with the {steps} steps of largest_learning_rate: {dotted(at)} {text}"
    if (warmup := value_at(run, ("schedule", "warmup"), 0)) >= steps:
        yield f"in arm {arm}, schedule.warmup {warmup} is no less than the {steps} steps of largest_learning_rate"


def _probed(run: dict[str, Any]) -> Sequence[str]:
    """The probes that a run measures."""
    section = run.get("probes")
    measured = section.get("measure", "all") if isinstance(section, dict) else ()
    return PROBES if "all" in (measured or ()) else [measured] if isinstance(measured, str) else measured or ()


# --- pydantic's errors in the recipe's words ----------------------------------------------------------------------


def mistakes(model: type[BaseModel], plain: dict[str, Any]) -> list[Found]:
    """What is wrong with a tree of sections, each as its place and a sentence."""
    try:
        model.model_validate(plain)
    except ValidationError as error:
        found: list[Found] = []
        for number, each in enumerate(all_found := error.errors(include_url=False)):
            keys = _keys(each["loc"], model)
            if number == MOST_MISTAKES:
                return [*found, (keys, f"is wrong, as {len(all_found) - number - 1:,} more are")]
            if each["type"] == "too_short" and len(each["input"]) >= each["ctx"]["min_length"]:
                continue  # pydantic has counted right elements only
            if each["type"] in ("union_tag_invalid", "union_tag_not_found"):
                found += _kind_mistakes(each["input"], keys, _choices(model, keys))
            elif each["type"] == "int_type" and _list_of(keys) in STEPS:
                found += [(keys, text) for text in _steps_mistake(each["input"], plain)]
            else:
                found.append((keys, _sentence(each, model, plain, keys)))
        return found
    return []


def _keys(location: tuple[Any, ...], model: type[BaseModel]) -> Keys:
    """pydantic names the chosen member of a union in a location; the recipe has no such level."""
    member = location[1:2] if len(_choices(model, location[:1])) > 1 else ()
    keys = location[:1] + location[1 + len(member) :]
    return keys[:2] + keys[3:] if keys[2:3] and keys[2] in MARKS else keys


def _choices(model: type[BaseModel], keys: Keys) -> list[type[BaseModel]]:
    """The section models among which the kind of the section at `keys` chooses, which is one of the model's own."""
    field = model.model_fields.get(str(keys[0])) if len(keys) == 1 else None
    return members(field.annotation) if field else []


def _kind_mistakes(section: dict[str, Any], keys: Keys, models: list[type[BaseModel]]) -> Iterator[Found]:
    """A kind that is missing or wrong, and the rest of its section as the kind that was probably meant."""
    default = getattr(Recipe.model_fields[str(keys[0])].get_default(), "kind", None)  # where the section is left out
    by_kind, names = kinds(models), list(dict.fromkeys(name for each in models for name in each.model_fields))
    key = next(key for key in KINDS if key in names)
    misspelt = [name for name in section if name not in names and key in nearest(name, names)]
    kind = section.get(key, section[misspelt[0]] if misspelt else None)
    if key in section:
        yield (*keys, key), _not_among(kind, list(by_kind))
    elif default and not misspelt and (of_others := section.keys() & {*names} - {*by_kind[default].model_fields}):
        for name in sorted(of_others):
            having = listed([kind for kind, each in by_kind.items() if name in each.model_fields])
            why = f"the {keys[0]} is {default}, which has no {name}; it belongs to {having}; set the kind too"
            yield (*keys, name), why
    elif not misspelt:
        yield (*keys, key), f"is missing; expected {listed(list(by_kind))}"
    meant = nearest(kind, list(by_kind))
    if len(meant) == 1:
        for at, text in mistakes(by_kind[meant[0]], {**section, key: meant[0]}):
            yield (*keys, *at), text
    else:
        wrong = [name for name in section if name not in names]
        yield from (((*keys, name), f"unknown key; {suggestion(name, names)}") for name in wrong)


def _steps_mistake(value: Any, run: dict[str, Any]) -> Iterator[str]:
    """What is wrong in place of steps; nothing where another mistake hides the length of an epoch."""
    if not isinstance(value, dict) or value.keys() != {"epochs"}:
        wrong = [key for key in value if key != "epochs"] if isinstance(value, dict) else []
        hint = "; did you mean epochs?" if nearest(wrong[0] if wrong else None, ["epochs"]) else ""
        yield f"expected a whole number of steps or {{epochs: n}}, found {listed(wrong or [words(value)])}{hint}"
    elif epochs_of(value) is None:
        yield f"expected a number of epochs above 0, found {words(value['epochs'])}"
    else:
        try:
            steps_per_epoch(run)
        except DataError as error:
            yield f"its epochs cannot be counted in steps: {error}"
        except ValidationError:
            return
        else:  # `in_steps` has replaced those that stand in a run
            yield "a grid takes steps, not epochs"


def _sentence(error: Any, model: type[BaseModel], plain: Any, keys: Keys) -> str:
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    owner = model_at(_list_of(keys)[:-1], plain, model)
    last = str(keys and _list_of(keys)[-1])
    if kind == "extra_forbidden":
        return f"unknown key; {_where_known(last, owner, _choices(model, keys[:-1]))}" if owner else "unknown key"
    if kind == "missing":
        return "is missing"
    if kind == "value_error":
        return str(context["error"])
    field = owner.model_fields.get(last) if owner else None
    if kind == "literal_error" and field:
        return _not_among(value, _literals(field.annotation))
    choice = [*PROBE_CHOICES, "a list"] if last == "probes" else [*kinds(members(field.annotation))] if field else []
    if choice and kind in ("model_type", "model_attributes_type"):
        return f"expected {', '.join(choice)} or a mapping, found {words(value)}"
    expected = _PATTERNS[context["pattern"]] if "pattern" in context else _EXPECTED.get(kind, "").format(**context)
    return f"expected {expected}, found {words(value)}" if expected else str(error["msg"])


def _list_of(keys: Keys) -> Keys:
    """The place of the list that an element is in, or the place itself of what is in none."""
    return keys[:-1] if keys and isinstance(keys[-1], int) else keys


def _literals(annotation: Any) -> list[Any]:
    """The values of a Literal, also of one that may be left out."""
    found = get_args(annotation)
    return list(found) if get_origin(annotation) is Literal else [name for each in found for name in _literals(each)]


def _where_known(key: str, owner: type[BaseModel], siblings: Sequence[type[BaseModel]]) -> str:
    """About a key that a section does not have: perhaps the section has it under another kind."""
    if key == "epochs" and "steps" in owner.model_fields:
        return "write steps: {epochs: n}"
    others = [kind for kind, model in kinds(siblings).items() if key in model.model_fields]
    if others:
        mine = [kind for kind, model in kinds(siblings).items() if model is owner]
        return f"it belongs to {listed(others)}, not to {listed(mine)}"
    return suggestion(key, list(owner.model_fields))


def _not_among(value: Any, names: Sequence[Any]) -> str:
    near = nearest(value, names)
    expected = f"one of {len(names)} names" if near and len(names) > 20 else listed(names)
    return f"expected {expected}, found {words(value)}{f'; did you mean {listed(near)}?' if near else ''}"


def words(value: Any) -> str:
    """A value for a sentence: short ones as JSON, which tells text from numbers."""
    names = {list: "a list", tuple: "a list", dict: "a mapping", type(None): "nothing"}
    shown = "an empty list" if value == [] else names.get(type(value)) or json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 60 else f"{shown[:50]} ..."


_PATTERNS = {ARM_NAME: "a name of letters, digits, spaces, +, - and _", FUNCTION_PATH: "package.module:function"}
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
    "string_too_short": "some text",
    "string_too_long": "at most {max_length} characters",
}
