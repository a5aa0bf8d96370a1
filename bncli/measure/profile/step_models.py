"""Models that the step view measures: the arms of a recipe, or a module of the user's, each with any kernel."""

from __future__ import annotations

import functools
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils._pytree import tree_leaves

from bncli.engine import data
from bncli.engine.convert import Conversion, convert
from bncli.engine.convert.fold import Folded
from bncli.engine.data.splits import Batch, Dataset, InMemory
from bncli.engine.device import autocast
from bncli.engine.models import blame_own_model, norms, variants
from bncli.engine.models.whitening import Whitening
from bncli.engine.train import optimizer_step, trial
from bncli.engine.train.optim import uncompiled
from bncli.engine.train.state import TrainState, check_fit
from bncli.engine.train.weights import put, read, tensors_of
from bncli.engine.user_code import blame_user_code, imported
from bncli.errors import RunFailed, UsageError
from bncli.measure.profile.norm_diagnostics import TrainingPlan
from bncli.recipe.load import Loaded, digest, plain, with_values
from bncli.recipe.sections import DataSection, OwnModel, Recipe
from bncli.results.profile import FOLDED, NormLayers, Note

OTHER_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, _NormBase, variants.RMSNorm, variants.DynamicTanh, Whitening)


@dataclass(frozen=True, eq=False)
class Trainable:
    """A model ready to train, and what one step of it takes."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch: Callable[[], Batch]  # the next training batch, as training fetches it
    step: Callable[[Tensor, Tensor], Tensor]  # a batch -> the loss; forward, backward and optimizer
    forward: Callable[[nn.Module, Tensor], object]  # of the model, or a folded one, in evaluation mode
    evaluation_x: Tensor  # (B, *shape), held-out examples
    plan: TrainingPlan


class StepModel(Protocol):
    """One model and how it is trained. Plain data, so that a fresh process can make it again.

    has_kernels: whether there is a batch norm, whose kernel can be chosen. tf32: whether float32 may be TF32 on an
    NVIDIA GPU. notes: caveats for its results.
    """

    @property
    def name(self) -> str: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def has_kernels(self) -> bool: ...
    @property
    def tf32(self) -> bool: ...
    @property
    def notes(self) -> tuple[Note, ...]: ...

    def dataset(self, device: torch.device) -> Dataset: ...
    def check(self, dataset: Dataset, device: torch.device) -> None: ...

    def trainable(
        self, kernel: str | None, dataset: Dataset, device: torch.device, learns: bool = False
    ) -> Trainable: ...


def one_batch(x: Tensor, y: Tensor, classes: int) -> Dataset:
    """x (B, *shape) and y (B,) as a data set, both to train on and to evaluate."""
    split = InMemory(x, y)
    return Dataset("one batch", split, split, tuple(x.shape[1:]), classes)


def norms_of(model: nn.Module) -> tuple[NormLayers, ...]:
    """The norm layers, those that are alike together; batch norms first, the most frequent before the others."""
    conversion = getattr(model, "bncli_conversion", None)
    if isinstance(conversion, Conversion):
        batch = Counter(
            NormLayers("batch norm", 0, conversion.kernel if line.calls else "native", True, line.calls)
            for line in conversion.norms
        )
    else:
        kernels = [
            FOLDED if isinstance(module, Folded) else norms.kernel_name(getattr(module, "kernel", "native"))
            for module in model.modules()
            if isinstance(module, _BatchNorm | Folded)
        ]
        batch = Counter(NormLayers("batch norm", 0, kernel) for kernel in kernels)
    others = Counter(
        NormLayers(type(module).__name__, 0)
        for module in model.modules()
        if isinstance(module, OTHER_NORMS) and not isinstance(module, _BatchNorm)
    )
    return tuple(replace(layers, count=count) for layers, count in [*batch.most_common(), *others.items()])


# --- the runs of a recipe ---------------------------------------------------------------------------------------------

STANDING_LR = 1e-12  # does not change weights of normal size in float32, and its products are not denormal


@dataclass(frozen=True)
class RecipeModel:
    """A run of a recipe, made and stepped as `bncli train` does it."""

    name: str
    recipe: Recipe
    stands_for: tuple[str, ...] = ()  # further arms whose step takes the same work
    run: Path | None = None  # whose trained weights a model that learns begins with

    @property
    def batch_size(self) -> int:
        return self.recipe.train.batch_size

    @property
    def has_kernels(self) -> bool:
        return self.recipe.norm.kind == "batch" and self.recipe.norm.backward == "full"

    @property
    def tf32(self) -> bool:
        return self.recipe.train.tf32

    @property
    def notes(self) -> tuple[Note, ...]:
        same_work = [Note("same work", arm=self.name, others=self.stands_for)] if self.stands_for else []
        return (*same_work, *[Note("model compiled", arm=self.name)] * self.recipe.train.compile)

    def dataset(self, device: torch.device) -> Dataset:
        """Raises DataError for data that are not there or do not fit the model."""
        found = _loaded(self.recipe.data, device, self.recipe.train.memory_format)
        check_fit(self.recipe, found)
        return found

    def check(self, dataset: Dataset, device: torch.device) -> None:
        """Raises RecipeError or RunFailed for a user's model that cannot make the first step."""
        if isinstance(self.recipe.model, OwnModel):
            native = {"norm.kernel": "native"} if self.has_kernels else {}
            recipe = with_values(self.recipe, {"probes": None, **native})
            deque(trial(recipe, str(device), dataset=dataset), maxlen=0)

    def trainable(self, kernel: str | None, dataset: Dataset, device: torch.device, learns: bool = False) -> Trainable:
        """To be timed: at a learning rate that leaves the weights where they begin, so that every sample is of the same
        work and no arm can diverge meanwhile. With `learns`: at the recipe's rate, and not compiled.
        """
        values: dict[str, Any] = {"train.compile": False} if learns else {"optimizer.lr": STANDING_LR}
        values["probes"] = None  # which would hold a copy of the model
        recipe = with_values(self.recipe, values if kernel is None else {**values, "norm.kernel": kernel})
        with blame_own_model(recipe):
            state = TrainState(recipe, dataset, device)
        if learns and self.run:
            content, file = read(self.run)
            put(tensors_of(content, file), state.model, file)
        held_out = dataset.held_out
        indices = torch.arange(min(self.batch_size, len(held_out)), device=held_out.index_device)
        x, _ = next(held_out.batches([indices]))

        def step(x: Tensor, y: Tensor) -> Tensor:
            with blame_own_model(recipe):
                return optimizer_step(state, x, y)

        def forward(model: nn.Module, x: Tensor) -> object:
            with autocast(device, recipe.train.precision):
                return model(x)

        plan = TrainingPlan(recipe.train.steps, len(dataset.train) % self.batch_size)
        return Trainable(state.model, state.optimizer, state.next_batch, step, forward, x, plan)


