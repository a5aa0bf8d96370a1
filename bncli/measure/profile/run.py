"""Runs of the kernel view and of the step view, made from the values of the options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bncli.engine import device as devices
from bncli.engine.memory import keep_freed_memory
from bncli.measure.profile.kernels import KernelRun, KernelSettings
from bncli.measure.profile.shapes import chosen, parse
from bncli.measure.profile.step_models import StepModel, UserModel, recipe_models
from bncli.measure.profile.steps import StepRun
from bncli.measure.timing.fresh_process import FreshProcesses
from bncli.recipe.load import load


@dataclass(frozen=True)
class Options:
    """Options of both views. threads: None for torch's choice."""

    device: str
    threads: int | None
    kernels: tuple[str, ...]
    seconds: float
    least_rounds: int
    allow_code: bool

    def resolved(self) -> torch.device:
        """The device, on which the CPU computes with so many threads. Raises UsageError and Unavailable.

        From here on freed memory is kept, as in `bncli train`.
        """
        found = devices.resolve(self.device)
        keep_freed_memory()
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return found


def kernel_run(
    options: Options,
    *,
    operations: tuple[str, ...],
    dtypes: tuple[str, ...],
    layouts: tuple[str, ...],
    shapes: str | None,
    own_shapes: Sequence[str],
    batch: int | None,
    cold: bool,
    processes: FreshProcesses,
) -> KernelRun:
    """Empty dtypes and layouts, and shapes of None, stand for the device's own. Raises UsageError and Unavailable."""
    device = options.resolved()
    if options.device == "auto" and device.type == "mps":
        device = torch.device("cpu")  # no clock times kernels there
    cuda = device.type == "cuda"
    settings = KernelSettings(
        kernels=options.kernels,
        operations=operations,
        dtypes=dtypes or (("bf16",) if cuda else ("fp32",)),
        layouts=layouts or ("contiguous", "channels_last"),
        shapes=chosen(shapes, own_shapes, batch, cuda=cuda),
        cold=cold,
        seconds=options.seconds,
        least_rounds=options.least_rounds,
        allow_code=options.allow_code,
    )
    return KernelRun(settings, device, processes=processes)


def recipe_run(
    options: Options,
    recipe: str,
    sets: Sequence[str],
    arm: str | None,
    trace: Path | None,
    sets_from: str = "sets",
    run: Path | None = None,
) -> StepRun:
    """The step of each arm of a recipe, or of one. sets_from: how a mistake in `sets` names it. run: the folder of the
    run whose recipe it is; its norms are watched with its trained weights.

    Raises UsageError and Unavailable.
    """
    device = options.resolved()
    loaded = load(recipe, sets, allow_code=options.allow_code, sets_from=sets_from)
    loaded = replace(loaded, name=str(run)) if run else loaded
    models = [replace(model, run=run) for model in recipe_models(loaded, arm)]
    return _step_run(loaded.name, models, device, options, trace)


def model_run(options: Options, model: str, inputs: str, trace: Path | None) -> StepRun:
    """The step of the user's model, package.module:function. Raises UsageError, RunFailed and Unavailable."""
    models = [UserModel(model, parse(inputs, "inputs"))]
    return _step_run(model, models, options.resolved(), options, trace)


def _step_run(
    name: str, models: Sequence[StepModel], device: torch.device, options: Options, trace: Path | None
) -> StepRun:
    seconds, least_rounds = options.seconds, options.least_rounds
    return StepRun(name, models, device, options.kernels, seconds=seconds, least_rounds=least_rounds, trace=trace)
