"""`bncli gradcheck`: groups of checks, failures, and the bugs that they look like."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from bncli.results.environment import Environment
from bncli.results.finding import Finding

Effort = Literal["quick", "default", "full"]

# How the tolerance of a group's errors is derived.
ToleranceRule = Literal[
    # of a value: rounding in torch's operator, in a kernel or a module of bncli's, in a function of the user's own
    "native",
    "kernel",
    "module",
    "own function",
    # of a derivative
    "finite differences",
    "central differences of the loss",
    # of an invariant
    "summed floors",
    "no error",
    "floor of dx",
    "mean floor of y",
    "floors of running statistics",
    "floors of y, dweight and dbias",
    # of a hard input
    "values and their NaN",
    "variance",
    "overflowing variance",
    "ValueError",
    "empty",
]


@dataclass(frozen=True)
class NotChecked:
    """Why no case of a group could run."""

    reason: Literal[
        "no fused operations",
        "no evaluation",
        "running covariance",
        "slow in the interpreter",
        "no float64 on the device",
        "refused",  # by the kernel, which raised
        "missing inputs",
        "compiled once",  # torch.compile compiles the backward pass, and none of that
        "left out",  # dtypes that were not asked for
        "nothing ran",
    ]
    finding: Finding | None = None  # what the kernel raised


@dataclass(frozen=True)
class CheckGroup:
    """Cases of one kind, finished. Errors are in units of each case's own tolerance: up to 1 passes."""

    section: str  # values, derivatives, invariants, hard inputs
    name: str
    cases: int
    failed: int
    worst: float | None  # the largest error in tolerances, infinite for NaN where a number belongs; None: no case ran
    worst_case: str | None  # that case's identifier, by which it is asked for
    rule: ToleranceRule | None = None
    skipped: NotChecked | None = None
    seconds: float = field(default=0.0, compare=False)  # its share of those of the calls that it is judged from


@dataclass(frozen=True)
class CheckProgress:
    """So many further cases are done. planned: in all, told once, before the first."""

    cases: int
    planned: int | None = None


@dataclass(frozen=True)
class CheckedCall:
    """The call of the kernel that a check makes."""

    mode: str  # train, eval
    dtype: str
    layout: str
    shape: tuple[int, ...]
    fusion: str  # plain, relu, relu+residual, ...
    eps: float


@dataclass(frozen=True)
class CheckFailure:
    """A case that failed: which it is, and what was found."""

    case: str  # its identifier, by which it is asked for
    section: str
    check: str  # gradcheck, same-bits, variance, ...; empty in the values section
    call: CheckedCall | None  # None: inputs of the check's own
    parameter: float | None  # mean over deviation, where the check varies that
    quantity: str  # one of several that are judged on their own; empty where a check has a single result
    finding: Finding
    group: str = ""  # that counts it


@dataclass(frozen=True)
class BugMatch:
    """A failing result that is what a known bug gives. Distances are relative, in the l2 norm."""

    case: str
    quantity: str
    equals: str  # what it then equals
    from_wrong: float
    from_truth: float
    alike: int  # failing results that the bug explains
    failing: int  # of so many that were looked at


@dataclass(frozen=True)
class Facet:
    """Names of one kind (shapes, dtypes, ...) that fail, where others of the kind do not."""

    name: str
    failing: tuple[str, ...]
    clean: tuple[str, ...]


@dataclass(frozen=True)
class FailureSummary:
    """What fails and what does not, where no known bug explains it."""

    quantities: tuple[str, ...]  # of plain cases
    clean: tuple[str, ...]
    failing: int  # plain cases
    cases: int
    facets: tuple[Facet, ...]
    groups: tuple[str, ...]  # of the other sections


@dataclass(frozen=True)
class Diagnosis:
    """A kind of bug that the failures look like, with its evidence; fields without evidence are None."""

    bug: str
    match: BugMatch | None = None
    first: CheckFailure | None = None  # the failure that shows it
    alike: int | None = None  # failures that show it
    of: int | None = None  # calls or cases that were looked at
    of_native: float | None = None  # the largest error over native's own
    relative_errors: dict[str, float] | None = None  # of the variance, by mean over deviation
    summary: FailureSummary | None = None


@dataclass(frozen=True)
class GradientPaths:
    """dL/dx of one case in its three parts (Ioffe & Szegedy 2015, section 3; the l2 norms over all elements).

    Of a norm that whitens, the variance is the covariance of a group of channels.
    """

    case: str
    direct: float  # through xhat_i alone, mean and variance held constant: dNorm(x, X)/dx
    through_mean: float  # with the next, dNorm(x, X)/dX
    through_variance: float
    full: float
    error: float  # of the kernel's dL/dx against float64 central differences, relative l2
    bound: float  # what that error may be
    lost: float  # the relative l2 error of the direct part alone, taken for the gradient
    # Of the values x that share the first mean, ascending: x, and their parts: direct, through mean, through variance.
    values: tuple[tuple[float, ...], ...] = ()

    @property
    def passed(self) -> bool:
        return self.error <= self.bound


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
    device: str = "auto"  # this and the following as they were asked for
    allow_code: bool = False
    dtypes: tuple[str, ...] = ()  # fp32, ...; empty: all
    threads: int | None = None

    @property
    def passed(self) -> bool:
        """Whether no case failed and every gradient is within its bound of central differences."""
        return not any(group.failed for group in self.groups) and all(each.passed for each in self.paths)


@dataclass(frozen=True)
class BiasStep:
    """After `step` steps of the two descents of Ioffe & Szegedy 2015, section 2."""

    step: int
    bias_ignoring: float  # the step takes E[x] for a constant
    loss_ignoring: float
    bias_full: float  # the step follows the whole gradient
    loss_full: float