@functools.lru_cache(maxsize=1)
def _loaded(spec: DataSection, device: torch.device, memory_format: str) -> Dataset:
    """Arms mostly share their data, which may take a while to decode."""
    return data.load(spec, device, data.MEMORY_FORMATS[memory_format])


def recipe_models(loaded: Loaded, arm: str | None = None) -> tuple[RecipeModel, ...]:
    """The runs of a recipe file whose steps differ, under the name of the first arm each; or the one of `arm`.

    Arms that differ only in figures that cost no time (a learning rate, a seed, initial weights) are one. Raises
    UsageError for an arm that the file does not have.
    """
    if arm is not None:
        return (RecipeModel(arm, loaded.arm(arm).recipe),)
    arms = {each.name: each.recipe for each in loaded.arms} or {loaded.name: loaded.base}
    same_work: dict[str, list[str]] = {}
    for name, recipe in arms.items():
        same_work.setdefault(digest(step_work(recipe)), []).append(name)
    return tuple(RecipeModel(first, arms[first], tuple(others)) for first, *others in same_work.values())


def step_work(recipe: Recipe) -> dict[str, Any]:
    """What a recipe's step takes time for, as plain data."""
    found = plain(recipe)
    norm, optimizer, schedule, train = (found[name] for name in ("norm", "optimizer", "schedule", "train"))
    if "momentum" in norm:
        norm["momentum"] = norm["momentum"] is not None
    for name in ("momentum", "weight_decay"):
        optimizer[name] = optimizer.get(name, 0) > 0
    for name in ("clip_gradients", "label_smoothing"):
        train[name] = bool(train[name])
    found["schedule"] = schedule["kind"] != "constant" or schedule["warmup"] > 0
    without_cost = {
        "data": ("split_seed",),
        "model": ("init", "zero_gamma"),
        "norm": ("eps", "kernel", "init_weight"),
        "optimizer": ("lr", "betas", "eps"),
        "train": train.keys()
        - {"batch_size", "precision", "memory_format", "compile", "clip_gradients", "label_smoothing", "accumulate"},
    }
    for section, names in without_cost.items():
        found[section] = {name: value for name, value in found[section].items() if name not in names}
    return found


