"""What holds for every normalization whatever the numbers, from Ioffe & Szegedy 2015 and the chain rule.

Each is judged against the floors of the quantities in it: what rounding explains of y or dx is allowed, summed as the
invariant sums them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bncli.kernels.layout import per_channel
from bncli.measure.reference import tolerance as tolerances
from bncli.measure.reference.gradient_cases import Case, Inputs, generator
from bncli.measure.reference.observe import Finding, Setting, same_bits, written
from bncli.measure.reference.quantities import leaf, observe
from bncli.names import CHECKED_GROUPS, NORMS

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Run:
    """One run of the subject, its exact outcome and the floors of its errors, in float64."""

    case: Case
    given: Inputs
    seen: Values
    truth: Values
    floors: Values


class Broken(Exception):
    """The subject could not be run to the end. The message is the kernel's."""


def run(setting: Setting, case: Case, given: Inputs) -> Run:
    """One run without the second derivative. Raises Broken with the kernel's own message."""
    truth = tolerances.reference(case, given)
    floors = setting.floors(case, given, truth)
    wide = given.wide()  # before a kernel that writes into its input
    seen = observe(setting.subject.call, case, given, second=False)
    if seen.problems:
        raise Broken(next(iter(seen.problems.values())))
    return Run(case, wide, seen.wide(), truth, floors)


def judge(what: str, found: Tensor, expected: Tensor, allowed: Tensor) -> Finding:
    """`found` against `expected`, each element with its own allowance."""
    error = tolerances.in_floors(found, expected, allowed)
    if error <= 1:
        return Finding("", error)
    worst = int(((found - expected).abs() / allowed).flatten().nan_to_num(math.inf).argmax())
    values = (float(found.flatten()[worst]), float(expected.flatten()[worst]), float(allowed.flatten()[worst]))
    return Finding("", error, "{} is {:.6g}; expected {:.6g} within {:.2g}".format(what, *values))


def grouped(values: Tensor, norm: str) -> Tensor:
    """(N, C, *S) -> (groups, m): a row for each mean and variance that the norm takes."""
    if NORMS[norm].over_batch:
        return values.transpose(0, 1).reshape(values.size(1), -1)
    return values.reshape(values.size(0) * NORMS[norm].groups(values.size(1), CHECKED_GROUPS), -1)


def statistics(given: Inputs, case: Case) -> tuple[Tensor, Tensor]:
    """xhat and the variance, (groups, m) and (groups, 1)."""
    x = grouped(given.x, case.norm)
    centred = x - x.mean(1, keepdim=True)
    var = centred.square().mean(1, keepdim=True)
    return centred * (var + case.eps).rsqrt(), var


def upstream(given: Inputs, case: Case) -> Tensor:
    """weight g, the gradient of the loss in xhat, (groups, m)."""
    assert given.weight is not None
    return grouped(given.g * per_channel(given.weight, given.g), case.norm)


# --- the invariants ---------------------------------------------------------------------------------------------------


def sum_of_dx(setting: Setting, case: Case, given: Inputs) -> Finding:
    """A common shift of x changes nothing, so the gradients of a group add up to 0."""
    found = run(setting, case, given)
    dx, floor = grouped(found.seen["dx"], case.norm), grouped(found.floors["dx"], case.norm)
    return judge("the sum of dx", dx.sum(1), torch.zeros(len(dx), dtype=dx.dtype), floor.sum(1))


def all_ones(setting: Setting, case: Case, given: Inputs) -> Finding:
    """The sum of y is m bias, whatever x is."""
    found = run(setting, case, replace(given, g=torch.ones_like(given.g)))
    return judge("dx", found.seen["dx"], torch.zeros_like(found.seen["dx"]), found.floors["dx"])


def sum_of_xhat_dx(setting: Setting, case: Case, given: Inputs) -> Finding:
    """sum xhat dx = 1/sqrt(var + eps) eps/(var + eps) sum xhat weight g: scaling x changes y by way of eps alone."""
    found = run(setting, case, given)
    xhat, var = statistics(found.given, case)
    dx, floor = grouped(found.seen["dx"], case.norm), grouped(found.floors["dx"], case.norm)
    rest = case.eps / (var + case.eps) ** 1.5 * (xhat * upstream(found.given, case)).sum(1, keepdim=True)
    return judge("the sum of xhat dx", (xhat * dx).sum(1), rest.squeeze(1), (xhat.abs() * floor).sum(1))


def scaled_weights(setting: Setting, case: Case, given: Inputs) -> Finding:
    """BN((aW)u) = BN(Wu) with eps scaled by a^2, and the gradient in aW is 1/a of that in W (section 3.3)."""
    n, c, s = case.shape
    draw = generator(case.identifier + "/W")
    w = torch.randn(c, 5, generator=draw, dtype=torch.float64)
    u = torch.randn(n, 5, s, generator=draw, dtype=torch.float64)
    findings = []
    runs = []
    for a in (1.0, 3.0, 1 / 16):
        x = torch.einsum("ck,nks->ncs", a * w, u).to(given.x)
        found = run(setting, replace(case, eps=case.eps * a**2), replace(given, x=x))
        gradient = torch.einsum("ncs,nks->ck", found.seen["dx"], u) * a
        floor = torch.einsum("ncs,nks->ck", found.floors["dx"] * a, u.abs())
        runs.append((found.seen["forward"], found.floors["forward"], gradient, floor))
    y, y_floor, gradient, floor = runs[0]
    for other_y, other_y_floor, other, other_floor in runs[1:]:
        findings.append(judge("BN((aW)u)", other_y, y, y_floor + other_y_floor))
        findings.append(judge("a times the gradient in aW", other, gradient, floor + other_floor))
    return max(findings, key=lambda finding: finding.error)


