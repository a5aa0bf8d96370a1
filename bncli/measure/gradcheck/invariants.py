"""Invariants of normalization that hold for all inputs, from Ioffe & Szegedy 2015 and the chain rule.

The tolerance of each is derived from the rounding errors (floors) of y or dx, summed as the invariant sums them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from itertools import product
from operator import attrgetter

import torch
from torch import Tensor

from bncli.kernels.layout import per_channel
from bncli.measure.reference import tolerance as tolerances
from bncli.measure.reference.candidate import KernelFailed
from bncli.measure.reference.case import Case, Inputs, arguments, divisible, generator
from bncli.measure.reference.judge import (
    Check,
    CheckContext,
    CheckGroupPlan,
    Evidence,
    number_kind,
    same_bits,
    single,
    written,
)
from bncli.measure.reference.observe import observe
from bncli.names import CHECKED_GROUP_SIZE, CHECKED_GROUPS, CHECKED_NORMS, NORMS
from bncli.results.finding import Finding
from bncli.results.gradcheck import ToleranceRule


def run(context: CheckContext, case: Case, given: Inputs) -> Evidence:
    """One forward and backward pass. Raises KernelFailed with the first problem."""
    held_to = tolerances.expected(case, given)
    wide = given.wide()  # before a kernel that writes into its input
    seen = observe(context.candidate.call, case, given, second=False)
    if seen.problem:
        raise KernelFailed(seen.problem)
    return Evidence(case, wide, seen.wide(), held_to.truth, context.floors(held_to))


def judge(quantity: str, found: Tensor, expected: Tensor, allowed: Tensor) -> Finding:
    """Compare `found` with `expected`, with a tolerance per element."""
    error = tolerances.in_floors(found, expected, allowed)
    if error <= 1:
        return Finding("right", quantity, error)
    worst = int(((found - expected).abs() / allowed).flatten().nan_to_num(math.inf).argmax())
    value, exact, most = (float(each.flatten()[worst]) for each in (found, expected, allowed))
    return Finding(number_kind(value, exact), quantity, error, found=value, expected=exact, allowed=most)


def grouped(values: Tensor, norm: str) -> Tensor:
    """(N, C, *S) -> (groups, m): one row per mean and variance of the norm."""
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


def sum_of_dx(context: CheckContext, case: Case, given: Inputs) -> Finding:
    """A constant added to x does not change y, so the gradients of a group sum to 0."""
    found = run(context, case, given)
    dx, floor = grouped(found.seen["dx"], case.norm), grouped(found.floors["dx"], case.norm)
    return judge("the sum of dx", dx.sum(1), torch.zeros(len(dx), dtype=dx.dtype), floor.sum(1))


def all_ones(context: CheckContext, case: Case, given: Inputs) -> Finding:
    """The sum of y is m bias, whatever x is."""
    found = run(context, case, replace(given, g=torch.ones_like(given.g)))
    return judge("dx", found.seen["dx"], torch.zeros_like(found.seen["dx"]), found.floors["dx"])


def sum_of_xhat_dx(context: CheckContext, case: Case, given: Inputs) -> Finding:
    """sum xhat dx = 1/sqrt(var + eps) eps/(var + eps) sum xhat weight g: scaling x changes y by way of eps alone."""
    found = run(context, case, given)
    xhat, var = statistics(found.given, case)
    dx, floor = grouped(found.seen["dx"], case.norm), grouped(found.floors["dx"], case.norm)
    rest = case.eps / (var + case.eps) ** 1.5 * (xhat * upstream(found.given, case)).sum(1, keepdim=True)
    return judge("the sum of xhat dx", (xhat * dx).sum(1), rest.squeeze(1), (xhat.abs() * floor).sum(1))


def scaled_weights(context: CheckContext, case: Case, given: Inputs) -> Finding:
    """BN((aW)u) = BN(Wu) with eps scaled by a^2, and the gradient in aW is 1/a of that in W (section 3.3)."""
    n, c, s = case.shape
    draw = generator(case.identifier + "/W")
    w = torch.randn(c, 5, generator=draw, dtype=torch.float64)
    u = torch.randn(n, 5, s, generator=draw, dtype=torch.float64)
    findings = []
    runs = []
    for a in (1.0, 3.0, 1 / 16):
        x = torch.einsum("ck,nks->ncs", a * w, u).to(given.x)
        found = run(context, replace(case, eps=case.eps * a**2), replace(given, x=x))
        gradient = torch.einsum("ncs,nks->ck", found.seen["dx"], u) * a
        floor = torch.einsum("ncs,nks->ck", found.floors["dx"] * a, u.abs())
        runs.append((found.seen["forward"], found.floors["forward"], gradient, floor))
    y, y_floor, gradient, floor = runs[0]
    for other_y, other_y_floor, other, other_floor in runs[1:]:
        findings.append(judge("BN((aW)u)", other_y, y, y_floor + other_y_floor))
        findings.append(judge("a times the gradient in aW", other, gradient, floor + other_floor))
    return max(findings, key=attrgetter("error"))


def output_moments(context: CheckContext, case: Case, given: Inputs) -> Finding:
    """The output's mean is bias and its variance weight^2 var/(var + eps), in each channel."""
    found = run(context, case, given)
    assert found.given.weight is not None
    assert found.given.bias is not None
    y, floor = grouped(found.seen["forward"], "batch"), grouped(found.floors["forward"], "batch").mean(1)
    _, var = statistics(found.given, case)
    expected = found.given.weight**2 * (var / (var + case.eps)).squeeze(1)
    variance = y.var(1, correction=0)
    mean = judge("the mean of y", y.mean(1), found.given.bias, floor)
    spread = judge("the variance of y", variance, expected, 2 * expected.sqrt() * floor + floor**2)
    return max(mean, spread, key=attrgetter("error"))


