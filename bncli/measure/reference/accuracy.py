"""Is a kernel right? Its outputs and native's own in the same dtype, both against native in float64.

An error is the largest over a tensor. It passes up to twice native's, or, where native happens to be exact, up to what
correct rounding may do: the result's own rounding in its dtype and a floor from the arithmetic in float32. Roundings
are taken for independent (Higham & Mary 2019, A new approach to probabilistic rounding error analysis): a sum of m
terms in a tree of log2(m) levels errs with a deviation of sqrt(log2 m) roundings of the root of their squares' sum.

Where the activation has a kink, an element closer to it than the rounding of z can be on either side of it: no kernel's
fault. The upstream gradient is zero there.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bncli.kernels import native
from bncli.measure.reference import case as cases
from bncli.measure.reference.case import Inputs
from bncli.results.profile import Case

DEVIATIONS = 4  # of a floor's rounding error: once in 16,000 for one number, and a tensor's largest is asked for


@dataclass(frozen=True)
class Check:
    """One claim about one case."""

    claim: str
    case: str
    passed: bool
    detail: str = ""


@dataclass(frozen=True)
class _Exact:
    """Float64 quantities of a case; those of a channel are (1, C, 1...)."""

    mean: Tensor
    rstd: Tensor
    xhat: Tensor
    z: Tensor  # before the activation


def _exact(case: Case, wide: Inputs) -> _Exact:
    dims, channels = [0, *range(2, wide.x.dim())], [1, -1, *[1] * (wide.x.dim() - 2)]
    if case.training:
        var, mean = torch.var_mean(wide.x, dims, correction=0, keepdim=True)
    else:
        assert wide.running_mean is not None
        assert wide.running_var is not None
        mean, var = wide.running_mean.view(channels), wide.running_var.view(channels)
    rstd = (var + cases.EPS).rsqrt()
    xhat = (wide.x - mean) * rstd
    z = (
        xhat
        if wide.weight is None or wide.bias is None
        else xhat * wide.weight.view(channels) + wide.bias.view(channels)
    )
    return _Exact(mean, rstd, xhat, z if wide.residual is None else z + wide.residual)


def _floors(case: Case, wide: Inputs, exact: _Exact, reference: dict[str, Tensor]) -> dict[str, float]:
    """What the roundings of float32 (float64) arithmetic may do to each output: DEVIATIONS times their deviation."""
    dims, m = [0, *range(2, wide.x.dim())], case.elements / case.shape[1]
    unit, tree, serial = DEVIATIONS * 2.0**-24, math.sqrt(1 + math.log2(m)), 1.0
    if case.dtype == "fp64":  # two of equal standing are compared, and torch's sums may run through all m terms in turn
        unit, tree, serial = 2 * DEVIATIONS * 2.0**-53, math.sqrt(m), math.sqrt(m)

    def sum_error(terms: Tensor) -> Tensor:
        total = terms.sum(dims, keepdim=True).abs()
        return unit * (tree * terms.square().sum(dims, keepdim=True).sqrt() + serial * total)

    def most(t: Tensor) -> Tensor:
        return t.abs().amax(dims, keepdim=True)

    activation = cases.OPERATIONS[case.operation][1]
    weight = 1.0 if wide.weight is None else wide.weight.abs().view(exact.mean.shape)
    mean_error = sum_error(wide.x) / m + unit * exact.mean.abs()  # the same for all of a channel
    xhat_error = exact.rstd * mean_error + unit * (1 + tree / math.sqrt(m)) * most(exact.xhat)
    z_error = (
        weight * xhat_error + unit * most(exact.z) + (0.0 if wide.residual is None else unit * most(wide.residual))
    )
    g = _through_activation(exact.z, wide.dy, activation)
    g_error = (
        z_error * most(wide.dy) / 2 if activation == "silu" else torch.zeros_like(z_error)
    )  # its |second derivative| <= 1/2
    sums_error = sum_error(g) + g_error * math.sqrt(m)
    dweight = (g * exact.xhat).sum(dims, keepdim=True).abs()
    dweight_error = sum_error(g * exact.xhat) + most(exact.xhat) * g_error * math.sqrt(m)
    dweight_error = dweight_error + exact.rstd * mean_error * g.sum(dims, keepdim=True).abs() + unit * tree * dweight
    inner = unit * most(g) + g_error
    if case.training:
        inner = inner + sums_error / m + (most(exact.xhat) * dweight_error + xhat_error * dweight) / m
    floors = {
        "y": z_error,
        "dx": weight * exact.rstd * (inner + unit * tree / math.sqrt(m) * most(g)),
        "dresidual": g_error,
        "dweight": dweight_error,
        "dbias": sums_error,
        "running_mean": cases.MOMENTUM * mean_error,
        "running_var": cases.MOMENTUM * unit * (serial + tree / math.sqrt(m)) / exact.rstd**2,
    }
    moved = {name: unit / 2 * float(t.abs().max()) for name, t in reference.items() if name.startswith("running")}
    return {name: float(floors[name].max()) + moved.get(name, 0.0) for name in reference}


def _through_activation(z: Tensor, dy: Tensor, activation: str | None) -> Tensor:
    if activation is None:
        return dy
    leaf = z.detach().requires_grad_()
    return torch.autograd.grad(native.ACTIVATIONS[activation](leaf), leaf, dy)[0]


def _result_rounding(t: Tensor, exact: Tensor) -> float:
    """Of writing the result down in its own dtype; float16's smallest step where that is larger."""
    info = torch.finfo(t.dtype)
    return max(info.eps / 2 * float(exact.abs().max()), info.smallest_normal * info.eps)


