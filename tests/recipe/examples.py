"""A small recipe as plain data, and an example of every kind of every section."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from bncli.recipe.overrides import members

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


def models(model: type[BaseModel]) -> set[type[BaseModel]]:
    inner = {member for field in model.model_fields.values() for member in members(field.annotation)}
    return {model}.union(*(models(each) for each in inner))