def output_covariance(context: CheckContext, case: Case, given: Inputs) -> Finding:
    """The output's covariance in a group is C / (C + eps), weighted (W C W)."""
    found = run(context, case, given)
    assert found.given.weight is not None
    x, y = (grouped(t, "batch").unflatten(0, (-1, CHECKED_GROUP_SIZE)) for t in (found.given.x, found.seen["forward"]))
    before, after = (torch.stack([torch.cov(group, correction=0) for group in each]) for each in (x, y))
    weight = found.given.weight.reshape(-1, CHECKED_GROUP_SIZE)
    regular = before + case.eps * torch.eye(CHECKED_GROUP_SIZE, dtype=before.dtype)
    expected = torch.linalg.solve(regular, before) * weight[:, :, None] * weight[:, None]
    of_group = grouped(found.floors["forward"], "batch").mean(1).reshape(-1, CHECKED_GROUP_SIZE)
    size = weight.abs()
    allowed = of_group[:, :, None] * size[:, None] + size[:, :, None] * of_group[:, None]
    return judge("the covariance of y", after, expected, allowed)


def evaluation_gradient(context: CheckContext, case: Case, given: Inputs) -> Finding:
    """In evaluation y is affine in x, so dx = weight/sqrt(running_var + eps) g."""
    found = run(context, case, given)
    assert found.given.weight is not None
    assert found.given.running_var is not None
    slope = found.given.weight * (found.given.running_var + case.eps).rsqrt()
    expected = per_channel(slope, found.given.g) * found.given.g
    return judge("dx", found.seen["dx"], expected, found.floors["dx"])


def running_statistics(context: CheckContext, case: Case, given: Inputs) -> Finding:
    """new = (1 - momentum) old + momentum batch, the variance with m/(m - 1) (algorithm 2, line 10)."""
    findings = []
    for momentum in (0.0, 0.1, 1.0):
        found = run(context, replace(case, momentum=momentum), given)
        x = grouped(found.given.x, "batch")
        for name, batch in (("running_mean", x.mean(1)), ("running_var", x.var(1, correction=1))):
            old = getattr(found.given, name)
            what = f"{name} with momentum {momentum:g}"
            expected = (1 - momentum) * old + momentum * batch
            findings.append(judge(what, found.seen[name], expected, found.floors[name]))
    return max(findings, key=attrgetter("error"))


def inputs_unwritten(context: CheckContext, case: Case, given: Inputs) -> Finding:
    """No argument is modified, except the running statistics in training."""
    before = given.wide()
    seen = observe(context.candidate.call, case, given, second=False)
    if changed := written(given, before):
        return Finding("input_written", names=changed)
    return seen.problem or Finding("right", error=0.0)


def repeatable(context: CheckContext, case: Case, given: Inputs) -> Finding:
    """Two runs on the same inputs give the same bits in every quantity."""
    checked = context.candidate
    first, second = (observe(checked.call, case, given, checked.differentiates_twice) for _ in range(2))
    if first.problem:
        return first.problem
    differing = [name for name, value in first.values.items() if not same_bits(value, second.values.get(name))]
    return Finding("not_deterministic", names=tuple(differing)) if differing else Finding("right", error=0.0)


def without_gradients(context: CheckContext, case: Case, given: Inputs) -> Finding:
    """y is the same under no_grad, and dweight and dbias are the same if x requires no gradient.

    Kernels may take other code paths there.
    """
    held_to = tolerances.expected(case, given)
    truth, floors = held_to.truth, context.floors(held_to)
    with torch.no_grad():
        y = context.candidate.call(*arguments(case, given.for_one_call()))
    found = judge("y without gradients", y.detach().double().cpu(), truth["forward"], floors["forward"])
    taken = given.for_one_call().each(Tensor.detach)
    vectors = {"dweight": taken.weight, "dbias": taken.bias}
    wanted = {name: vector.requires_grad_() for name, vector in vectors.items() if vector is not None}
    y = context.candidate.call(*arguments(case, taken))
    gradients = torch.autograd.grad(y, list(wanted.values()), given.g, allow_unused=True)
    for name, gradient in zip(wanted, gradients, strict=True):
        if gradient is None:
            return Finding("no_gradient", name)
        other = judge(f"{name} where x needs no gradient", gradient.detach().double().cpu(), truth[name], floors[name])
        found = max(found, other, key=attrgetter("error"))
    return found


