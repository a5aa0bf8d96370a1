"""Epochs in place of steps: `{epochs: n}` wherever a recipe has optimizer steps. No torch.

An epoch is examples // batch_size steps: the incomplete batch at its end is dropped (engine.data.splits.order).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

from pydantic import TypeAdapter, ValidationError

from bncli.errors import DataError
from bncli.recipe.layers import training_examples
from bncli.recipe.sections import DataSection, Positive, Train
from bncli.recipe.yaml import Keys

STEPS = (  # the fields of a recipe that are steps
    ("train", "steps"),
    ("train", "evaluate_every"),
    ("schedule", "warmup"),
    ("schedule", "every"),
    ("schedule", "milestones"),
    ("probes", "at"),
    ("largest_learning_rate", "steps"),
    *(("norm", field) for field in ("after", "warmup", "r_steps", "d_steps")),
)


def in_steps(run: dict[str, Any]) -> dict[str, Any]:
    """A run with its epochs as steps: rounded up, and at least 1. A norm's are batches, of which `accumulate` has more.

    What cannot be counted is left as it is, so that validation refuses it (`recipe.check`).
    """
    sections = {name: dict(run[name]) for name, _ in STEPS if isinstance(run.get(name), dict)}
    fields = [(name, field) for name, field in STEPS if field in sections.get(name, ())]
    if not any(epochs_of(item) for name, field in fields for item in _items(sections[name][field])):
        return run
    try:
        per_epoch = steps_per_epoch(run)
        batches = per_epoch * _of_train(run, "accumulate")
    except (DataError, ValidationError):
        return run
    for name, field in fields:
        value = sections[name][field]
        steps = [_steps(item, batches if name == "norm" else per_epoch) for item in _items(value)]
        sections[name][field] = steps if isinstance(value, list) else steps[0]
    return run | sections


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _steps(value: Any, per_epoch: int) -> Any:
    epochs = epochs_of(value)
    return value if epochs is None else max(1, math.ceil(epochs * per_epoch))


def epochs_of(value: Any) -> Fraction | None:
    """n of `{epochs: n}`, exactly as it is written; None for anything else."""
    number = value["epochs"] if isinstance(value, dict) and value.keys() == {"epochs"} else None
    right = isinstance(number, int | float) and not isinstance(number, bool) and 0 < number < math.inf
    return Fraction(str(number)) if right else None


def steps_per_epoch(run: dict[str, Any]) -> int:
    """The optimizer steps of an epoch of a run that is plain data.

    Raises DataError where the number of training examples is unknown or less than a batch, and pydantic's
    ValidationError where the data or the batch size are not a recipe's.
    """
    examples = training_examples(TypeAdapter(DataSection).validate_python(run.get("data")))
    if examples is None:
        raise DataError("the number of training examples is not known before they are loaded; give it as data.examples")
    batch_size = _of_train(run, "batch_size")
    if batch_size > examples:
        raise DataError(f"a batch of {batch_size} is larger than the {examples} training examples")
    return examples // batch_size


def _of_train(run: dict[str, Any], field: str) -> int:
    """A whole number of the section train, or its default. Raises ValidationError for another value."""
    train, default = run.get("train"), Train.model_fields[field].default
    value = train.get(field, default) if isinstance(train, dict) else default
    return TypeAdapter(Positive).validate_python(value, strict=True)


def given_in_epochs(places: Iterable[Keys]) -> set[Keys]:
    """Those fields among the places of a recipe file, the base's and the arms', whose value is in epochs."""
    fields = [(keys[: 4 if keys[:1] == ("arms",) else 2]) for keys in places if keys[-1:] == ("epochs",)]
    return {field for field in fields if field[-2:] in STEPS}
