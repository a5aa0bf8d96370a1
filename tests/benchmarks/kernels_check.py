"""One claim about one case, and the claims that every kernel has to meet: right, repeatable, drop-in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bncli.kernels import Kernel, native
from bncli.kernels.definition import Forward
from bncli.measure.reference import case as cases
from bncli.measure.reference import judge, tolerance
from bncli.measure.reference.candidate import Rule, by_name
from bncli.measure.reference.case import Inputs
from bncli.measure.reference.judge import PERTURBED_ELEMENTS, Evidence, Large, large, same_bits
from bncli.measure.reference.observe import observe
from bncli.report.text import finding_text
from bncli.results.finding import Finding
from bncli.results.profile import Case

Apply = Callable[[Inputs], Tensor]  # the forward pass; moves the running statistics of what it is given
Values = dict[str, Tensor]
# What can be measured; seam: native behind the kernels' signature.
CANDIDATES: dict[str, str | Kernel] = {"fused": "fused", "seam": native.batch_norm, "native": "native"}


def call_of(kernel: str) -> Forward:
    """One of CANDIDATES, called like bncli.batch_norm by position."""
    return by_name(CANDIDATES[kernel])


def apply(case: Case, kernel: str) -> Apply:
    """The forward pass of a case by one of CANDIDATES."""
    timed, call = cases.timed(case), call_of(kernel)
    return lambda given: call(*cases.arguments(timed, given))


def make(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    return cases.timed_inputs(cases.timed(case), device, seed)


def outputs(case: Case, call: Forward, inputs: Inputs) -> Values:
    """y, every gradient, and the running statistics after one step; the inputs are left as they were."""
    return observe(call, cases.timed(case), inputs, second=False).values


@dataclass(frozen=True)
class Check:
    """One claim about one case."""

    claim: str
    case: str
    passed: bool
    detail: str = ""


def rule(kernel: str) -> Rule:
    """Every candidate is held to what bncli's kernels are held to."""
    return "native" if kernel == "native" else "kernel"


def judged(shape: Large, kernel: str, claim: str, case: Case, call: Forward | None = None) -> Check:
    """Whether every quantity is within its tolerance, and the inputs are as they were. call: another form of it."""
    return _of(shape.judge(call or call_of(kernel), rule(kernel), poison=call is None).wrong, claim, case)


def _of(wrong: Finding | None, claim: str, case: Case) -> Check:
    return Check(claim, str(case), wrong is None, "" if wrong is None else f"{wrong.quantity}: {finding_text(wrong)}")


def within(case: cases.Case, given: Inputs, found: Values, native_found: Values, by: Rule) -> Finding | None:
    """The first of the results that is not within its tolerance. All on the inputs' device, which has float64."""
    device = given.x.device
    held_to = tolerance.computed(case, given, False, device, PERTURBED_ELEMENTS)
    seen, own = ({name: t.double() for name, t in values.items()} for values in (found, native_found))
    evidence = Evidence(case, given.wide(device), seen, held_to.truth, held_to.floors(by))
    return judge.judged(evidence, {}, own).wrong


def accuracy(case: Case, kernel: str, device_name: str, seed: int = 0) -> list[Check]:
    """Within its tolerances, the same bits again, of the right dtypes and strides, nothing written into an input."""
    shape = large(cases.timed(case), torch.device(device_name), seed=seed)
    wrong = shape.judge(call_of(kernel), rule(kernel)).wrong
    claim = "inputs untouched" if wrong is not None and wrong.kind == "input_written" else "accuracy"
    first, second = (outputs(case, call_of(kernel), shape.given) for _ in range(2))
    return [_of(wrong, claim, case), repeated(first, second, "repeatable", case), _drop_in(case, first, shape)]


def repeated(one: dict[str, Tensor], other: dict[str, Tensor], claim: str, case: Case) -> Check:
    different = [name for name in one if not same_bits(one[name], other.get(name))]
    return Check(claim, str(case), not different, f"other bits in {', '.join(different)}" if different else "")


def _drop_in(case: Case, found: dict[str, Tensor], shape: Large) -> Check:
    """Dtypes as native's, and a y that keeps a dense input's strides, on which the next convolution's speed rests."""
    own = outputs(case, call_of("native"), shape.given)
    pairs = [(name, found[name], t) for name, t in own.items() if name in found]
    wrong = [f"{name} is {t.dtype}, native's {other.dtype}" for name, t, other in pairs if t.dtype != other.dtype]
    y = found.get("forward")
    if y is None:
        wrong.append("no output of the input's kind")
    elif case.layout != "strided" and _strides(y) not in (_strides(own["forward"]), _strides(shape.given.x)):
        wrong.append(f"y has strides {y.stride()}, native's {own['forward'].stride()}")
    return Check("dtypes and strides", str(case), not wrong, "; ".join(wrong))


def _strides(t: Tensor) -> list[int]:
    """Those that mean something: of dimensions with more than one element."""
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]