Invariant = Callable[[CheckContext, Case, Inputs], Finding]
ANY = CHECKED_NORMS
OVER_BATCH = tuple(norm for norm in ANY if NORMS[norm].over_batch)
BY_VARIANCE = tuple(norm for norm in ANY if not NORMS[norm].whitens)
WHITENING = tuple(norm for norm in ANY if NORMS[norm].whitens == "exactly")


@dataclass(frozen=True)
class Row:
    slug: str
    name: str
    rule: ToleranceRule
    check: Invariant
    norms: tuple[str, ...] = ("batch",)
    modes: tuple[str, ...] = ("train",)
    dtypes: tuple[str, ...] = ("float32", "float64")
    eps: tuple[float, ...] = (1e-3,)
    shapes: tuple[tuple[int, ...], ...] = ((4, 0, 5, 7),)  # 0: the norm's usual number of channels
    fused: bool = False  # with a residual and an activation, if the candidate supports them


ROWS = (
    Row("sum-dx", "sum of dx over the batch is 0", "summed floors", sum_of_dx, ANY),
    Row("ones", "dx is 0 for an all-ones upstream gradient", "floor of dx", all_ones, OVER_BATCH),
    Row("sum-xhat-dx", "sum of xhat dx is its eps term", "summed floors", sum_of_xhat_dx, BY_VARIANCE, eps=(1e-5, 0.5)),
    Row("scale", "BN((aW)u) = BN(Wu), its gradient 1/a", "summed floors", scaled_weights, ANY, shapes=((8, 0, 5),)),
    Row("moments", "output mean is bias, variance weight^2 var/(var+eps)", "mean floor of y", output_moments),
    Row("covariance", "output covariance is C/(C+eps), weighted", "mean floor of y", output_covariance, WHITENING),
    Row(
        "eval-gradient",
        "evaluation gradient is weight/sqrt(running_var+eps) g",
        "floor of dx",
        evaluation_gradient,
        modes=("eval",),
    ),
    Row(
        "running",
        "running statistics move by momentum, variance by m/(m-1)",
        "floors of running statistics",
        running_statistics,
        shapes=((2, 0, 2), (4, 0, 5, 7)),
    ),
    Row(
        "unwritten",
        "inputs are not written to",
        "no error",
        inputs_unwritten,
        ANY,
        ("train", "eval"),
        ("float32", "bfloat16"),
        fused=True,
    ),
    Row(
        "no-grad",
        "the same without gradients, and with x frozen",
        "floors of y, dweight and dbias",
        without_gradients,
        OVER_BATCH,  # torch 2.13's group norm of channels last on a CPU crashes where x is frozen
        ("train", "eval"),
        fused=True,
    ),
    Row(
        "same-bits",
        "two runs give the same bits",
        "no error",
        repeatable,
        ANY,
        ("train", "eval"),
        ("float32", "bfloat16"),
        shapes=((4, 0, 5, 7), (8, 0, 33, 35)),
    ),
)


def plans(context: CheckContext, refused: Collection[str]) -> Iterator[CheckGroupPlan]:
    """One row per invariant of the norm."""
    candidate = context.candidate
    for row in ROWS:
        row = replace(row, dtypes=tuple(dtype for dtype in row.dtypes if dtype not in refused))
        modes = [mode for mode in row.modes if mode == "train" or candidate.evaluates]
        if candidate.norm not in row.norms or not modes:
            continue
        checks = [_check(context, row, case) for case in _cases(context, row, modes) if not case.needs & set(refused)]
        yield CheckGroupPlan("invariants", checks, row.rule, {"": row.name})


def _cases(context: CheckContext, row: Row, modes: list[str]) -> Iterator[Case]:
    candidate, quick = context.candidate, context.effort == "quick"
    layouts = ("contiguous",) if quick else ("contiguous", "channels_last")
    dtypes = row.dtypes[:1] if quick else row.dtypes
    fusions = ("plain", "relu+residual") if row.fused and candidate.fuses else ("plain",)
    few = quick or (candidate.interpreted and row.slug == "same-bits")  # minutes, interpreted
    shapes = [
        tuple(size or divisible(3, candidate.norm) for size in shape)
        for shape in (row.shapes[:1] if few else row.shapes)
    ]
    for mode, dtype, shape, layout, fusion, eps in product(modes, dtypes, shapes, layouts, fusions, row.eps):
        if layout == "contiguous" or len(shape) == 4:
            yield Case(mode, dtype, layout, shape, fusion, eps=eps, norm=candidate.norm)


def _check(context: CheckContext, row: Row, case: Case) -> Check:
    suffix = f"/eps={case.eps:g}" if len(row.eps) > 1 else ""
    identifier = f"invariants/{row.slug}/{case.identifier}{suffix}"
    return Check("invariants", identifier, lambda: single(context, case, row.check), row.slug, case)
