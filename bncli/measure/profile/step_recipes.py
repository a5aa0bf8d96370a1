"""The runs of a recipe whose steps the step view measures."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bncli.engine import data
from bncli.engine.data.splits import Dataset
from bncli.engine.device import autocast
from bncli.engine.models import blame_own_model
from bncli.engine.train import optimizer_step
from bncli.engine.train.state import TrainState, check_fit
from bncli.errors import RecipeError
from bncli.measure.profile.step_models import Trainable, one_batch
from bncli.recipe.load import Loaded, digest, plain, suggestion, with_values
from bncli.recipe.sections import Digits, Hub, Npz, Recipe, Synthetic

STANDING_LR = 1e-12  # moves no weight of normal size in float32, and its products stay far from denormal numbers


@dataclass(frozen=True)
class RecipeSubject:
    """A run of a recipe, made and stepped as `bncli train` does it."""

    name: str
    recipe: Recipe
    stands_for: tuple[str, ...] = ()  # further arms whose step takes the same work

    @property
    def batch_size(self) -> int:
        return self.recipe.train.batch_size

    @property
    def has_kernels(self) -> bool:
        return self.recipe.norm.kind == "batch"

    @property
    def steps(self) -> int | None:
        return self.recipe.train.steps

    @property
    def real_data(self) -> bool:
        return True

    @property
    def tf32(self) -> bool:
        return self.recipe.train.tf32

    @property
    def notes(self) -> tuple[str, ...]:
        found = []
        if self.stands_for:
            found.append(f"{self.name} stands for {', '.join(self.stands_for)} as well: their steps take the same work")
        if self.recipe.train.compile:
            found.append(f"{self.name} is compiled: what torch.compile fused counts as other, whatever it holds")
        return tuple(found)

    def dataset(self, device: torch.device) -> Dataset:
        """Raises DataError for data that are not there or do not fit the model."""
        found = _loaded(self.recipe.data, device, self.recipe.train.memory_format)
        check_fit(self.recipe, found)
        return found

    def alone(self, x: Tensor, y: Tensor, classes: int) -> Dataset:
        return one_batch(x, y, classes, self.recipe.train.memory_format)

    def trainable(self, kernel: str | None, dataset: Dataset, device: torch.device, learns: bool = False) -> Trainable:
        """To be timed: at a learning rate that leaves the weights where they begin, so that every sample is of the same
        work and no arm can diverge meanwhile. If it `learns`: at the recipe's own, and not compiled.
        """
        values: dict[str, Any] = {"train.compile": False} if learns else {"optimizer.lr": STANDING_LR}
        recipe = with_values(self.recipe, values if kernel is None else {**values, "norm.kernel": kernel})
        with blame_own_model(recipe):
            state = TrainState(recipe, dataset, device)
        held_out = dataset.held_out
        some = torch.arange(min(self.batch_size, len(held_out)), device=held_out.index_device)
        x, _ = next(held_out.batches([some]))

        def step(x: Tensor, y: Tensor) -> Tensor:
            with blame_own_model(recipe):
                return optimizer_step(state, x, y)

        def forward(x: Tensor) -> object:
            with autocast(device, recipe.train.precision):
                return state.model(x)

        last = len(dataset.train) % self.batch_size
        return Trainable(state.model, state.optimizer, state.next_batch, step, forward, x, last, recipe.train.precision)


@functools.lru_cache(maxsize=1)
def _loaded(spec: Digits | Synthetic | Npz | Hub, device: torch.device, memory_format: str) -> Dataset:
    """Arms mostly share their data, which may take a while to decode."""
    return data.load(spec, device, data.MEMORY_FORMATS[memory_format])


def subjects_of(loaded: Loaded, arm: str | None = None) -> tuple[RecipeSubject, ...]:
    """The runs of a recipe file whose steps differ, under the name of the first arm each; or the one of `arm`.

    Arms that differ only in figures that cost no time (a learning rate, a seed, initial weights) are one. Raises
    RecipeError for an arm that the file does not have.
    """
    arms = {each.name: each.recipe for each in loaded.arms} or {loaded.name: loaded.base}
    if arm is not None:
        if arm not in arms:
            raise RecipeError(f"--arm {arm}: {loaded.source} has no such arm; {suggestion(arm, list(arms))}")
        return (RecipeSubject(arm, arms[arm]),)
    alike: dict[str, list[str]] = {}
    for name, recipe in arms.items():
        alike.setdefault(digest(step_of(recipe)), []).append(name)
    return tuple(RecipeSubject(first, arms[first], tuple(others)) for first, *others in alike.values())


def step_of(recipe: Recipe) -> dict[str, Any]:
    """What a recipe's step takes time for, as plain data."""
    found = plain(recipe)
    found["data"].pop("split_seed", None)
    found["model"].pop("init", None)
    norm, optimizer, schedule = found["norm"], found["optimizer"], found["schedule"]
    for figure in ("eps", "kernel"):
        norm.pop(figure, None)
    if "momentum" in norm:
        norm["momentum"] = norm["momentum"] is not None
    for figure in ("lr", "betas", "eps"):
        optimizer.pop(figure, None)
    for figure in ("momentum", "weight_decay"):
        optimizer[figure] = optimizer.get(figure, 0) > 0
    found["schedule"] = schedule["kind"] != "constant" or schedule["warmup"] > 0
    kept = ("batch_size", "precision", "memory_format", "compile")
    return found | {"train": {name: found["train"][name] for name in kept}}
