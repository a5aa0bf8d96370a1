"""The JSON Schema of a recipe: what it accepts, refuses and describes; the file beside the shipped recipes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bncli.recipe.load import Arm, load, plain
from bncli.recipe.schema import json_schema
from bncli.recipe.sections import Recipe
from bncli.recipe.yaml import parse
from tests.recipe.conftest import KINDS_OF_SECTIONS, RUN, models, section_of

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
SCHEMA = ROOT / "recipes" / "recipe.schema.json"


@pytest.fixture(scope="module")
def validator() -> Any:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(json_schema())
    return jsonschema.Draft202012Validator(json_schema())


def test_the_schema_beside_the_recipes_is_what_the_module_prints() -> None:
    command = [sys.executable, "-m", "bncli.recipe.schema"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout == SCHEMA.read_text(), "make it again: python -m bncli.recipe.schema > recipes/recipe.schema.json"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_shipped_recipe_fits_the_models_and_the_schema(validator: Any, path: Path) -> None:
    validator.validate(parse(path.read_text(), path.name).root)
    loaded = load(str(path), allow_code=True)
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
        {"schedule": {"kind": "step", "milestones": [{"epochs": 1}, 90], "warmup": {"epochs": 0.5}}},
        {"train": {"steps": {"epochs": 3}, "evaluate_every": {"epochs": 0.1}}},
        {"probes": {"at": {"epochs": 1}}, "largest_learning_rate": {"steps": {"epochs": 1}}},
        {"arms": {"long": {"train": {"steps": {"epochs": 3}}}}},
        {
            "probes": "all",
            "arms": {"a": {"probes": ["inputs", "shift"]}, "b": {"probes": None}, "c": {"probes": "scale"}},
        },
        {"probes": {"measure": "inputs"}},
        {"train": {"steps": 5, "target": {"value": 0.9}}},
        {"train": {"steps": 5, "target": None}},
        {"arms": {"plain": None, "lr": {"optimizer": {"lr": 3}}, "deep": {"model": {"hidden": [9, 9], "init": "he"}}}},
        {"arms": {"groups": {"norm": {"eps": 1e-3}}, "long": {"train": {"batch_size": 9}}}},
        {"grid": {"optimizer.lr": {"log": [0.01, 10], "points": 7}, "norm.eps": [1, 2]}},
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
        {"probes": "input"},
        {"probes": ["inputs", "drift"]},
        {"probes": []},
        {"train": {"steps": {"epoch": 3}}},
        {"train": {"steps": {"epochs": 0}}},
        {"train": {"steps": {"epochs": 1, "points_per_doubling": 1}}},
        {"train": {"steps": 100, "batch_size": {"epochs": 1}}},
        {"train": {"steps": 5, "target": {}}},
        {"train": {"steps": 5, "evaluate_evry": 1}},
        {"arms": {"a": {"optimzer": {"lr": 3}}}},
        {"arms": {"a": {"optimizer": {"lrr": 3}}}},
        {"arms": {"a": {"norm": "no"}}},
        {"arms": {"a": 3}},
        {"arms": {"a/b": {}}},
        {"grid": {"optimizer.lr": 3}},
        {"grid": {"optimizer.lr": []}},
        {"grid": {"optimizer.lr": {"log": [1, 2], "points": 1}}},
        {"grid": {"optimizer.lr": {"log": [1, 2, 3], "points": 3}}},
        {"grid": {"optimizer.lr": {"lgo": [1, 2], "points": 3}}},
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
