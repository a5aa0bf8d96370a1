"""The recipe's models: closed, strict and frozen; and their JSON Schema, from which editors complete keys."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from bncli.recipe.load import Arm, load, plain
from bncli.recipe.overrides import KINDS, kinds, members
from bncli.recipe.schema import json_schema
from bncli.recipe.sections import Recipe, RecipeFile, shorthand_key
from bncli.recipe.yaml import parse

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SCHEMA = ROOT / "recipes" / "recipe.schema.json"

RUN: dict[str, Any] = {
    "data": {"source": "synthetic", "shape": [3, 8, 8]},
    "model": {"kind": "mlp"},
    "norm": {"kind": "none"},
    "optimizer": {"kind": "sgd", "lr": 0.1},
    "schedule": {"kind": "constant"},
    "train": {"steps": 100},
}
EXAMPLES: dict[str, dict[str, dict[str, Any]]] = {  # what a kind cannot do without
    "data": {
        "digits": {},
        "synthetic": {},
        "npz": {"path": "x.npz"},
        "hub": {"name": "cifar10", "shape": [3, 32, 32], "classes": 10},
    },
    "model": {"mlp": {}, "cnn": {}, "resnet": {"depth": 20}, "module": {"module": "my.net:make"}},
    "norm": {"none": {}, "batch": {}, "layer": {}, "group": {}, "instance": {}},
    "optimizer": {"sgd": {"lr": 0.1}, "adam": {"lr": 0.1}, "adamw": {"lr": 0.1}},
    "schedule": {"constant": {}, "exponential": {"gamma": 0.9}, "step": {"milestones": [5, 9]}, "cosine": {}},
}
KINDS_OF_SECTIONS = [(section, kind) for section, examples in EXAMPLES.items() for kind in examples]


def section_of(section: str, kind: str) -> dict[str, Any]:
    return {"source" if section == "data" else "kind": kind, **EXAMPLES[section][kind]}


# --- the models ---------------------------------------------------------------------------------------------------


def test_every_kind_of_every_section_has_an_example_here() -> None:
    for section, examples in EXAMPLES.items():
        assert list(examples) == list(kinds(members(Recipe.model_fields[section].annotation)))


@pytest.mark.parametrize(("section", "kind"), KINDS_OF_SECTIONS)
def test_a_section_needs_no_more_than_its_example(section: str, kind: str) -> None:
    resolved = plain(Recipe.model_validate({**RUN, section: section_of(section, kind)}))
    assert {**resolved[section], **section_of(section, kind)} == resolved[section]
    assert Recipe.model_validate(resolved) == Recipe.model_validate({**RUN, section: section_of(section, kind)})


@pytest.mark.parametrize(
    ("section", "kind", "field"),
    [(section, kind, field) for section, kind in KINDS_OF_SECTIONS for field in EXAMPLES[section][kind]],
)
def test_nothing_in_an_example_can_be_left_out(section: str, kind: str, field: str) -> None:
    incomplete = {name: value for name, value in section_of(section, kind).items() if name != field}
    with pytest.raises(ValidationError, match="Field required"):
        Recipe.model_validate({**RUN, section: incomplete})


def models(model: type[BaseModel]) -> set[type[BaseModel]]:
    inner = {member for field in model.model_fields.values() for member in members(field.annotation)}
    return {model}.union(*(models(each) for each in inner))


def test_every_section_is_closed_strict_frozen_and_refuses_infinity() -> None:
    for model in models(RecipeFile):
        assert model.model_config["extra"] == "forbid"
        assert model.model_config["strict"]
        assert model.model_config["frozen"]
        assert not model.model_config["allow_inf_nan"]


def test_a_recipe_cannot_be_changed() -> None:
    recipe = Recipe.model_validate(RUN)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.train.steps = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("section", "kind", "fields"),
    [
        ("optimizer", "sgd", {"lr": 1e-300, "momentum": 0, "weight_decay": 0}),
        ("optimizer", "sgd", {"lr": 1, "momentum": 0.999, "nesterov": True}),
        ("optimizer", "adam", {"lr": 1, "betas": [0, 0.999]}),
        ("norm", "batch", {"momentum": 1}),
        ("norm", "batch", {"momentum": None, "affine": False, "track_running_stats": False}),
        ("schedule", "cosine", {"final": 1}),
        ("schedule", "exponential", {"gamma": 1}),
        ("data", "digits", {"held_out": 1796, "split_seed": 0}),
        ("model", "mlp", {"hidden": [1], "init": {"kind": "gaussian", "std": 5e-324}}),
    ],
)
def test_the_ends_of_a_range_that_belong_to_it_are_accepted(section: str, kind: str, fields: dict[str, Any]) -> None:
    found = plain(Recipe.model_validate({**RUN, section: {**section_of(section, kind), **fields}}))[section]
    assert {name: found[name] for name in fields} == fields


@pytest.mark.parametrize(
    ("section", "kind", "field", "value"),
    [
        ("optimizer", "sgd", "lr", 0),
        ("optimizer", "sgd", "weight_decay", -0.1),
        ("optimizer", "adam", "betas", [0.9, 1]),
        ("norm", "batch", "momentum", 0),
        ("norm", "batch", "momentum", 1.5),
        ("norm", "batch", "eps", 0),
        ("norm", "group", "groups", 0),
        ("schedule", "cosine", "final", 1.1),
        ("schedule", "exponential", "gamma", 0),
        ("schedule", "step", "milestones", []),
        ("schedule", "constant", "warmup", -1),
        ("data", "digits", "held_out", 0),
        ("data", "synthetic", "classes", 1),
        ("data", "synthetic", "noise", -1),
        ("data", "hub", "shape", [3, 32]),
        ("model", "mlp", "hidden", [0]),
        ("model", "module", "module", "my.net"),
        ("model", "module", "module", "my net:make"),
    ],
)
def test_what_lies_past_the_end_of_a_range_is_refused(section: str, kind: str, field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as refused:
        Recipe.model_validate({**RUN, section: {**section_of(section, kind), field: value}})
    assert {error["loc"][:3] for error in refused.value.errors()} == {(section, kind, field)}


# --- the shipped recipes and the JSON Schema ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def validator() -> Any:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(json_schema())
    return jsonschema.Draft202012Validator(json_schema())


def test_the_schema_beside_the_recipes_is_the_one_that_the_models_make() -> None:
    regenerate = "python -m bncli.recipe.schema > recipes/recipe.schema.json"
    assert json.loads(SCHEMA.read_text()) == json_schema(), f"the schema is out of date; make it again: {regenerate}"


def test_the_module_prints_the_schema_when_it_is_run() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "bncli.recipe.schema"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ran.stdout == SCHEMA.read_text()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_shipped_recipe_fits_the_models_and_the_schema_as_it_stands_and_resolved(
    validator: Any, path: Path
) -> None:
    validator.validate(parse(path.read_text(), path.name).root)
    loaded = load(str(path))
    for arm in (Arm("", loaded.base), *loaded.arms):
        validator.validate(plain(arm.recipe))


@pytest.mark.parametrize(("section", "kind"), KINDS_OF_SECTIONS)
def test_the_schema_accepts_a_section_in_the_base_and_its_bare_name_in_an_arm(
    validator: Any, section: str, kind: str
) -> None:
    validator.validate({**RUN, section: section_of(section, kind)})
    validator.validate(plain(Recipe.model_validate({**RUN, section: section_of(section, kind)})))
    validator.validate({**RUN, "arms": {"a": {section: kind}, "b": {section: section_of(section, kind)}}})


@pytest.mark.parametrize(
    "change",
    [
        {"norm": "batch"},
        {"data": "digits"},
        {"model": {"kind": "mlp", "init": "xavier"}},
        {"model": {"kind": "mlp", "init": {"kind": "gaussian", "std": 0.1}}},
        {"schedule": {"warmup": 5}},
        {"train": {"steps": 5, "target": {"value": 0.9}}},
        {"train": {"steps": 5, "target": None}},
        {"arms": {"plain": None, "lr": {"optimizer": {"lr": 3}}, "deep": {"model": {"hidden": [9, 9], "init": "he"}}}},
        {"arms": {"groups": {"norm": {"eps": 1e-3}}, "long": {"train": {"batch_size": 9}}}},
        {"grid": {"optimizer.lr": [0.1, 1]}, "reference": "plain", "seeds": {"tune": 2}, "arms": {"plain": {}}},
    ],
)
def test_the_schema_accepts_shorthands_and_partial_arms(validator: Any, change: dict[str, Any]) -> None:
    validator.validate({**RUN, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"nrom": "batch"},
        {"norm": "no"},
        {"norm": {"kind": "batch", "momentun": 0.1}},
        {"norm": {"kind": "layer", "momentum": 0.1}},
        {"model": {"hidden": [9]}},
        {"model": {"kind": "mlp", "init": {"kind": "gaussian", "sdt": 0.1}}},
        {"optimizer": {"kind": "sgd"}},
        {"optimizer": {"kind": "sgd", "lr": 0}},
        {"optimizer": {"kind": "sgd", "lr": "fast"}},
        {"train": {}},
        {"train": {"steps": 5, "target": {}}},
        {"train": {"steps": 5, "evaluate_evry": 1}},
        {"arms": {"a": {"optimzer": {"lr": 3}}}},
        {"arms": {"a": {"optimizer": {"lrr": 3}}}},
        {"arms": {"a": {"norm": "no"}}},
        {"arms": {"a": 3}},
        {"arms": {"a/b": {}}},
        {"grid": {"optimizer.lr": 3}},
        {"grid": {"optimizer.lr": []}},
        {"seeds": {"tunes": 3}},
    ],
)
def test_the_schema_refuses_a_typo_a_wrong_type_and_a_missing_field(validator: Any, change: dict[str, Any]) -> None:
    assert not validator.is_valid({**RUN, **change})
    assert validator.is_valid(RUN)


def test_the_schema_needs_every_section_that_the_models_need(validator: Any) -> None:
    for section in ("data", "model", "optimizer", "train"):
        assert not validator.is_valid({name: value for name, value in RUN.items() if name != section})


def test_the_schema_offers_every_field_of_every_section_with_its_description() -> None:
    definitions = json_schema()["$defs"]
    for model in models(Recipe) - {Recipe}:
        shown = definitions[model.__name__]
        assert list(shown["properties"]) == list(model.model_fields)
        described = {name: field.description for name, field in model.model_fields.items() if field.description}
        assert {name: shown["properties"][name].get("description") for name in described} == described


def test_the_keys_that_choose_a_kind_are_those_of_the_shorthands() -> None:
    assert {shorthand_key(section) for section in EXAMPLES} == set(KINDS)
