"""Models of the step view: arms of a recipe that take the same work, modules of the user's own, and their norms."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from bncli.engine.models import build
from bncli.engine.train import train
from bncli.errors import UsageError
from bncli.measure.profile.step_models import RecipeModel, UserModel, norms_of, recipe_models
from bncli.measure.profile.steps import StepRun
from bncli.recipe.load import load
from bncli.results.profile import NormLayers, Note
from tests.conftest import tiny

CPU = torch.device("cpu")


def test_the_weights_stay_while_a_recipes_step_is_timed() -> None:
    model = RecipeModel("tiny", tiny(optimizer={"kind": "adam", "lr": 0.1}))
    trainable = model.trainable("native", model.dataset(CPU), CPU)
    before = [parameter.clone() for parameter in trainable.model.parameters()]
    for _ in range(20):
        trainable.step(*trainable.batch())
    for parameter, start in zip(trainable.model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter, start, rtol=0, atol=1e-10)


def test_a_learner_trains_at_the_recipes_own_rate() -> None:
    model = RecipeModel("tiny", tiny())
    trainable = model.trainable("native", model.dataset(CPU), CPU, learns=True)
    losses = [float(trainable.step(*trainable.batch())) for _ in range(40)]
    assert losses[-1] < losses[0] / 2


ARMS = """
data: {source: synthetic, shape: [8], examples: 100}
model: {kind: mlp, hidden: [8]}
optimizer: {kind: sgd, lr: 0.1, momentum: 0.9}
train: {steps: 10, batch_size: 20}
arms:
  plain: {}
  faster: {optimizer: {lr: 1.0}}
  other start: {model: {init: xavier}}
  without momentum: {optimizer: {momentum: 0.0}}
  normed: {norm: batch}
  fused: {norm: {kind: batch, kernel: fused, momentum: 0.2}}
  cumulative: {norm: {kind: batch, momentum: null}}
  large: {train: {batch_size: 50}}
  micro-batches: {train: {accumulate: 2}}
  clipped: {train: {clip_gradients: 1.0}}
  clipped less: {train: {clip_gradients: 2.0}}
"""


@pytest.fixture
def arms(tmp_path: Path) -> str:
    (tmp_path / "arms.yaml").write_text(ARMS)
    return str(tmp_path / "arms.yaml")


@pytest.mark.usefixtures("other")
def test_arms_whose_steps_take_the_same_work_are_one(arms: str) -> None:
    models = recipe_models(load(arms))
    first = ["plain", "without momentum", "normed", "cumulative", "large", "micro-batches", "clipped"]
    assert [model.name for model in models] == first
    assert models[-1].stands_for == ("clipped less",)
    assert models[0].stands_for == ("faster", "other start")
    assert models[2].stands_for == ("fused",)
    assert models[0].notes == (Note("same work", arm="plain", others=("faster", "other start")),)


@pytest.mark.usefixtures("other")
def test_one_arm_can_be_asked_for_by_name(arms: str) -> None:
    (model,) = recipe_models(load(arms), "faster")
    assert (model.name, model.recipe.optimizer.lr) == ("faster", 1.0)
    with pytest.raises(UsageError, match="did you mean faster"):
        recipe_models(load(arms), "fastr")


def test_the_step_of_a_users_module_leaves_its_weights() -> None:
    model = UserModel("tests.measure.profile.user_models:small", (4, 3, 8, 8))
    trainable = model.trainable("native", model.dataset(CPU), CPU)
    before = [parameter.clone() for parameter in trainable.model.parameters()]
    loss = trainable.step(*trainable.batch())
    assert all(torch.equal(*pair) for pair in zip(trainable.model.parameters(), before, strict=True))
    assert loss == trainable.step(*trainable.batch())


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "tests.measure.profile.user_models:missing",
            "has no attribute 'missing'; the current folder",
        ),
        ("tests.no_such_module:make", "No module named"),
        ("tests.measure.profile.user_models:no_module", "returned a Tensor; expected a torch.nn.Module"),
    ],
)
def test_a_module_that_is_not_there_is_the_users_mistake(name: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        StepRun("own", [UserModel(name, (4, 3, 8, 8))], CPU)


def test_norms_are_counted_by_kind() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.GroupNorm(1, 2), nn.GroupNorm(1, 2), nn.LayerNorm(2))
    assert norms_of(model) == (
        NormLayers("batch norm", 1, "native"), NormLayers("GroupNorm", 2), NormLayers("LayerNorm", 1),
    )  # fmt: skip
    assert norms_of(nn.Linear(2, 2)) == ()


@pytest.mark.parametrize("kind", ["ghost", "renorm", "noisy", "frozen", "rms", "dyt", "whiten", "iternorm"])
def test_a_variant_is_counted_by_its_name_and_has_no_kernels(kind: str) -> None:
    fields = {"ghost": {"size": 10}, "renorm": {"warmup": 1}, "frozen": {"after": 1}}.get(kind, {})
    recipe = tiny(norm={"kind": kind, **fields})
    name = "Whitening" if kind in ("whiten", "iternorm") else type(recipe.norm).__name__
    assert norms_of(build(recipe, (8,), 3)) == (NormLayers(name, 1),)
    assert not RecipeModel("arm", recipe).has_kernels


def test_batch_norm_that_ignores_its_statistics_is_a_kernel_of_its_own_that_no_other_replaces() -> None:
    recipe = tiny(norm={"kind": "batch", "backward": "ignore_statistics"})
    (found,) = norms_of(build(recipe, (8,), 3))
    assert (found.kind, found.kernel) == ("batch norm", "bncli.engine.models.norms:ignoring_statistics")
    assert not RecipeModel("arm", recipe).has_kernels


def test_a_model_that_learns_begins_with_the_weights_of_its_run(tmp_path: Path) -> None:
    recipe = tiny()
    saved = {"model": lambda content: (tmp_path / "model.safetensors").write_bytes(content)}
    deque(train(recipe, "cpu", threads=1, save=saved), maxlen=0)
    model = RecipeModel("tiny", recipe, run=tmp_path)
    dataset = model.dataset(CPU)
    trained = model.trainable("native", dataset, CPU, learns=True).model.state_dict()
    for name, expected in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(trained[name], expected)
    new = model.trainable("native", dataset, CPU).model.state_dict()
    assert not torch.equal(new["output.weight"], trained["output.weight"])
