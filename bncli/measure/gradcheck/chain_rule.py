"""Gradient of a norm in three parts (direct, through the mean, through the variance), and the effect of ignoring two.

A normalized value depends on x_i directly and, through mean and variance, on the set X that they are computed from:
xhat_i = Norm(x_i, X). So dL/dx_i is the sum of a direct part, dNorm/dx_i, and of the parts through the mean and the
variance, which together are dNorm/dX.

A set is a row here: tensors are (sets, m), with m values that share a mean and a variance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bncli.errors import BncliError
from bncli.kernels.layout import per_channel
from bncli.measure.gradcheck.invariants import grouped
from bncli.measure.reference.case import Case
from bncli.results.gradcheck import BiasStep, GradientPaths

# call(x, weight, bias, eps) -> y: training mode; x and y (N, C, *S), weight and bias (C)
Call = Callable[[Tensor, Tensor, Tensor, float], Tensor]

ROUNDOFF = torch.finfo(torch.float64).eps / 2  # u, the largest relative error of one float64 operation
CASES = {
    "vectors": Case("train", "float64", "contiguous", (16, 8), eps=1e-5),
    "images": Case("train", "float64", "contiguous", (4, 4, 4, 4), eps=1e-5),
    "large eps": Case("train", "float64", "contiguous", (16, 8), eps=1.0),
    # Mean and variance take 2 of 3 degrees of freedom.
    "small batch": Case("train", "float64", "contiguous", (3, 8), eps=1e-5),
}


class Inputs(NamedTuple):
    """A case's tensors: x and upstream (N, C, *S), weight and bias (C). As rows: each of them (sets, m)."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    upstream: Tensor  # dL/dy
    eps: float


def paths(call: Call, device: torch.device, norm: str = "batch") -> tuple[GradientPaths, ...]:
    """dL/dx of each case in three parts, and the error of the kernel's dL/dx against central differences of the loss.

    `call` is the kernel's training-mode forward, differentiable. It is called in float64, or in float32 if it
    refuses float64, with a bound to match; `error` is infinite if both fail or return NaN. Raises only errors of bncli
    itself (BncliError).

    L = sum(g * y) with a random g. With g all ones the loss would be the constant m sum(bias) with a zero gradient, and
    a relative error would compare rounding errors with zero.
    """
    chosen = {name: case for name, case in CASES.items() if sets_of(case, norm).size(1) > 1}
    return tuple(
        _measure(call, device, name, sets_of(case, norm), seed) for seed, (name, case) in enumerate(chosen.items())
    )