def output_moments(setting: Setting, case: Case, given: Inputs) -> Finding:
    """The output's mean is bias and its variance weight^2 var/(var + eps), in each channel."""
    found = run(setting, case, given)
    assert found.given.weight is not None
    assert found.given.bias is not None
    y, floor = grouped(found.seen["forward"], "batch"), grouped(found.floors["forward"], "batch").mean(1)
    _, var = statistics(found.given, case)
    expected = found.given.weight**2 * (var / (var + case.eps)).squeeze(1)
    variance = y.var(1, correction=0)
    mean = judge("the mean of y", y.mean(1), found.given.bias, floor)
    spread = judge("the variance of y", variance, expected, 2 * expected.sqrt() * floor + floor**2)
    return max(mean, spread, key=lambda finding: finding.error)


def evaluation_gradient(setting: Setting, case: Case, given: Inputs) -> Finding:
    """In evaluation y is affine in x, so dx = weight/sqrt(running_var + eps) g."""
    found = run(setting, case, given)
    assert found.given.weight is not None
    assert found.given.running_var is not None
    slope = found.given.weight * (found.given.running_var + case.eps).rsqrt()
    expected = per_channel(slope, found.given.g) * found.given.g
    return judge("dx", found.seen["dx"], expected, found.floors["dx"])


def running_statistics(setting: Setting, case: Case, given: Inputs) -> Finding:
    """new = (1 - momentum) old + momentum batch, the variance with m/(m - 1) (algorithm 2, line 10)."""
    findings = []
    for momentum in (0.0, 0.1, 1.0):
        found = run(setting, replace(case, momentum=momentum), given)
        x = grouped(found.given.x, "batch")
        for name, batch in (("running_mean", x.mean(1)), ("running_var", x.var(1, correction=1))):
            old = getattr(found.given, name)
            what = f"{name} with momentum {momentum:g}"
            expected = (1 - momentum) * old + momentum * batch
            findings.append(judge(what, found.seen[name], expected, found.floors[name]))
    return max(findings, key=lambda finding: finding.error)


def inputs_unwritten(setting: Setting, case: Case, given: Inputs) -> Finding:
    """No argument is written to, but the running statistics in training."""
    before = given.wide()
    seen = observe(setting.subject.call, case, given, second=False)
    if changed := written(given, before):
        return Finding("", math.inf, changed)
    if seen.problems:
        raise Broken(next(iter(seen.problems.values())))
    return Finding("", 0.0)


def repeatable(setting: Setting, case: Case, given: Inputs) -> Finding:
    """Two runs on the same inputs give the same bits in every quantity."""
    first, second = (observe(setting.subject.call, case, given) for _ in range(2))
    if first.problems:
        raise Broken(next(iter(first.problems.values())))
    differing = [name for name, value in first.values.items() if not same_bits(value, second.values.get(name))]
    if differing:
        return Finding("", math.inf, f"{', '.join(differing)} differ between two runs on the same inputs")
    return Finding("", 0.0)


def without_gradients(setting: Setting, case: Case, given: Inputs) -> Finding:
    """y is the same where no gradient is asked for, and the vectors' gradients are where x asks for none.

    Kernels take other ways there: nothing to save, nothing to return.
    """
    truth = tolerances.reference(case, given)
    floors = setting.floors(case, given, truth)
    arguments = (case.training, case.momentum, case.eps, given.residual, case.activation)
    with torch.no_grad():
        y = setting.subject.call(given.x, *_running(given), given.weight, given.bias, *arguments)
    found = judge("y without gradients", y.detach().double().cpu(), truth["forward"], floors["forward"])
    vectors = [leaf(vector) for vector in (given.weight, given.bias)]
    y = setting.subject.call(given.x, *_running(given), *vectors, *arguments)
    wanted = {name: vector for name, vector in zip(("dweight", "dbias"), vectors, strict=True) if vector is not None}
    gradients = torch.autograd.grad(y, list(wanted.values()), given.g, allow_unused=True)
    for name, gradient in zip(wanted, gradients, strict=True):
        if gradient is None:
            return Finding("", math.inf, f"{name} is missing where x needs no gradient")
        other = judge(f"{name} where x needs no gradient", gradient.double().cpu(), truth[name], floors[name])
        found = max(found, other, key=lambda finding: finding.error)
    return found


def _running(given: Inputs) -> list[Tensor | None]:
    return [None if running is None else running.clone() for running in (given.running_mean, given.running_var)]