def settle_kinks(case: Case, inputs: Inputs) -> Inputs:
    """The inputs with dy = 0 where z is within the input dtype's rounding of a kink of the activation."""
    if cases.OPERATIONS[case.operation][1] not in ("relu", "leaky_relu"):
        return inputs
    wide = inputs.to(torch.float64)
    z = _exact(case, wide).z
    size = z.abs() if wide.residual is None else (z - wide.residual).abs() + wide.residual.abs()
    near = 4 * torch.finfo(cases.DTYPES[case.dtype]).eps * (size + 1e-2)
    dy = torch.where(z.abs() > near, inputs.dy, torch.zeros((), dtype=inputs.dy.dtype, device=z.device))
    return cases.with_dy(inputs, cases.laid_out(dy, case.layout))


@dataclass(frozen=True)
class Worst:
    """The output with the largest error in units of its bound."""

    output: str
    error: float
    native_error: float
    bound: float

    def __str__(self) -> str:
        return f"{self.output}: error {self.error:.2e}, native's {self.native_error:.2e}, bound {self.bound:.2e}"


@dataclass(frozen=True)
class Standard:
    """What a kernel is held to on one case: the float64 outputs, native's errors, and the bounds that follow."""

    inputs: Inputs
    reference: dict[str, Tensor]
    native_errors: dict[str, float]
    bounds: dict[str, float]

    def beside(self, native: dict[str, Tensor]) -> Standard:
        """The same where native may also err as in these outputs of another run."""
        others = {name: _error(native[name], exact) for name, exact in self.reference.items()}
        errors = {name: max(error, others[name]) for name, error in self.native_errors.items()}
        bounds = {name: max(bound, 2 * errors[name]) for name, bound in self.bounds.items()}
        return replace(self, native_errors=errors, bounds=bounds)

    def worst(self, found: dict[str, Tensor]) -> Worst:
        assert found.keys() == self.reference.keys(), f"{sorted(found)} are not {sorted(self.reference)}"
        worst = None
        for name, t in found.items():
            error = _error(t, self.reference[name])
            one = Worst(name, error, self.native_errors[name], self.bounds[name])
            if worst is None or not one.error / one.bound <= worst.error / worst.bound:  # NaN is worst of all
                worst = one
            if math.isnan(error):
                return one
        assert worst is not None
        return worst


def _error(t: Tensor, exact: Tensor) -> float:
    if t.shape != exact.shape:
        return math.nan
    return float((t.double() - exact).abs().max())


def standard(case: Case, device: torch.device, seed: int = 0) -> Standard:
    return standard_of(case, settle_kinks(case, cases.make(case, device, seed)))


def standard_of(case: Case, inputs: Inputs) -> Standard:
    wide = inputs.to(torch.float64)
    forward = cases.apply(case, "native")
    reference = cases.outputs(forward, wide)
    own = cases.outputs(forward, inputs)
    errors = {name: _error(t, reference[name]) for name, t in own.items()}
    floors = _floors(case, wide, _exact(case, wide), reference)
    bounds = {
        name: max(2 * errors[name], floors[name] + _result_rounding(own[name], reference[name])) for name in reference
    }
    return Standard(inputs, reference, errors, bounds)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Every tensor made without a value is NaN inside (torch.utils.deterministic.fill_uninitialized_memory)."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")  # use_deterministic_algorithms would import the compiler for it: 1 s
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


def accuracy(case: Case, kernel: str, device_name: str, seed: int = 0) -> list[Check]:
    """Within its bounds, the same bits again, of the right dtypes and strides, nothing written into an input."""
    device = torch.device(device_name)
    held_to = standard(case, device, seed)
    forward = cases.apply(case, kernel)
    before = [t.clone() for t in vars(held_to.inputs).values() if t is not None]
    with poisoned():
        first = cases.outputs(forward, held_to.inputs)
    second = cases.outputs(forward, held_to.inputs)
    return [
        within(held_to, first, "accuracy", case),
        same_bits(first, second, "repeatable", case),
        _inputs_untouched(before, held_to.inputs, case),
        _drop_in(case, first, held_to.inputs),
    ]


def within(held_to: Standard, found: dict[str, Tensor], claim: str, case: Case) -> Check:
    worst = held_to.worst(found)
    return Check(claim, str(case), worst.error <= worst.bound, str(worst))


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor], claim: str, case: Case) -> Check:
    different = [name for name in one if not torch.equal(one[name], other[name])]
    return Check(claim, str(case), not different, f"other bits in {', '.join(different)}" if different else "")


def _inputs_untouched(before: list[Tensor], inputs: Inputs, case: Case) -> Check:
    after = [t for t in vars(inputs).values() if t is not None]
    written = [k for k, (a, b) in enumerate(zip(before, after, strict=True)) if not torch.equal(a, b)]
    return Check("inputs untouched", str(case), not written, f"inputs {written} were written into" if written else "")


def _drop_in(case: Case, found: dict[str, Tensor], inputs: Inputs) -> Check:
    """Dtypes as native's, and a y that keeps a dense input's strides, on which the next convolution's speed rests."""
    own = cases.outputs(cases.apply(case, "native"), inputs)
    pairs = [(name, found[name], t) for name, t in own.items()]
    wrong = [f"{name} is {t.dtype}, native's {other.dtype}" for name, t, other in pairs if t.dtype != other.dtype]
    if case.layout != "strided" and _strides(found["y"]) not in (_strides(own["y"]), _strides(inputs.x)):
        wrong.append(f"y has strides {found['y'].stride()}, native's {own['y'].stride()}")
    return Check("dtypes and strides", str(case), not wrong, "; ".join(wrong))


def _strides(t: Tensor) -> list[int]:
    """Those that mean something: of dimensions with more than one element."""
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]
