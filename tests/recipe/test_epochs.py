"""Epochs in place of steps: where they may stand, how they are counted, and what overrides and arms do to them."""

from __future__ import annotations

import gzip
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bncli.engine import data
from bncli.engine.data.splits import order
from bncli.recipe.epochs import STEPS, epochs_of, in_steps
from bncli.recipe.load import Loaded, plain
from bncli.recipe.overrides import value_at
from bncli.recipe.schema import json_schema
from bncli.recipe.sections import EPOCHS
from tests.recipe.conftest import OWN, Load, MistakesOf, arm

# 1,000 training examples make 20 steps of 50.
BASE = """\
data: {source: synthetic, examples: 1000}
model: {kind: mlp}
optimizer: {kind: sgd, lr: 0.1}
train: {steps: {epochs: 3}, batch_size: 50}
"""


def steps(loaded: Loaded) -> int:
    return loaded.base.train.steps


def test_epochs_become_steps_wherever_steps_stand(loaded: Load) -> None:
    found = loaded(
        "data: {source: synthetic, examples: 1000}\nmodel: mlp\noptimizer: {kind: sgd, lr: 0.1}\n"
        "train: {steps: {epochs: 3}, batch_size: 50, evaluate_every: {epochs: 0.5}}\n"
        "schedule: {kind: step, milestones: [{epochs: 1}, 45, {epochs: 2.5}], warmup: {epochs: 0.1}}\n"
        "probes: {at: {epochs: 1}}\nlargest_learning_rate: {steps: {epochs: 2}}\n"
        "claims: [{say: so, measure: largest_learning_rate, arm: other, over: base, at_least: 3}]\n"
        "arms: {base: {}, other: {schedule: {kind: exponential, gamma: 0.9, every: {epochs: 1}}}}\n"
    )
    resolved, other = plain(found.file), plain(arm(found, "other"))
    assert [value_at(resolved, ["train", field]) for field in ("steps", "evaluate_every")] == [60, 10]
    assert (resolved["schedule"]["milestones"], resolved["schedule"]["warmup"]) == ([20, 45, 50], 2)
    assert (resolved["probes"]["at"], resolved["largest_learning_rate"]["steps"]) == (20, 40)
    assert (other["schedule"]["every"], other["schedule"]["warmup"]) == (20, 2)


def test_a_norm_counts_the_micro_batches_of_an_epoch(loaded: Load) -> None:
    """1,000 examples make 20 batches of 50, which are 40 batches of 25 for the norm."""
    found = loaded(
        BASE.replace("batch_size: 50", "batch_size: 50, accumulate: 2") + "arms:\n"
        "  frozen: {norm: {kind: frozen, after: {epochs: 2}}}\n"
        "  ramp: {norm: {kind: renorm, warmup: {epochs: 1}, r_steps: {epochs: 2.5}, d_steps: 70}}\n"
    )
    assert plain(arm(found, "frozen"))["norm"]["after"] == 80
    assert [plain(arm(found, "ramp"))["norm"][field] for field in ("warmup", "r_steps", "d_steps")] == [40, 100, 70]


def test_the_schema_offers_epochs_in_those_fields_and_in_no_other() -> None:
    def offers(schema: Any) -> bool:
        inside = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ()
        return schema == EPOCHS or any(map(offers, inside))

    definitions = json_schema()["$defs"]
    found = {name for model in definitions.values() for name, field in model["properties"].items() if offers(field)}
    assert found == {field for _, field in STEPS}


@pytest.mark.parametrize(
    ("epochs", "expected"), [(1, 20), (0.05, 1), (0.051, 2), (0.0001, 1), (0.15, 3), (1.1, 22), (1.15, 23)]
)
def test_a_part_of_an_epoch_is_rounded_up_to_whole_steps_without_errors_of_binary_fractions(
    epochs: float, expected: int
) -> None:
    """1.1 * 20 is 22.000000000000004 in floating point."""
    run = {"data": {"source": "synthetic", "examples": 1000}, "train": {"steps": {"epochs": epochs}, "batch_size": 50}}
    assert in_steps(run)["train"]["steps"] == expected
    assert run["train"]["steps"] == {"epochs": epochs}  # the file's own tree is left as it is


@pytest.mark.parametrize("value", [3, None, "epochs", {}, {"epochs": 0}, {"epochs": True}, {"epochs": 1, "more": 1}])
def test_other_values_are_no_epochs(value: Any) -> None:
    assert epochs_of(value) is None


