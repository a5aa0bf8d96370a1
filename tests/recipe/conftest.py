"""A small recipe as text and as data, what loading a text gives, and an example of every kind of every section."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from bncli.errors import RecipeError
from bncli.recipe.load import Arm, Loaded, load
from bncli.recipe.overrides import members
from bncli.recipe.sections import Recipe

BASE = """\
data: {source: synthetic}
model: {kind: mlp}
optimizer: {kind: sgd, lr: 0.1}
train: {steps: 100}
"""
OWN = BASE.replace("{kind: mlp}", "{kind: module, module: a:b, arguments: {width: 3, depth: 2}}")

NORMS = "none, batch, layer, group, instance, whiten, iternorm, ghost, renorm, noisy, frozen, rms or dyt"
NORMS_WITH_EPS = "batch, layer, group, instance, whiten, iternorm, ghost, renorm, noisy, frozen or rms"
PROBES = "all, inputs, saturation, gradients, shift, landscape, regularization, whitening or scale"
SECTIONS = "data, model, norm, optimizer, schedule, train or probes"

Load = Callable[..., Loaded]

MistakesOf = Callable[..., tuple[str, ...]]


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Loads a text as the file r.yaml."""
    monkeypatch.chdir(tmp_path)

    def write_and_load(text: str, *sets: str, allow_code: bool = False) -> Loaded:
        Path("r.yaml").write_text(text)
        return load("r.yaml", sets, allow_code)

    return write_and_load


@pytest.fixture
def mistakes_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MistakesOf:
    """What is wrong with a text as the file r.yaml, after flags; nothing if it loads."""
    monkeypatch.chdir(tmp_path)

    def write_and_load(text: str, *sets: str, allow_code: bool = False) -> tuple[str, ...]:
        Path("r.yaml").write_text(text)
        try:
            load("r.yaml", sets, allow_code)
        except RecipeError as refused:
            return refused.mistakes
        return ()

    return write_and_load


def arm(loaded: Loaded, name: str) -> Recipe:
    return next(arm.recipe for arm in loaded.arms if arm.name == name)


def given_fields(loaded: Loaded, arm: Arm) -> dict[str, str]:
    return {path: place for path, _, place in loaded.provenance(arm) if place != "default"}


def optimizer(fields: str) -> str:
    return BASE.replace("kind: sgd, lr: 0.1", fields)


# --- as plain data ------------------------------------------------------------------------------------------------

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
        "mnist": {},
        "synthetic": {},
        "npz": {"path": "x.npz"},
        "hub": {"name": "cifar10", "shape": [3, 32, 32], "classes": 10},
    },
    "model": {"mlp": {}, "cnn": {}, "resnet": {"depth": 20}, "inception": {}, "module": {"module": "my.net:make"}},
    "norm": {
        "none": {},
        "batch": {},
        "layer": {},
        "group": {},
        "instance": {},
        "whiten": {},
        "iternorm": {},
        "ghost": {},
        "renorm": {},
        "noisy": {},
        "frozen": {"after": 5},
        "rms": {},
        "dyt": {},
    },
    "optimizer": {"sgd": {"lr": 0.1}, "adam": {"lr": 0.1}, "adamw": {"lr": 0.1}},
    "schedule": {"constant": {}, "exponential": {"gamma": 0.9}, "step": {"milestones": [5, 9]}, "cosine": {}},
}
KINDS_OF_SECTIONS = [(section, kind) for section, examples in EXAMPLES.items() for kind in examples]


def section_of(section: str, kind: str) -> dict[str, Any]:
    return {"source" if section == "data" else "kind": kind, **EXAMPLES[section][kind]}


def models(model: type[BaseModel]) -> set[type[BaseModel]]:
    inner = {member for field in model.model_fields.values() for member in members(field.annotation)}
    return {model}.union(*(models(each) for each in inner))
