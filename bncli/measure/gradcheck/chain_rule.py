"""Gradient of a norm in three parts (direct, through the mean, through the variance), and the effect of ignoring two.

A normalized value depends on x_i directly and, through mean and variance, on the set X that they are computed from:
xhat_i = Norm(x_i, X). So dL/dx_i is the sum of a direct part, dNorm/dx_i, and of the parts through the mean and the
variance, which together are dNorm/dX. A norm that whitens has the covariance of a group of channels instead.

Tensors are in rows: (sets, k, m), where k channels of m values share a covariance; k = 1 is a variance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bncli.errors import BncliError
from bncli.kernels.definition import inverse_root
from bncli.kernels.layout import per_channel
from bncli.measure.gradcheck.invariants import grouped
from bncli.measure.reference.case import Case
from bncli.names import CHECKED_GROUP_SIZE, NORMS
from bncli.results.gradcheck import BiasStep, GradientPaths

# call(x, weight, bias, eps) -> y: training mode; x and y (N, C, *S), weight and bias (C)
Call = Callable[[Tensor, Tensor, Tensor, float], Tensor]

ROUNDOFF = torch.finfo(torch.float64).eps / 2  # u, the largest relative error of one float64 operation


def cases_of(norm: str) -> dict[str, Case]:
    """The cases of a norm that have enough values."""
    k = NORMS[norm].covariance_channels(CHECKED_GROUP_SIZE)
    shapes: dict[str, tuple[tuple[int, ...], float]] = {
        "vectors": ((16, 8), 1e-5),
        "images": ((4, 4, 4, 4), 1e-5),
        "large eps": ((16, 8), 1.0),
        # Mean and variance take 2 of 3 degrees of freedom; the means and the covariance of 2 channels 5 of 10.
        "small batch": ((1 + 2 * k, 8), 1e-5),
    }
    found = {
        name: Case("train", "float64", "contiguous", shape, eps=eps, norm=norm) for name, (shape, eps) in shapes.items()
    }
    return {name: case for name, case in found.items() if not case.too_few_values}


class Inputs(NamedTuple):
    """A case's tensors: x and upstream (N, C, *S), weight and bias (C). As rows: each of them (sets, k, m)."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    upstream: Tensor  # dL/dy
    eps: float
    norm: str


def paths(call: Call, device: torch.device, norm: str = "batch") -> tuple[GradientPaths, ...]:
    """dL/dx of each case in three parts, and the error of the kernel's dL/dx against central differences of the loss.

    `call` is the kernel's training-mode forward, differentiable. It is called in float64, or in float32 if it
    refuses float64, with a bound to match; `error` is infinite if both fail or return NaN. Raises only errors of bncli
    itself (BncliError).

    L = sum(g * y) with a random g. With g all ones the loss would be the constant m sum(bias) with a zero gradient, and
    a relative error would compare rounding errors with zero.
    """
    return tuple(_measure(call, device, name, case, seed) for seed, (name, case) in enumerate(cases_of(norm).items()))


def _measure(call: Call, device: torch.device, name: str, case: Case, seed: int) -> GradientPaths:
    inputs, sets = random_inputs(case, seed), sets_of(case)
    rows = as_rows(inputs, sets)
    step = best_step(rows)
    direct, through_mean, through_variance = parts = three_parts(rows)
    full = direct + through_mean + through_variance
    size = float(full.norm())
    found, dtype = _gradient_of(call, inputs, device)
    error = math.inf
    if found is not None:
        error = float((found.flatten()[sets] - central_differences(rows, step)).norm()) / size
    return GradientPaths(
        case=f"{name} {'x'.join(map(str, inputs.x.shape))}",
        direct=float(direct.norm()),
        through_mean=float(through_mean.norm()),
        through_variance=float(through_variance.norm()),
        full=size,
        error=error if math.isfinite(error) else math.inf,
        bound=(differences_bound(rows, step) + arithmetic_bound(rows, dtype)) / size,
        lost=float((direct - full).norm()) / size,
        values=tuple(sorted(zip(*(each[0, 0].tolist() for each in (rows.x, *parts)), strict=True))),
    )


def _gradient_of(call: Call, inputs: Inputs, device: torch.device) -> tuple[Tensor | None, torch.dtype]:
    """The kernel's dL/dx (N, C, *S) on the host, or None if it has none, and the dtype that it accepted."""
    for dtype in (torch.float64, torch.float32):
        try:
            x, weight, bias, upstream = (each.to(device, dtype, copy=True) for each in inputs[:4])
            y = call(x.requires_grad_(), weight, bias, inputs.eps)
            if y.dtype == dtype:
                (found,) = torch.autograd.grad(y, x, upstream)
                return found.detach().cpu().double(), dtype
        except BncliError:
            raise
        except (Exception, SystemExit):  # other checks report what a user's kernel raises
            continue
    return None, torch.float32


