"""TensorBoard files of a run: a sink that writes its figures, and the distributions that its probes measured."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

from bncli.errors import FileError
from bncli.results.train import Evaluated, Event, Probed, StepDone


def check_installed() -> None:
    """Raise FileError, before any work, where the files could not be written."""
    if importlib.util.find_spec("tensorboard") is None:
        raise FileError("TensorBoard is not installed; install it with: pip install tensorboard")


class TensorBoard:
    """A sink that writes to a folder. What is there is kept, and hidden by TensorBoard unless the run `goes_on`."""

    def __init__(self, folder: Path, goes_on: bool = False) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=None if goes_on else 0)

    def __call__(self, event: Event) -> None:
        from torch import tensor

        if isinstance(event, StepDone | Evaluated):
            group, found = ("held out", event.evaluation) if isinstance(event, Evaluated) else ("training", event)
            for name, value in vars(found).items():
                if name not in ("step", "train_loss") and value is not None:
                    self._writer.add_scalar(f"{group}/{name}", value, found.step)
        elif isinstance(event, Probed):
            for point in event.points:
                for name, value in point.values.items():
                    self._writer.add_scalar(f"{point.measure}.{name}/{point.layer or 'network'}", value, point.step)
            for layer, values in event.inputs.items():
                if all(map(math.isfinite, values)):  # a histogram of the percentiles: each stands for a hundredth
                    self._writer.add_histogram(f"inputs/{layer}", tensor(values), event.points[0].step, bins=30)
        self._writer.flush()  # so that it can be watched meanwhile
