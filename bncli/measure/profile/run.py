"""Runs of the kernel view and of the step view, made from the values of the options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bncli.engine import device as devices
from bncli.errors import UsageError
from bncli.measure.profile.budget import Asked
from bncli.measure.profile.kernel_memory import KernelPeaks
from bncli.measure.profile.kernels import KernelRun
from bncli.measure.profile.shapes import Calls, parse, read_csv, shape_set
from bncli.measure.profile.step_models import StepModel, UserModel, recipe_models
from bncli.measure.profile.steps import StepRun
from bncli.recipe.load import load


@dataclass(frozen=True)
class Options:
    """Options of both views, as they were given. threads: None for torch's choice."""

    device: str
    threads: int | None
    kernels: tuple[str, ...]
    seconds: float
    least_rounds: int
    allow_code: bool


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
    peaks: KernelPeaks,
) -> KernelRun:
    """Empty dtypes and layouts, and shapes of None, stand for the device's own. Raises UsageError and Unavailable."""
    device = _device(options)
    if options.device == "auto" and device.type == "mps":
        device = torch.device("cpu")  # no clock times kernels there
    cuda = device.type == "cuda"
    asked = Asked(
        kernels=options.kernels,
        operations=operations,
        dtypes=dtypes or (("bf16",) if cuda else ("fp32",)),
        layouts=layouts or ("contiguous", "channels_last"),
        shapes=tuple(_chosen(shapes, own_shapes, batch, cuda=cuda)),
        cold=cold,
        seconds=options.seconds,
        least_rounds=options.least_rounds,
        allow_code=options.allow_code,
    )
    return KernelRun(asked, device, peaks=peaks)


def recipe_run(
    options: Options, recipe: str, sets: Sequence[str], arm: str | None, trace: Path | None, sets_from: str = "sets"
) -> StepRun:
    """The step of each arm of a recipe, or of one. sets_from: how a mistake in `sets` names it.

    Raises UsageError and Unavailable.
    """
    device = _device(options)
    loaded = load(recipe, sets, allow_code=options.allow_code, sets_from=sets_from)
    subjects = recipe_models(loaded, arm)
    return _step_run(loaded.name, subjects, device, options, trace)


def model_run(options: Options, model: str, inputs: str, trace: Path | None) -> StepRun:
    """The step of the user's own model, package.module:function. Raises UsageError, RunFailed and Unavailable."""
    device = _device(options)
    subjects = [UserModel(model, parse(inputs, "inputs"))]
    return _step_run(model, subjects, device, options, trace)


def _step_run(
    name: str, subjects: Sequence[StepModel], device: torch.device, options: Options, trace: Path | None
) -> StepRun:
    seconds, least_rounds = options.seconds, options.least_rounds
    return StepRun(name, subjects, device, options.kernels, seconds=seconds, least_rounds=least_rounds, trace=trace)


def _device(options: Options) -> torch.device:
    found = devices.resolve(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return found


def _chosen(shapes: str | None, own: Sequence[str], batch: int | None, *, cuda: bool) -> list[Calls]:
    found = [Calls(parse(text), 1) for text in own]
    name = shapes or (None if found else "resnet50" if cuda else "resnet20")
    if name is None:
        if batch:
            raise UsageError("a shape holds its own batch, its first number", field="batch")
        return found
    if name.endswith(".csv"):
        if batch:
            raise UsageError(f"{name} holds its own", field="batch")
        return [*found, *read_csv(Path(name))]
    return [*found, *shape_set(name, cuda=cuda, batch=batch)]
