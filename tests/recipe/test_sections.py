"""The recipe's models: closed, strict and frozen, with their kinds and the ends of their ranges."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from bncli.recipe.load import plain
from bncli.recipe.overrides import kinds, members
from bncli.recipe.sections import KINDS, Recipe, RecipeFile, shorthand_key
from tests.recipe.conftest import EXAMPLES, KINDS_OF_SECTIONS, RUN, models, section_of


def test_every_kind_of_every_section_has_an_example_here() -> None:
    for section, examples in EXAMPLES.items():
        assert list(examples) == list(kinds(members(Recipe.model_fields[section].annotation)))


@pytest.mark.parametrize(("section", "kind"), KINDS_OF_SECTIONS)
def test_a_section_needs_its_example_and_no_more(section: str, kind: str) -> None:
    example = section_of(section, kind)
    resolved = plain(Recipe.model_validate({**RUN, section: example}))
    assert {**resolved[section], **example} == resolved[section]
    assert Recipe.model_validate(resolved) == Recipe.model_validate({**RUN, section: example})
    for field in EXAMPLES[section][kind]:
        with pytest.raises(ValidationError, match="Field required"):
            Recipe.model_validate({**RUN, section: {name: value for name, value in example.items() if name != field}})


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


def test_the_keys_that_choose_a_kind_are_those_of_the_shorthands() -> None:
    assert {shorthand_key(section) for section in EXAMPLES} == set(KINDS)
