"""Is a kernel right on a large case? All of the case is run, and a few of its channels are judged.

Batch norm treats each channel by itself, so the float64 reference of some channels needs those alone. The kernel runs
on the whole tensor, with the cuts and the cache misses that it will be timed with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bncli.measure.reference import accuracy
from bncli.measure.reference import case as cases
from bncli.measure.reference.accuracy import Standard
from bncli.measure.reference.case import Apply, Inputs
from bncli.measure.timing import clock as timing
from bncli.results.profile import Case

MOST_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}  # judged in float64, in about 50 passes over them
FEWEST_CHANNELS = 3  # the first, one within, and the last


@dataclass(frozen=True)
class Judge:
    """The inputs of a case, and what their judged channels' results are held to."""

    inputs: Inputs  # of all channels
    channels: Tensor  # int64, those that are judged
    standard: Standard

    def error(self, forward: Apply, *, poison: bool = True) -> str | None:
        """What is wrong with a kernel's y, gradients and running statistics, or None.

        poison: what it leaves unwritten is NaN; not for a compiled function, which would be compiled once more.
        """
        if poison:
            with accuracy.poisoned():
                found = cases.outputs(forward, self.inputs)
        else:
            found = cases.outputs(forward, self.inputs)
        return self._first_wrong(found)

    def _whole(self, name: str) -> Tensor | None:
        """The tensor that an output has the shape of."""
        of = {"y": "x", "dx": "x", "dresidual": "residual", "dweight": "weight", "dbias": "bias"}
        tensor: Tensor | None = getattr(self.inputs, of.get(name, name))
        return tensor

    def _first_wrong(self, found: dict[str, Tensor]) -> str | None:
        for name, t in found.items():
            expected = self._whole(name)
            assert expected is not None
            if t.shape != expected.shape:
                return f"{name} has the shape {tuple(t.shape)}, not {tuple(expected.shape)}"
            if t.dtype != expected.dtype:
                return f"{name} is {_word(t.dtype)}, not {_word(expected.dtype)}"
            if not math.isfinite(float(t.sum(dtype=torch.float64 if t.dtype == torch.float64 else torch.float32))):
                return f"{name} is not finite everywhere"
        worst = self.standard.worst({name: self._judged(t) for name, t in found.items()})
        return None if worst.error <= worst.bound else str(worst)

    def _judged(self, t: Tensor) -> Tensor:
        return t.index_select(0 if t.dim() == 1 else 1, self.channels)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def judge(
    case: Case, device: torch.device, *, most_elements: int | None = None, positive_weight: bool = False
) -> Judge:
    """Inputs of a case and the standard of up to `most_elements` of them, in whole channels from end to end."""
    inputs = cases.make(case, device)
    if positive_weight and inputs.weight is not None:
        inputs = replace(inputs, weight=inputs.weight.abs())
    most = most_elements if most_elements is not None else MOST_ELEMENTS[device.type]
    channels = _spread_out(case.shape[1], max(FEWEST_CHANNELS, most // (case.elements // case.shape[1])), device)
    small = replace(case, shape=(case.shape[0], len(channels), *case.shape[2:]))
    with timing.threads(1):  # of many short operators, which threads that wait for each other would slow down
        settled = accuracy.settle_kinks(small, _of_channels(inputs, channels, case.layout))
        inputs.dy.index_copy_(1, channels, settled.dy)
        alone = Judge(inputs, channels, accuracy.standard_of(small, settled))
    # Of all channels and on all threads native adds in another order, and may err more than on the judged ones alone.
    try:
        own = cases.outputs(cases.apply(case, "native"), inputs)
    except (RuntimeError, MemoryError):  # native may find no room where another kernel does
        return alone
    return replace(alone, standard=alone.standard.beside({name: alone._judged(t) for name, t in own.items()}))


def _spread_out(channels: int, count: int, device: torch.device) -> Tensor:
    if count >= channels:
        return torch.arange(channels, device=device)
    return torch.linspace(0, channels - 1, count, dtype=torch.float64, device=device).round().long()


def _of_channels(inputs: Inputs, channels: Tensor, layout: str) -> Inputs:
    def chosen(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        return t.index_select(0, channels) if t.dim() == 1 else cases.laid_out(t.index_select(1, channels), layout)

    return Inputs(**{name: chosen(t) for name, t in vars(inputs).items()})  # type: ignore[arg-type]