# --- the case as rows ---------------------------------------------------------------------------------------------


def random_inputs(case: Case, seed: int) -> Inputs:
    """float64 values that float32 represents exactly; channels have deviations of 0.3 to 3 and a mean of 1."""
    generator = torch.Generator().manual_seed(seed)
    channels = case.shape[1]
    noise = torch.randn(case.shape, generator=generator)
    x = 1 + per_channel(torch.logspace(-0.5, 0.5, channels), noise) * noise
    weight = 0.5 + torch.rand(channels, generator=generator)
    bias = torch.randn(channels, generator=generator)
    upstream = torch.randn(case.shape, generator=generator)
    return Inputs(x.double(), weight.double(), bias.double(), upstream.double(), case.eps, case.norm)


def sets_of(case: Case) -> Tensor:
    """Flat indices into (N, C, *S), (sets, k, m): a row of m for each mean, k rows for each variance or covariance."""
    means = grouped(torch.arange(math.prod(case.shape)).view(case.shape), case.norm)
    return means.unflatten(0, (-1, NORMS[case.norm].covariance_channels(CHECKED_GROUP_SIZE)))


def as_rows(inputs: Inputs, sets: Tensor) -> Inputs:
    """The inputs with one row per set; weight and bias are expanded to the elements."""
    spread = [per_channel(each, inputs.x).expand_as(inputs.x) for each in (inputs.weight, inputs.bias)]
    x, weight, bias, upstream = (each.flatten()[sets] for each in (inputs.x, *spread, inputs.upstream))
    return Inputs(x, weight, bias, upstream, inputs.eps, inputs.norm)


# --- the true gradient, its parts and its differences -------------------------------------------------------------


def normalized(rows: Inputs) -> Tensor:
    """y by the definition, (sets, k, m)."""
    return _by_paths(rows, rows.x, rows.x, rows.x)


def _by_paths(rows: Inputs, value: Tensor, of_mean: Tensor, of_covariance: Tensor) -> Tensor:
    """y where the values, those that the mean and those that the covariance are taken of are separate tensors.

    A change of the mean does not change the covariance: it has the factor sum(x_i - mean), which is zero.
    """
    centred = of_covariance - rows.x.mean(-1, keepdim=True).detach()
    root = inverse_root(NORMS[rows.norm])(_regular(centred, rows.eps))
    return rows.weight * (root @ (value - of_mean.mean(-1, keepdim=True))) + rows.bias


def _regular(centred: Tensor, eps: float) -> Tensor:
    """The covariance with eps on its diagonal, (sets, k, k), or the variance plus eps, (sets, 1, 1)."""
    return centred @ centred.mT / centred.size(-1) + eps * torch.eye(centred.size(1), dtype=centred.dtype)


