"""Files of weights: what they hold, that a model made from one computes what the run's did, and files of others."""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import bncli
from bncli.engine import data
from bncli.engine.models import build
from bncli.engine.train import train
from bncli.engine.train.state import TrainState
from bncli.engine.train.weights import MODEL, evaluate_weights, tensors_of
from bncli.errors import FileError, UsageError
from bncli.recipe.sections import Recipe
from bncli.results.train import RunFinished, RunResult
from tests.conftest import OWN, TINY, tiny
from tests.engine.conftest import OwnRecipe

CPU = torch.device("cpu")


def trained(recipe: Recipe, folder: Path, **arguments: Any) -> RunResult:
    """A run that leaves model.safetensors, and best.safetensors where both are kept, in the folder."""
    save: dict[str, Callable[[bytes], Any]] = {
        "model": (folder / MODEL).write_bytes,
        "best": (folder / "best.safetensors").write_bytes,
    }
    *_, last = train(recipe, "cpu", threads=1, **{"save": save, **arguments})
    assert isinstance(last, RunFinished)
    return last.result


def short(**sections: Any) -> Recipe:
    return tiny(**{**sections, "train": {"steps": 20, "stop_at_target": False, **sections.get("train", {})}})


def metadata(content: bytes) -> dict[str, str]:
    found: dict[str, str] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    return found


# --- what is saved ------------------------------------------------------------------------------------------------


def test_a_model_is_loaded_from_the_folder_of_its_run_and_evaluates_as_there(tmp_path: Path) -> None:
    recipe = short()
    last = trained(recipe, tmp_path).evaluations[-1]
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    drawn = [random.random(), np.random.random(), torch.rand(1).item()]
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    model = bncli.load_model(tmp_path)
    assert [random.random(), np.random.random(), torch.rand(1).item()] == drawn  # no generator has moved
    assert not model.training
    x, y = data.load(recipe.data, CPU).held_out.x, data.load(recipe.data, CPU).held_out.labels  # type: ignore[attr-defined]
    assert (model(x).argmax(1) == y).float().mean().item() == pytest.approx(last.accuracy)
    found = evaluate_weights(tmp_path / MODEL, "cpu")
    assert (found.step, found.accuracy, found.loss) == (20, last.accuracy, last.loss)
    plain = build(recipe, (8,), 3)
    plain.load_state_dict(safetensors.torch.load_file(tmp_path / MODEL))


def test_the_metadata_say_what_the_weights_are_of(tmp_path: Path) -> None:
    recipe = short()
    result = trained(recipe, tmp_path)
    about = metadata((tmp_path / MODEL).read_bytes())
    assert about.pop("format") == "pt"
    found = {name: json.loads(text) for name, text in about.items()}
    assert Recipe.model_validate(found["recipe"]) == recipe
    last = result.evaluations[-1]
    assert found["metrics"] == {
        "step": 20, "accuracy": last.accuracy, "loss": last.loss, "train_loss": last.train_loss}  # fmt: skip
    same = ("shape", "classes", "threads", "bncli", "version")
    assert [found[name] for name in same] == [[8], 3, 1, bncli.__version__, 1]


@pytest.mark.parametrize("keep", ["last", "best", "both"])
@pytest.mark.parametrize("statistics", ["running", "precise"])
def test_the_weights_of_the_best_evaluation_are_kept_where_they_are_wanted(
    keep: str, statistics: str, tmp_path: Path
) -> None:
    target = {"metric": "loss", "value": 1e-9}
    sgd = {"kind": "sgd", "lr": 0.5, "momentum": 0.97}  # so much that the loss rises in between
    fields = {"keep": keep, "target": target, "population_statistics": statistics, "evaluate_every": 1, "steps": 60}
    result = trained(short(optimizer=sgd, train=fields), tmp_path)
    best, last = min(result.evaluations, key=lambda each: each.loss), result.evaluations[-1]
    assert best.step < last.step
    expected = {MODEL: best if keep == "best" else last} | ({"best.safetensors": best} if keep == "both" else {})
    assert {path.name for path in tmp_path.iterdir()} == set(expected)
    for name, evaluation in expected.items():
        found = evaluate_weights(tmp_path / name, "cpu")
        assert (found.step, found.accuracy, found.loss) == (evaluation.step, evaluation.accuracy, evaluation.loss)