# --- a module of the user's -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UserModel:
    """A function without arguments that returns a module, or a module's class: package.module:name.

    It is trained on random numbers. The loss is the sum over its floating-point outputs of the mean of their squares;
    whole-number outputs are left out. The optimizer is SGD with momentum 0.9 at a learning rate of 0, so that the
    weights stay. Another kernel is used through `bncli.convert`, in a model made from the same seeds.
    """

    name: str
    shape: tuple[int, ...]  # (B, *shape) of an input
    tf32 = False

    @property
    def batch_size(self) -> int:
        return self.shape[0]

    @functools.cached_property
    def has_kernels(self) -> bool:
        return any(isinstance(module, _BatchNorm) for module in self._model().modules())

    @property
    def notes(self) -> tuple[Note, ...]:
        return (Note("random data", arm=self.name),)

    def dataset(self, device: torch.device) -> Dataset:
        x = torch.randn(self.shape, generator=torch.Generator().manual_seed(0)).to(device)
        return one_batch(x, torch.zeros(len(x), dtype=torch.int64, device=device), 1)

    def check(self, dataset: Dataset, device: torch.device) -> None:
        """Raises UsageError for an input that the model does not take, and for an output without a loss."""
        made = self.trainable(None, dataset, device)
        try:
            self._loss(made.forward(made.model, made.evaluation_x))
            made.forward(made.model.eval(), made.evaluation_x)
        except RunFailed as error:
            raise UsageError(str(error), field="inputs", value="x".join(map(str, self.shape))) from error

    def _model(self) -> nn.Module:
        """Raises UsageError for what is not there, raises, or is no module."""
        random.seed(0)
        torch.manual_seed(0)
        try:
            function = imported(self.name)
        except (ImportError, AttributeError, ValueError) as error:
            where = "the current folder and the environment were searched"
            raise UsageError(f"{error}; {where}", field="model", value=self.name) from error
        with blame_user_code(self.name, "It is called without arguments and returns a torch.nn.Module", UsageError):
            model = function()
        if not isinstance(model, nn.Module):
            returned = f"it returned a {type(model).__name__}; expected a torch.nn.Module"
            raise UsageError(returned, field="model", value=self.name)
        return model

    def trainable(self, kernel: str | None, dataset: Dataset, device: torch.device, learns: bool = False) -> Trainable:
        model = self._model().to(device, memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        if kernel is not None and kernel != "native":
            convert(model, kernel)
        model.train()
        learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not learned:
            raise UsageError("none of its parameters requires a gradient", field="model", value=self.name)
        optimizer = uncompiled(torch.optim.SGD)(learned, lr=0.0, momentum=0.9)
        batch = next(dataset.train.chunks(self.batch_size))

        def forward(model: nn.Module, x: Tensor) -> object:
            with blame_user_code(self.name, f"It takes a batch {tuple(x.shape)}"):
                return model(x)

        def step(x: Tensor, y: Tensor) -> Tensor:
            loss = self._loss(forward(model, x))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return Trainable(model, optimizer, lambda: batch, step, forward, batch[0], TrainingPlan(real_data=False))

    def _loss(self, output: object) -> Tensor:
        tensors = [each for each in tree_leaves(output) if isinstance(each, Tensor)]
        floats = [each for each in tensors if each.requires_grad and each.is_floating_point()]
        if not floats:
            raise RunFailed(f"{self.name}: its output holds no floating-point tensor to train on")
        return torch.stack([each.float().square().mean() for each in floats]).sum()
