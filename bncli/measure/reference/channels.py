"""A large case: the kernel runs on all of it, and a few of its channels are held to the definition.

Batch norm treats each channel by itself, so the definition in float64 of some channels needs those alone. The kernel
runs on the whole tensor, with the tiles, the threads and the cache misses that it is timed with.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bncli.kernels.definition import Forward
from bncli.measure.reference.candidate import native_in_the_same_dtype
from bncli.measure.reference.case import CPU, Case, Inputs, away_from_the_kink, channels_of, timed_inputs
from bncli.measure.reference.judge import Evidence, Outcome, judged, written
from bncli.measure.reference.observe import observe, poisoned
from bncli.measure.reference.tolerance import Expected, Rule, computed
from bncli.results.finding import Finding

MOST_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}  # judged in float64, in some 20 passes over them
PERTURBED_ELEMENTS = 2**15  # of these, in some 200 passes
FEWEST_CHANNELS = 3  # the first, one within, and the last
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of an element -> integers of that size


@dataclass(frozen=True)
class Large:
    """The inputs of a case, and what the results of its judged channels are held to."""

    case: Case
    given: Inputs  # of all channels
    channels: Tensor  # (k) int64, those that are judged
    part: Inputs  # of those channels, in float64
    expected: Expected
    native: dict[str, Tensor]  # what torch's own kernel gives there in the case's dtype, in float64

    def judge(self, call: Forward, rule: Rule, *, poison: bool = True) -> Outcome:
        """Every quantity of the judged channels; those of the other channels must be finite.

        poison: what the kernel leaves unwritten is NaN; not for a compiled function, which would be compiled once more.
        """
        before = _checksums(self.given)
        with poisoned() if poison else contextlib.nullcontext():
            seen = observe(call, self.case, self.given, second=False)
        changed = written(self.given.of_channels(self.channels, self.case.layout), self.part)
        changed = changed or tuple(name for name, bits in _checksums(self.given).items() if bits != before[name])
        problems = {name: Finding("nan_unexpected", name) for name, t in seen.values.items() if not _finite(t)}
        problems |= seen.problems
        if changed:
            problems["forward"] = Finding("input_written", names=changed)
        device = self.part.x.device
        values = {name: channels_of(t, self.channels).to(device, torch.float64) for name, t in seen.values.items()}
        floors = self.expected.floors(rule)
        evidence = Evidence(self.expected.case, self.part, values, self.expected.truth, floors)
        # Of torch's own kernel too no more is asked here: the error of its sums may grow as m, by their order.
        return judged(evidence, problems, self.native)


def large(
    case: Case, device: torch.device, *, seed: int = 0, positive_weight: bool = False, most_elements: int | None = None
) -> Large:
    """Inputs of a case and what up to `most_elements` of its results, in whole channels, are held to."""
    given = timed_inputs(case, device, seed)
    if positive_weight and given.weight is not None:
        given = replace(given, weight=given.weight.abs())
    most = most_elements if most_elements is not None else MOST_ELEMENTS[device.type]
    channels = _spread_out(case.shape[1], max(FEWEST_CHANNELS, most // case.m), device)
    wide_on = device if device.type == "cuda" else CPU
    small = replace(case, shape=(case.shape[0], len(channels), *case.shape[2:]))
    part = away_from_the_kink(given.of_channels(channels, case.layout), small, wide_on)
    given.g.index_copy_(1, channels, part.g)
    native = native_in_the_same_dtype()
    own = observe(native, case, given, second=False)  # on all channels and threads it adds in another order
    values = {name: channels_of(t, channels) for name, t in own.values.items()}
    if own.problems:  # it may find no room where another kernel does
        values = observe(native, small, part, second=False).values
    held_to = computed(small, part, False, wide_on, PERTURBED_ELEMENTS)
    wide = {name: t.to(wide_on, torch.float64) for name, t in values.items()}
    return Large(case, given, channels, part.wide(wide_on), held_to, wide)


def _spread_out(channels: int, count: int, device: torch.device) -> Tensor:
    if count >= channels:
        return torch.arange(channels, device=device)
    return torch.linspace(0, channels - 1, count, dtype=torch.float64, device=device).round().long()


def _checksums(given: Inputs) -> dict[str, int]:
    """The sum of each tensor's bits, as integers that wrap around: exact in any order, without another such tensor."""
    found = {}
    for name, t in vars(given).items():
        if t is not None and not name.startswith("running"):  # of which every call is handed copies
            integers = BITS[t.element_size()]
            found[name] = int(t.detach().view(integers).sum(dtype=integers))
    return found


def _finite(t: Tensor) -> bool:
    """By its sum, which takes no other tensor of its size."""
    return math.isfinite(float(t.sum(dtype=torch.float64 if t.dtype == torch.float64 else torch.float32)))