def test_a_run_that_kept_no_best_weights_before_it_was_interrupted_says_so(tmp_path: Path) -> None:
    recipes = [short(train={"keep": keep, "target": {"value": 0.5}, "checkpoint": {"every": 12}}) for keep in
               ("last", "best")]  # fmt: skip
    checkpoints: list[bytes] = []
    first = trained(recipes[0], tmp_path, save={"checkpoint": checkpoints.append})
    best = max(first.evaluations, key=lambda each: each.accuracy)
    assert best.step <= 10
    with pytest.warns(UserWarning, match=f"the weights after step {best.step}, the best, were not kept"):
        trained(recipes[1], tmp_path, checkpoint=checkpoints[0])
    assert evaluate_weights(tmp_path / MODEL, "cpu").step == 20


def test_tied_and_strange_tensors_of_a_users_model_are_saved_and_loaded(own_recipe: OwnRecipe, tmp_path: Path) -> None:
    code = """
class Tied(nn.Module):
    def __init__(self, features, classes):
        super().__init__()
        self.a, self.b = nn.Linear(features, features), nn.Linear(features, features)
        self.b.weight = self.a.weight
        self.out = nn.Linear(features, classes)
        self.register_buffer("part", torch.arange(10.)[::2])
        self.register_buffer("phase", torch.ones(2, dtype=torch.complex128))
    def forward(self, x): return self.out(self.b(self.a(x)))
def make(shape, classes, norm): return Tied(shape[0], classes)
"""
    with pytest.warns(UserWarning, match="cannot hold phase, which it leaves out"):
        trained(own_recipe(code, train={"steps": 5, "target": None}), tmp_path)
    with pytest.raises(UsageError, match="mine:make, your own code, which would be executed; allow it with allow_code"):
        bncli.load_model(tmp_path)
    model = bncli.load_model(tmp_path, allow_code=True)
    assert model.a.weight is model.b.weight
    saved = tensors_of((tmp_path / MODEL).read_bytes())
    assert torch.equal(saved["a.weight"], saved["b.weight"])
    assert torch.equal(saved["part"], torch.arange(10.0)[::2])


# --- started from -------------------------------------------------------------------------------------------------


def test_a_run_starts_from_given_weights(tmp_path: Path) -> None:
    recipe = short()
    last = trained(recipe, tmp_path).evaluations[-1]
    again = trained(recipe, tmp_path, weights=tensors_of((tmp_path / MODEL).read_bytes()))
    first = again.evaluations[0]
    assert (first.step, first.accuracy, first.loss) == (0, last.accuracy, last.loss)


def test_weights_of_another_model_are_refused_with_their_names(tmp_path: Path) -> None:
    recipe = short()
    trained(recipe, tmp_path)
    weights = tensors_of((tmp_path / MODEL).read_bytes())
    shapes = {name: tuple(each.shape) for name, each in weights.items()}
    first, *others = weights
    odd = {name: weights[name] for name in others} | {"extra": torch.ones(1), others[0]: torch.ones(77)}
    with pytest.raises(UsageError) as raised:
        trained(recipe, tmp_path, weights=odd)
    assert raised.value.field == "from_weights"
    assert str(raised.value).splitlines() == [
        f"from_weights: 1 of its tensors is not there: {first}",
        "from_weights: 1 of its tensors is not of this model: extra",
        f"from_weights: 1 of its tensors is of another shape: {others[0]} (77,) for {shapes[others[0]]}",
    ]
    with pytest.raises(UsageError, match=rf"{len(weights)} of its tensors are not there: .*, \.\.\."):
        trained(recipe, tmp_path, weights={})


# --- files that nobody should trust -------------------------------------------------------------------------------


