"""Cases of the kernel view, and how many rounds of measuring each has time for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bncli.errors import UsageError, UsageErrors
from bncli.measure.profile.shapes import Calls, Shape
from bncli.measure.reference import case as cases
from bncli.measure.timing import clock, speedup
from bncli.measure.timing.clock import Deadline
from bncli.names import RECIPE_KERNELS
from bncli.results.profile import Case

NATIVE = "native"
OPERATIONS = ("bn", "bn+relu", "bn+add+relu")
MOST_ROUNDS = 40
APART = 1.5  # the time of a round of forward and one of backward, whose forward goes before it, in rounds of both
LAYOUTS = ("contiguous", "channels_last", "strided")


@dataclass(frozen=True)
class Asked:
    """What to measure: every kernel on every operation, dtype, layout and shape.

    operations: empty for those that the model does on each shape, or OPERATIONS where nothing says which. shapes:
    (shape, calls) pairs, or `shapes.Calls`. seconds: for all of it, compilations included; a wish, beyond which every
    case is still measured. least_rounds: of both directions together, whatever the time.
    """

    kernels: tuple[str, ...] = RECIPE_KERNELS
    operations: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("fp32",)
    layouts: tuple[str, ...] = ("contiguous",)
    shapes: tuple[Calls | tuple[Shape, int], ...] = ()
    training: bool = True
    cold: bool = True
    seconds: float = 40.0
    least_rounds: int = speedup.FEWEST_ROUNDS
    allow_code: bool = False


def planned(asked: Asked) -> tuple[tuple[Case, int], ...]:
    """The cases and how often the model calls each, shape by shape; 0: it does another operation there.

    Raises UsageError for what is not known, and where there is nothing to measure.
    """
    _check(asked)
    found: dict[Case, int] = {}
    for entry in (Calls(*given) for given in asked.shapes):
        done = dict(entry.operations)
        for operation in asked.operations or tuple(done) or OPERATIONS:
            for dtype in asked.dtypes:
                for layout in asked.layouts:
                    case = Case(entry.shape, operation, dtype, _layout(entry.shape, layout), asked.training)
                    found.setdefault(case, done.get(operation, 0) if done else entry.calls)
    return tuple(found.items())


def _layout(shape: Shape, layout: str) -> str:
    """A batch of vectors or of lines has no channels last: it is measured as it lies."""
    return "contiguous" if layout == "channels_last" and len(shape) not in (4, 5) else layout


def _check(asked: Asked) -> None:
    errors = []
    if not asked.kernels:
        errors.append(UsageError("name at least one", field="kernels"))
    if not asked.shapes:
        errors.append(UsageError("name a set of shapes, a shape or a file of shapes", field="shapes"))
    choices: Sequence[tuple[str, Sequence[str], Sequence[str]]] = (
        ("operations", asked.operations, tuple(cases.OPERATIONS)),
        ("dtypes", asked.dtypes, tuple(cases.DTYPE_NAMES)),
        ("layouts", asked.layouts, LAYOUTS),
    )
    for field, names, known in choices:
        expected = f"expected some of {', '.join(known)}"
        errors += [UsageError(expected, field=field, value=name) for name in names if name not in known]
    for shape, *_ in asked.shapes:
        if asked.training and math.prod(shape) == shape[1]:
            sizes = "x".join(map(str, shape))
            needs = "training needs more than one value a channel, and it has one"
            errors.append(UsageError(needs, field="shape", value=sizes))
    if errors:
        raise UsageErrors(errors)


class Budget:
    """One case's time: its `share` (of 1) of what is left of the whole when it begins."""

    def __init__(self, whole: Deadline, share: float, least_rounds: int, now_s: Callable[[], float]) -> None:
        self.least, self.least_apart = least_rounds, min(clock.FEWEST_ROUNDS, least_rounds)
        self._now_s, self._began_s = now_s, now_s()
        self.own = Deadline(share * whole.left_s, now_s)

    def rounds(self, both_s: float) -> tuple[int, int]:
        """(of both directions together, of each by itself), where a round of both takes `both_s`."""
        most = max(MOST_ROUNDS, self.least)
        fitting = most if both_s <= 0 else min(most, math.floor(self.own.left_s / ((1 + APART) * both_s)))
        return (fitting, fitting) if fitting >= self.least else (self.least, self.least_apart)

    def least_s(self, both_s: float) -> float:
        """What the case takes with the fewest rounds, judging it included. To be asked before the rounds."""
        return self._now_s() - self._began_s + (self.least + APART * self.least_apart) * both_s