def three_parts(rows: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """dL/dx through x_i alone, through the mean and through the covariance, each (sets, k, m); their sum is dL/dx.

    Of one channel they are the three summands of Ioffe & Szegedy 2015, section 3, the chain rule before algorithm 2.
    """
    paths = [rows.x.clone().requires_grad_() for _ in range(3)]
    direct, through_mean, through_covariance = torch.autograd.grad(_by_paths(rows, *paths), paths, rows.upstream)
    return direct, through_mean, through_covariance


def central_differences(rows: Inputs, step: Tensor) -> Tensor:
    """(L(x + h) - L(x - h)) / 2h for each x_i, (sets, k, m); step h: (sets). Differences of y round little."""
    count = rows.x[0].numel()
    moves = torch.eye(count, dtype=step.dtype).view(count, 1, *rows.x.shape[1:]) * step[:, None, None]
    above, below = ((rows.x + sign * moves).flatten(0, 1) for sign in (1, -1))  # (k m sets, k, m): one value is moved
    weight, bias, upstream = (each.repeat(count, 1, 1) for each in (rows.weight, rows.bias, rows.upstream))
    high, low = (rows._replace(x=x, weight=weight, bias=bias) for x in (above, below))
    slopes = (upstream * (normalized(high) - normalized(low))).sum((1, 2)) / (above - below).sum((1, 2))
    return slopes.view(count, -1).T.reshape(rows.x.shape)


def _eigenvalues(rows: Inputs) -> Tensor:
    """Of the covariance plus eps, (sets, k), the smallest first; the variance plus eps, (sets, 1)."""
    return torch.linalg.eigvalsh(_regular(rows.x - rows.x.mean(-1, keepdim=True), rows.eps))


def best_step(rows: Inputs) -> Tensor:
    """h, (sets): truncation ~ h**2 and rounding ~ u/h balance at cbrt(u) of the smallest deviation of x."""
    return ROUNDOFF ** (1 / 3) * _eigenvalues(rows)[:, 0].sqrt()


def differences_bound(rows: Inputs, step: Tensor) -> float:
    """Error bound of central differences, as an l2 norm over all x_i: truncation and rounding.

    Truncation is c h**2 but for terms in h**4, so it is 1/99 of the change when h grows tenfold (Richardson 1911).

    Rounding: each operation has an independent error of at most u, so squared errors add up and a sum of m terms has an
    error of u sqrt(m) (Higham & Mary 2019, doi 10.1137/18M1226312). An inverse root W is good to 3/2 u, and u / 2
    times the condition number c of A: W A W, where terms of up to c cancel, over the sum of two of A's roots.
    """
    truncation = (central_differences(rows, 10 * step) - central_differences(rows, step)) / 99
    (_, k, m), values = rows.x.shape, _eigenvalues(rows)
    centred, to_xhat = rows.x - rows.x.mean(-1, keepdim=True), rows.upstream * rows.weight
    regular = _regular(centred, rows.eps).requires_grad_()
    root = inverse_root(NORMS[rows.norm])(regular)
    of_root, of_covariance = torch.autograd.grad((to_xhat * (root @ centred)).sum(), (root, regular))
    root = root.detach()
    terms = rows.weight.abs() * (root.abs() @ centred.abs())
    condition = (values[:, -1] / values[:, 0])[:, None, None]
    of_one_root = root.abs().amax((1, 2), keepdim=True) * (1.5 + condition / 2)
    errors = (
        rows.upstream * (2 * terms + normalized(rows).abs()),
        math.sqrt(m) * (root @ to_xhat).sum(-1) * rows.x.abs().mean(-1),
        math.sqrt(m) * of_covariance * (centred.abs() @ centred.abs().mT / m),
        of_root * of_one_root,
    )
    squares = sum((error.square().flatten(1).sum(1) for error in errors), torch.zeros(()))
    rounding = (2 * squares).sqrt() * ROUNDOFF / (2 * step)  # of L above and L below; one a set, for k m slopes each
    return math.hypot(float(truncation.norm()), math.sqrt(k * m) * float(rounding.norm()))


def arithmetic_bound(rows: Inputs, dtype: torch.dtype) -> float:
    """Error bound of a correct kernel's dL/dx from rounding in `dtype`, as an l2 norm over all x_i.

    Each part is a few operations and sums of m terms (u sqrt(m), as above); the error of the mean counts relative to
    the smallest deviation, and that of a covariance as often as its condition number.
    """
    roundoff, m, values = torch.finfo(dtype).eps / 2, rows.x.size(-1), _eigenvalues(rows)[:, :, None]
    smallest, largest = values[:, :1], values[:, -1:]
    size = sum(part.abs() for part in three_parts(rows)) * (1 + rows.x.abs().mean(-1, keepdim=True) / smallest.sqrt())
    return roundoff * (math.sqrt(m) + 8) * float((size * largest / smallest).norm())


# --- section 2's demonstration ------------------------------------------------------------------------------------


def bias_demo(steps: int = 1000, rate: float = 0.1, values: int = 64, seed: int = 0) -> tuple[BiasStep, ...]:
    """Ioffe & Szegedy 2015, section 2: a layer adds a learned bias b to u and subtracts the mean of the sum.

    xhat = u + b - E[u + b], L = mean((xhat - t)**2) / 2 with targets t whose mean is not zero. Gradient
    descent from b = 0, once with E[x] treated as a constant and once differentiated. b cancels out of xhat, so L never
    changes, but the first b grows without bound. Reported: step 0, the powers of ten, and the last step.
    """
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(values, generator=generator, dtype=torch.float64)
    target = 1 + torch.randn(values, generator=generator, dtype=torch.float64)

    def loss_of(bias: Tensor, ignoring: bool) -> Tensor:
        x = u + bias
        mean = x.mean().detach() if ignoring else x.mean()
        return (x - mean - target).square().mean() / 2

    reported = {0, steps, *(10**k for k in range(len(str(steps))))}
    biases = [torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2)]
    found = []
    for step in range(steps + 1):
        losses = [loss_of(bias, ignoring) for bias, ignoring in zip(biases, (True, False), strict=True)]
        if step in reported:
            found.append(BiasStep(step, biases[0].item(), losses[0].item(), biases[1].item(), losses[1].item()))
        for bias, loss in zip(biases, losses, strict=True):
            (slope,) = torch.autograd.grad(loss, bias)
            with torch.no_grad():
                bias -= rate * slope
    return tuple(found)
