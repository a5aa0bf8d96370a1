"""`bncli gradcheck`: what was checked, what failed, and what that looks like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bncli.results.environment import Environment

Effort = Literal["quick", "default", "full"]


@dataclass(frozen=True)
class CheckGroup:
    """Cases of one kind, finished. Errors are in units of each case's own tolerance: up to 1 passes."""

    section: str  # values, derivatives, invariants, hard inputs
    name: str
    cases: int
    failed: int
    worst: float | None  # the largest error in tolerances, infinite for NaN where a number belongs; None: no case ran
    worst_case: str | None  # that case's identifier, as `--only` takes it
    tolerance: str  # how it was derived, in words
    not_checked: str | None = None  # why no case of this group could run


@dataclass(frozen=True)
class CheckFailure:
    """A case that failed: what was expected, what was found, and the one line that runs it again."""

    case: str
    message: str
    reproduce: str


@dataclass(frozen=True)
class Diagnosis:
    """A kind of bug that the failures look like, with the evidence for it."""

    bug: str
    evidence: str


@dataclass(frozen=True)
class GradientPaths:
    """dL/dx of one case in its three parts (Ioffe & Szegedy 2015, section 3; the l2 norms over all elements)."""

    case: str
    direct: float  # through xhat_i alone, mean and variance held constant: dNorm(x, X)/dx
    through_mean: float  # with the next, dNorm(x, X)/dX
    through_variance: float
    full: float
    error: float  # of the kernel's dL/dx against float64 central differences, relative l2
    bound: float  # what that error may be
    lost: float  # the relative l2 error of the direct part alone, taken for the gradient


@dataclass(frozen=True)
class Gradcheck:
    kernel: str
    norm: str
    effort: Effort
    environment: Environment
    ran: str  # what really ran: torch's operator, a Triton kernel on a GPU, Triton's interpreter, the user's function
    seconds: float
    groups: tuple[CheckGroup, ...]
    paths: tuple[GradientPaths, ...]
    failures: tuple[CheckFailure, ...]  # at most the first few
    diagnoses: tuple[Diagnosis, ...]

    @property
    def passed(self) -> bool:
        return not any(group.failed for group in self.groups)


@dataclass(frozen=True)
class BiasStep:
    """After `step` steps of the two descents of Ioffe & Szegedy 2015, section 2."""

    step: int
    bias_ignoring: float  # the step takes E[x] for a constant
    loss_ignoring: float
    bias_full: float  # the step follows the whole gradient
    loss_full: float