def test_the_batch_size_is_the_recipes_default_where_it_gives_none(loaded: Load) -> None:
    assert steps(loaded(BASE.replace(", batch_size: 50", ""))) == 3 * (1000 // 60)


def test_an_epoch_in_steps_is_what_the_loader_takes_for_one(loaded: Load) -> None:
    found = loaded(BASE.replace("epochs: 3", "epochs: 1").replace("batch_size: 50", "batch_size: 60"))
    batches = order(1000, 60, torch.Generator().manual_seed(0))
    seen = torch.cat(list(islice(batches, steps(found))))
    assert len(seen.unique()) == len(seen) == 960
    assert len(torch.cat([seen, next(batches)]).unique()) < 1020


def images(count: int) -> bytes:
    return bytes([0, 0, 8, 3]) + count.to_bytes(4, "big") + bytes([0, 0, 0, 28] * 2) + bytes(count * 784)


@pytest.mark.parametrize(
    ("source", "examples"),
    [
        ("digits", 1297),
        ("{source: digits, held_out: 797}", 1000),
        ("{source: mnist}", 4000),
        ("{source: mnist, path: plain}", 130),
        ("{source: mnist, path: compressed}", 140),
        ("{source: npz, path: whole.npz, held_out: 100}", 200),
        ("{source: npz, path: tested.npz}", 300),
        ("{source: hub, name: cifar10, shape: [3, 32, 32], classes: 10, examples: 50000}", 50000),
    ],
)
def test_the_training_examples_are_counted_without_loading_them(
    loaded: Load, tmp_path: Path, source: str, examples: int
) -> None:
    x, y = np.zeros((300, 8), np.float32), np.arange(300) % 3
    np.savez(tmp_path / "whole.npz", x=x, y=y)
    np.savez(tmp_path / "tested.npz", x=x, y=y, x_test=x[:9], y_test=y[:9])
    for folder, name, content in (
        ("plain", "train-images-idx3-ubyte", images(130)),
        ("compressed", "train-images-idx3-ubyte.gz", gzip.compress(images(140))),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(content)
    found = loaded(BASE.replace("{source: synthetic, examples: 1000}", source).replace("50}", "10}"))
    assert steps(found) == 3 * (examples // 10)
    if "npz" in source:
        assert len(data.load(found.base.data, torch.device("cpu")).train) == examples


def test_epochs_of_no_training_examples_are_refused(mistakes_of: MistakesOf, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros((30, 8), np.float32), y=np.arange(30) % 3)
    text = BASE.replace("{source: synthetic, examples: 1000}", "{source: npz, path: x.npz, held_out: 40}")
    why = "its epochs cannot be counted in steps: a batch of 50 is larger than the 0 training examples"
    assert mistakes_of(text) == (f"r.yaml:4: train.steps: {why}",)


def test_a_flag_gives_or_replaces_epochs_and_says_so(loaded: Load) -> None:
    found = loaded(BASE, "train.steps={epochs: 5}", "train.evaluate_every={points_per_doubling: 8}")
    assert steps(found) == 100
    given = {path: place for path, _, place in found.provenance(found.arm("r"))}
    assert given["train.steps"] == "sets train.steps={epochs: 5} (epochs)"
    spaced = loaded(BASE, "train.evaluate_every={points_per_doubling: 8}", "train.evaluate_every={epochs: 1}")
    assert spaced.base.train.evaluate_every == 20
    assert steps(loaded(BASE, "train.steps=17")) == 17
    assert steps(loaded(BASE.replace("{epochs: 3}", "9"), "train.steps={epochs: 1}")) == 20


def test_an_arm_counts_epochs_by_its_own_batch_size_and_names_their_line(loaded: Load) -> None:
    found = loaded(
        BASE + "arms:\n  half: {train: {batch_size: 25}}\n  fixed: {train: {steps: 17}}\n"
        "  long: {train: {steps: {epochs: 4}}}\n"
    )
    by_name = {each.name: each for each in found.arms}
    assert [by_name[name].recipe.train.steps for name in ("half", "fixed", "long")] == [120, 17, 80]
    places = {
        name: next(place for path, _, place in found.provenance(each) if path == "train.steps")
        for name, each in by_name.items()
    }
    assert places == {"half": "r.yaml:4 (epochs)", "fixed": "r.yaml:7", "long": "r.yaml:8 (epochs)"}


def test_an_arm_that_gives_a_field_of_the_grid_in_epochs_fixes_it(loaded: Load) -> None:
    found = loaded(BASE + "arms: {a: {}, b: {schedule: {warmup: {epochs: 1}}}}\ngrid: {schedule.warmup: [0, 5]}\n")
    assert [each.fixed for each in found.arms] == [(), ("schedule.warmup",)]


def test_an_argument_of_an_own_model_may_be_called_epochs(loaded: Load) -> None:
    text = OWN.replace("width: 3", "epochs: 3") + "grid: {model.arguments.epochs: [1, 2]}\n"
    found = loaded(text + "arms: {a: {}, b: {model: {arguments: {epochs: 5}}}}\n", allow_code=True)
    assert [each.fixed for each in found.arms] == [(), ("model.arguments.epochs",)]