def test_no_file_of_others_ends_in_anything_but_a_sentence(tmp_path: Path, own_recipe: OwnRecipe) -> None:
    recipe = short()
    trained(recipe, tmp_path)
    content = (tmp_path / MODEL).read_bytes()
    tensors, about = tensors_of(content), metadata(content)
    plain = recipe.model_dump(mode="json")

    def made(**fields: Any) -> bytes:
        texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
        return safetensors.torch.save(tensors, about | texts)

    wide, deep = "[" * 100_000, {"kind": "mlp", "hidden": [10**9, 10**9], "init": {"kind": "orthogonal"}}
    code = {"kind": "module", "module": "mine:make"}
    own_recipe("open('opened', 'w')\n" + OWN.format(act="pass"))
    resnet = {"kind": "resnet", "depth": 18}
    whiten, one = {"kind": "whiten", "group_size": 10**6}, {"kind": "mlp", "hidden": [10**6]}
    bad = {
        "empty": b"", "text": b"hello", "long header": (2**63).to_bytes(8, "little") + b"{", "cut": content[:-1],
        "longer": content + b"x", "no metadata": safetensors.torch.save(tensors), "version": made(version=2),
        "no recipe": made(recipe={}), "nested": made(recipe=wide), "words": made(recipe="x"),
        "classes": made(classes=-1),
        "shape": made(shape=[0]), "shapes": made(shape=[2**31] * 3), "metrics": made(metrics={"step": "x"}),
        "threads": made(threads=10**9), "large": made(recipe=plain | {"model": deep}),
        "deep": made(recipe=plain | {"model": resnet}, shape=[3, 8, 8]), "code": made(recipe=plain | {"model": code}),
        "whiten": made(recipe=plain | {"norm": whiten, "model": one}, shape=[1]),
        "other": made(recipe=plain | {"model": {"kind": "mlp", "hidden": [15]}}), "unknown": made(extra=1),
    }  # fmt: skip
    for name, each in bad.items():
        file = tmp_path / f"{name}.safetensors"
        file.write_bytes(each)
        with pytest.raises((FileError, UsageError), match=rf"{name}\.safetensors: "):
            bncli.load_model(file)
    assert not Path("opened").exists()
    flips = random.Random(0)
    for _ in range(200):
        at = flips.randrange(len(content))
        (tmp_path / "flipped.safetensors").write_bytes(content[:at] + bytes([flips.randrange(256)]) + content[at + 1 :])
        with contextlib.suppress(FileError, UsageError):
            assert isinstance(bncli.load_model(tmp_path / "flipped.safetensors"), nn.Module)


def test_what_is_no_plain_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / MODEL).symlink_to(tmp_path / "secret")
    (tmp_path / "secret").write_bytes(b"")
    for path, why in (
        ("pipe", "is not a plain file"),
        ("run", "is a symbolic link"),
        ("none", "cannot be read: No such file"),
        ("", r"has no model\.safetensors, which a run saves at its end"),
        ("a\0b", "cannot be read: embedded null byte"),
    ):
        with pytest.raises(FileError, match=why):
            bncli.load_model(f"{tmp_path}/{path}")


# --- exact --------------------------------------------------------------------------------------------------------


def test_a_state_with_other_initial_weights_evaluates_the_same_file_alike(tmp_path: Path) -> None:
    """Initial weights that are fitted to data (lsuv) are replaced, so that a file needs none to be loaded."""
    recipe = short(model={"kind": "mlp", "hidden": [16], "init": {"kind": "lsuv"}})
    last = trained(recipe, tmp_path).evaluations[-1]
    assert isinstance(bncli.load_model(tmp_path), nn.Module)
    assert evaluate_weights(tmp_path / MODEL, "cpu").loss == last.loss
    assert TINY["model"] != recipe.model.model_dump()
    assert TrainState(recipe, data.load(recipe.data, CPU), CPU).step == 0


def test_weights_that_were_changed_since_are_evaluated_with_a_warning(tmp_path: Path) -> None:
    before = trained(short(), tmp_path).evaluations[-1]
    content = (tmp_path / MODEL).read_bytes()
    tensors = {name: -tensor for name, tensor in tensors_of(content).items()}
    (tmp_path / MODEL).write_bytes(safetensors.torch.save(tensors, metadata(content)))
    with pytest.warns(UserWarning, match=f"the accuracy was {before.accuracy:.4f} in training"):
        assert evaluate_weights(tmp_path / MODEL, "cpu").accuracy < before.accuracy
