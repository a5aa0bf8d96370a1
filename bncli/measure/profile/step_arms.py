"""The models of one subject, one a kernel: made alike, held against the native step, warmed up."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.profiler import record_function

from bncli import kernels
from bncli.engine.data.splits import Dataset
from bncli.engine.device import synchronize
from bncli.errors import BncliError, DataError, RecipeError
from bncli.measure.profile import step_check
from bncli.measure.profile.step_models import Subject, Trainable, norms_of
from bncli.measure.profile.step_time import DATA

Mode = Literal["training", "evaluation"]
MODES: tuple[Mode, ...] = ("training", "evaluation")
WARM_UP_CALLS = 2  # beside the checked step


@dataclass
class Arm:
    """A subject with one kernel. There is no trainable where `error` tells why."""

    kernel: str | None
    trainable: Trainable | None = None
    norms: str | None = None
    error: str | None = None
    wrong: bool = False


def made(subject: Subject, names: Sequence[str | None], dataset: Dataset, device: torch.device) -> tuple[Arm, ...]:
    """An arm for each kernel; one that cannot run, raises, or is wrong has the reason instead of a model.

    Raises DataError and RecipeError, which no kernel is to blame for.
    """
    return tuple(_arm(subject, name, dataset, device) for name in names)


def _arm(subject: Subject, kernel: str | None, dataset: Dataset, device: torch.device) -> Arm:
    try:
        if kernel is not None:
            kernels.get(kernel, device)
        trainable = subject.trainable(kernel, dataset, device)
        norms = norms_of(trainable.model)
        if kernel is not None and kernel != "native":
            wrong = step_check.why_wrong(subject, kernel, trainable, dataset, device)
            if wrong is not None:
                return Arm(kernel, norms=norms, error=wrong, wrong=True)
        for mode in MODES:
            step = step_of(trainable, mode, device)
            for _ in range(WARM_UP_CALLS):
                step()
    except (DataError, RecipeError):
        raise
    except Exception as error:  # a kernel that does not compile, a model that does not fit: the others go on
        return Arm(kernel, error=reason(error))
    return Arm(kernel, trainable, norms)


def reason(error: Exception) -> str:
    """In one line, with the place it was raised at if it is not one of ours, whose text says what to do."""
    text = " ".join(str(error).split()) or "no message"
    if isinstance(error, BncliError):
        return text
    frames = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__}: {text}" + (f", in {frames[-1].filename}:{frames[-1].lineno}" if frames else "")


def step_of(trainable: Trainable, mode: Mode, device: torch.device, marked: bool = False) -> Callable[[], object]:
    """A training step with the fetching of its batch, or a forward pass; the model is put in that mode now.

    marked: for the profiler, which finds the fetching in a range of its own.
    """
    trainable.model.train(mode == "training")

    def train() -> None:
        x, y = trainable.batch()
        trainable.step(x, y)

    def train_marked() -> None:
        with record_function(DATA):
            x, y = trainable.batch()
        trainable.step(x, y)

    def evaluate() -> None:
        with torch.inference_mode():
            trainable.forward(trainable.evaluation_x)

    chosen = evaluate if mode == "evaluation" else train_marked if marked else train
    if device.type in ("cpu", "cuda"):  # whose clock waits
        return chosen

    def waited_for() -> None:
        chosen()
        synchronize(device)

    return waited_for
