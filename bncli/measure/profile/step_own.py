"""A module of the user's own, whose step the step view measures."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from bncli.engine import data
from bncli.engine.convert import convert
from bncli.engine.data.splits import Dataset
from bncli.engine.device import autocast
from bncli.engine.train.optim import uncompiled
from bncli.engine.user_code import blame_user_code, imported
from bncli.errors import RecipeError, RunFailed
from bncli.measure.profile.step_models import Trainable, one_batch


@dataclass(frozen=True)
class OwnSubject:
    """A function without arguments that returns a module, or a module's class: package.module:name.

    It is trained on random numbers. The loss is the sum over its floating-point outputs of the mean of their squares;
    whole-number outputs are left out. The optimizer is SGD with momentum 0.9 at a learning rate of 0, so that the
    weights stay. Another kernel comes in by `bncli.convert`, of a model made anew from the same seeds.
    """

    module: str
    shape: tuple[int, ...]  # (B, *shape) of an input
    precision: str = "fp32"
    memory_format: str = "contiguous"

    @property
    def name(self) -> str:
        return self.module

    @property
    def batch_size(self) -> int:
        return self.shape[0]

    @functools.cached_property
    def has_kernels(self) -> bool:
        return any(isinstance(module, _BatchNorm) for module in self._model().modules())

    @property
    def steps(self) -> int | None:
        return None

    @property
    def real_data(self) -> bool:
        return False

    @property
    def tf32(self) -> bool:
        return False

    @property
    def notes(self) -> tuple[str, ...]:
        return (f"{self.name} is trained on random numbers: the loss is the mean of its output's squares",)

    def dataset(self, device: torch.device) -> Dataset:
        x = torch.randn(self.shape, generator=torch.Generator().manual_seed(0)).to(device)
        return self.alone(x, torch.zeros(len(x), dtype=torch.int64, device=device), 1)

    def alone(self, x: Tensor, y: Tensor, classes: int) -> Dataset:
        return one_batch(x, y, classes, self.memory_format)

    def _model(self) -> nn.Module:
        """Raises RecipeError for what is not there or is no module, RunFailed for what the function raises."""
        random.seed(0)
        torch.manual_seed(0)
        try:
            function = imported(self.module)
        except (ImportError, AttributeError, ValueError) as error:
            where = "it is looked for in the current folder and the environment"
            raise RecipeError(f"--model {self.module}: {error}; {where}") from error
        with blame_user_code(f"--model {self.module}", "It is called without arguments and returns a torch.nn.Module"):
            model = function()
        if not isinstance(model, nn.Module):
            raise RecipeError(f"--model {self.module} returned a {type(model).__name__}; expected a torch.nn.Module")
        return model

    def trainable(self, kernel: str | None, dataset: Dataset, device: torch.device, learns: bool = False) -> Trainable:
        model = self._model().to(device, memory_format=data.MEMORY_FORMATS[self.memory_format])  # type: ignore[call-overload]
        if kernel is not None and kernel != "native":
            convert(model, kernel)
        model.train()
        learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not learned:
            raise RecipeError(f"--model {self.module}: none of its parameters requires a gradient")
        optimizer = uncompiled(torch.optim.SGD)(learned, lr=0.0, momentum=0.9)
        scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        batch = next(dataset.train.chunks(self.batch_size))

        def forward(x: Tensor) -> object:
            contract = f"It is given a batch {tuple(x.shape)}"
            with autocast(device, self.precision), blame_user_code(f"--model {self.module}", contract):
                return model(x)

        def step(x: Tensor, y: Tensor) -> Tensor:
            loss = self._loss(forward(x))
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            return loss.detach()

        return Trainable(model, optimizer, lambda: batch, step, forward, batch[0], None, self.precision)

    def _loss(self, output: object) -> Tensor:
        floats = [each for each in tree_leaves(output) if isinstance(each, Tensor) and each.is_floating_point()]
        floats = [each for each in floats if each.requires_grad]
        if not floats:
            raise RunFailed(f"--model {self.module}: its output holds no floating-point tensor to train on")
        return torch.stack([each.float().square().mean() for each in floats]).sum()