def _measure(call: Call, device: torch.device, name: str, sets: Tensor, seed: int) -> GradientPaths:
    inputs = random_inputs(CASES[name], seed)
    rows = as_rows(inputs, sets)
    direct, through_mean, through_variance = three_parts(rows)
    full = direct + through_mean + through_variance
    size = float(full.norm())
    found, dtype = _gradient_of(call, inputs, device)
    error = math.inf
    if found is not None:
        error = float((found.flatten()[sets] - central_differences(rows)).norm()) / size
    return GradientPaths(
        case=f"{name} {'x'.join(map(str, inputs.x.shape))}",
        direct=float(direct.norm()),
        through_mean=float(through_mean.norm()),
        through_variance=float(through_variance.norm()),
        full=size,
        error=error if math.isfinite(error) else math.inf,
        bound=(differences_bound(rows) + arithmetic_bound(rows, dtype)) / size,
        lost=float((direct - full).norm()) / size,
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
    return Inputs(x.double(), weight.double(), bias.double(), upstream.double(), case.eps)


def sets_of(case: Case, norm: str) -> Tensor:
    """Flat indices into (N, C, *S), (sets, m): a row for each set of values that share a mean and a variance."""
    return grouped(torch.arange(math.prod(case.shape)).view(case.shape), norm)


def as_rows(inputs: Inputs, sets: Tensor) -> Inputs:
    """The inputs with one row per set; weight and bias are expanded to the elements."""
    spread = [per_channel(each, inputs.x).expand_as(inputs.x) for each in (inputs.weight, inputs.bias)]
    x, weight, bias, upstream = (each.flatten()[sets] for each in (inputs.x, *spread, inputs.upstream))
    return Inputs(x, weight, bias, upstream, inputs.eps)


# --- the true gradient, its parts and its differences -------------------------------------------------------------


def centred_and_variance(rows: Inputs) -> tuple[Tensor, Tensor]:
    """x minus its mean, (sets, m), and v = var + eps, (sets, 1)."""
    centred = rows.x - rows.x.mean(1, keepdim=True)
    return centred, centred.square().mean(1, keepdim=True) + rows.eps


def normalized(rows: Inputs) -> Tensor:
    """y by the definition (Ioffe & Szegedy 2015, algorithm 1)."""
    centred, v = centred_and_variance(rows)
    return rows.weight * (centred / v.sqrt()) + rows.bias


def three_parts(rows: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """dL/dx through xhat_i alone, through the mean and through the variance, each (sets, m); their sum is dL/dx.

    Ioffe & Szegedy 2015, section 3, the chain rule before algorithm 2: the three summands of dL/dx_i. In dL/dmean the
    term through the variance is left out: it has the factor sum(x_i - mean), which is zero.
    """
    m = rows.x.size(1)
    centred, v = centred_and_variance(rows)
    deviation, to_xhat = v.sqrt(), rows.upstream * rows.weight
    to_variance = (to_xhat * centred).sum(1, keepdim=True) * -0.5 * deviation**-3
    to_mean = -(to_xhat / deviation).sum(1, keepdim=True)
    return to_xhat / deviation, (to_mean / m).expand_as(centred), to_variance * 2 * centred / m


def central_differences(rows: Inputs) -> Tensor:
    """(L(x + h) - L(x - h)) / 2h for each x_i, (sets, m). Differences of y round little."""
    step, slopes = _step(rows), torch.empty_like(rows.x)
    for i in range(rows.x.size(1)):
        above, below = rows.x.clone(), rows.x.clone()
        above[:, i : i + 1] += step
        below[:, i : i + 1] -= step
        rise = normalized(rows._replace(x=above)) - normalized(rows._replace(x=below))
        slopes[:, i] = (rows.upstream * rise).sum(1) / (above[:, i] - below[:, i])
    return slopes


def _step(rows: Inputs) -> Tensor:
    """h, (sets, 1): truncation ~ h**2 and rounding ~ u/h balance at cbrt(u) deviations of x."""
    return ROUNDOFF ** (1 / 3) * (rows.x.var(1, correction=0, keepdim=True) + rows.eps).sqrt()


def differences_bound(rows: Inputs) -> float:
    """Error bound of central differences, as an l2 norm over all x_i: truncation and rounding.

    Truncation is h**2/6 times L's third derivative, exact: along x_i, L = (a + c t) / sqrt(v + v1 t + v2 t**2 / 2) with
    a = sum(dL/dxhat * centred), c = dL/dxhat_i less its mean, v = var + eps, v1 = 2 centred_i / m and
    v2 = 2 (m - 1) / m**2.

    Rounding: each operation has an independent error of at most u, so squared errors add up and a sum of m terms has an
    error of u sqrt(m) (Higham & Mary 2019, doi 10.1137/18M1226312).
    """
    m, step = rows.x.size(1), _step(rows)
    centred, v = centred_and_variance(rows)
    to_xhat = rows.upstream * rows.weight
    c, v1, v2 = to_xhat - to_xhat.mean(1, keepdim=True), 2 * centred / m, 2 * (m - 1) / m**2
    second = 0.75 * v**-2.5 * v1**2 - 0.5 * v**-1.5 * v2
    third = -1.875 * v**-3.5 * v1**3 + 2.25 * v**-2.5 * v1 * v2
    truncation = step**2 / 6 * ((to_xhat * centred).sum(1, keepdim=True) * third + 3 * c * second)

    xhat = centred / v.sqrt()
    of_values = rows.upstream * ((rows.weight * xhat).abs() * 2 + (rows.weight * xhat + rows.bias).abs())
    of_mean = to_xhat.sum(1, keepdim=True) / v.sqrt() * rows.x.abs().mean(1, keepdim=True) * math.sqrt(m)
    of_variance = (to_xhat * xhat).sum(1, keepdim=True) * (math.sqrt(m) / 2 + 2)
    squares = of_values.square().sum(1, keepdim=True) + of_mean**2 + of_variance**2
    rounding = (2 * squares).sqrt() * ROUNDOFF / (2 * step)  # of L above and L below; one a set, for m slopes each
    return math.hypot(float(truncation.norm()), math.sqrt(m) * float(rounding.norm()))


def arithmetic_bound(rows: Inputs, dtype: torch.dtype) -> float:
    """Error bound of a correct kernel's dL/dx from rounding in `dtype`, as an l2 norm over all x_i.

    Each part is a few operations and sums of m terms (u sqrt(m), as above); the error of the mean counts relative to
    the deviation.
    """
    roundoff, m = torch.finfo(dtype).eps / 2, rows.x.size(1)
    deviation = (rows.x.var(1, correction=0, keepdim=True) + rows.eps).sqrt()
    size = sum(part.abs() for part in three_parts(rows)) * (1 + rows.x.abs().mean(1, keepdim=True) / deviation)
    return roundoff * (math.sqrt(m) + 8) * float(torch.as_tensor(size).norm())


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
