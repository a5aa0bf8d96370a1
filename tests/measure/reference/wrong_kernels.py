"""Batch norms, each wrong in exactly one way, and correct ones of the user's own: what gradcheck must tell apart.

Those with F.batch_norm's parameters cannot fuse; those with the seam's can. `BUGS` gives the words of the diagnosis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "leaky_relu": F.leaky_relu, "silu": F.silu}


def over(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def column(values: Tensor, x: Tensor) -> Tensor:
    """(C) -> (1, C, 1, ...)"""
    return values.reshape(1, -1, *[1] * (x.dim() - 2))


def work(x: Tensor) -> Tensor:
    """In float32 or wider."""
    return x if x.dtype == torch.float64 else x.float()


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.mean(over(x))
    return mean, (x - column(mean, x)).square().mean(over(x))


def check(x: Tensor) -> int:
    """m, refused where it is 1."""
    m = x.numel() // x.size(1)
    if m == 1:
        raise ValueError("more than one value per channel, please")
    return m


def normalized(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    y = (work(x) - column(work(mean), x)) * column((work(var) + eps).rsqrt(), x)
    y = y if weight is None else y * column(work(weight), x)
    return y if bias is None else y + column(work(bias), x)


@torch.no_grad()
def move(running: Tensor | None, batch: Tensor, momentum: float) -> None:
    if running is not None:
        running.lerp_(batch.to(running), momentum)


def finish(y: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    y = y if residual is None else y + residual
    return y if activation is None else ACTIVATIONS[activation](y)


# --- correct ----------------------------------------------------------------------------------------------------------


def right(input, running_mean, running_var, weight, bias, training, momentum, eps):  # type: ignore[no-untyped-def]
    """Composed of torch's operations, with F.batch_norm's parameters."""
    return changed()(input, running_mean, running_var, weight, bias, training, momentum, eps)


def right_by_the_seam(x, weight, bias, eps, residual=None, activation=None, statistics=None):  # type: ignore[no-untyped-def]
    wide = work(x)
    mean, var = statistics or batch_statistics(wide)
    y = normalized(wide, mean, var, weight, bias, eps)
    y = finish(y, None if residual is None else work(residual), activation)
    return y.to(x.dtype), mean.detach(), var.detach()


def right_without_evaluation(x, weight, bias, eps, residual, activation):  # type: ignore[no-untyped-def]
    return right_by_the_seam(x, weight, bias, eps, residual, activation)


# --- right, and rounded otherwise -------------------------------------------------------------------------------------


def rows(x: Tensor) -> Tensor:
    """(N, C, *S) -> (C, m)"""
    return x.transpose(0, 1).reshape(x.size(1), -1)


def in_order(x: Tensor) -> Tensor:
    """The sum of each channel, term after term."""
    total = x.new_zeros(x.size(1))
    for term in rows(x).unbind(1):
        total = total + term
    return total


class SumInOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.shape = x.shape
        return in_order(x)

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        return column(g, torch.empty(ctx.shape)).expand(ctx.shape)


class Spread(torch.autograd.Function):
    """(C) over (N, C, *S); its gradient is summed in order."""

    @staticmethod
    def forward(ctx, values, like):  # type: ignore[no-untyped-def]
        return column(values, like).expand(like.shape).clone()

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        return SumInOrder.apply(g), None


def normalized_in_order(x, mean, var, weight, bias, eps):  # type: ignore[no-untyped-def]
    y = (x - Spread.apply(work(mean), x)) * Spread.apply((work(var) + eps).rsqrt(), x)
    y = y if weight is None else y * Spread.apply(work(weight), x)
    return y if bias is None else y + Spread.apply(work(bias), x)


def statistics_in_order(x: Tensor) -> tuple[Tensor, Tensor]:
    m = x.numel() // x.size(1)
    mean = SumInOrder.apply(x) / m
    return mean, SumInOrder.apply((x - Spread.apply(mean, x)).square()) / m


def folded(x, mean, var, weight, bias, eps):  # type: ignore[no-untyped-def]
    """y = s x + t"""
    s = (work(var) + eps).rsqrt() * (1 if weight is None else work(weight))
    t = (0 if bias is None else work(bias)) - work(mean) * s
    return x * column(s, x) + column(t, x)


def rsqrt_off(x, mean, var, weight, bias, eps):  # type: ignore[no-untyped-def]
    """By two units in the last place."""
    off = 1 + 2 * torch.finfo(work(x).dtype).eps
    y = (x - column(work(mean), x)) * column((work(var) + eps).rsqrt() * off, x)
    y = y if weight is None else y * column(work(weight), x)
    return y if bias is None else y + column(work(bias), x)


def with_values(of: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The gradient of the two-pass statistics, the values of others."""

    def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
        found = zip(batch_statistics(x), of(x.detach()), strict=True)
        mean, var = (value.detach() + (smooth - smooth.detach()) for smooth, value in found)
        return mean, var

    return statistics


def welford(x: Tensor) -> tuple[Tensor, Tensor]:
    mean, squares = torch.zeros_like(rows(x)[:, 0]), torch.zeros_like(rows(x)[:, 0])
    for count, value in enumerate(rows(x).unbind(1), 1):
        step = value - mean
        mean = mean + step / count
        squares = squares + step * (value - mean)
    return mean, squares / count


def merged_by_32(x: Tensor) -> tuple[Tensor, Tensor]:
    """Chan, Golub & LeVeque 1983: blocks of 32 values, merged one after the other."""
    mean, squares, count = torch.zeros_like(rows(x)[:, 0]), torch.zeros_like(rows(x)[:, 0]), 0
    for block in rows(x).split(32, 1):
        k, own = block.size(1), block.mean(1)
        step = own - mean
        squares = squares + (block - own[:, None]).square().sum(1) + step.square() * (count * k / (count + k))
        mean, count = mean + step * (k / (count + k)), count + k
    return mean, squares / count


# --- wrong by a change of one step ------------------------------------------------------------------------------------


def changed(
    mean_of: Callable[[Tensor], Tensor] = lambda mean: mean,
    var_of: Callable[[Tensor, int], Tensor] = lambda var, m: var,
    running_var_of: Callable[[Tensor, int], Tensor] = lambda var, m: var * m / (m - 1),
    momentum_of: Callable[[float], float] = lambda momentum: momentum,
    statistics: Callable[..., tuple[Tensor, Tensor]] = batch_statistics,
    norm: Callable[..., Tensor] = normalized,
    output: Callable[[Tensor], Tensor] = lambda y: y,
) -> Callable[..., Tensor]:
    """`right` with one step changed."""

    def kernel(input, running_mean, running_var, weight, bias, training, momentum, eps):  # type: ignore[no-untyped-def]
        wide = work(input)  # once, so that dx is rounded once
        if not training:
            return output(norm(wide, running_mean, running_var, weight, bias, eps).to(input.dtype))
        m = check(input)
        if m == 0:
            return F.batch_norm(input, running_mean, running_var, weight, bias, True, momentum, eps)
        mean, var = statistics(wide) if statistics is not in_half else in_half(wide, input.dtype)
        move(running_mean, mean, momentum_of(momentum))
        move(running_var, running_var_of(var, m), momentum_of(momentum))
        return output(norm(wide, mean_of(mean), var_of(var, m), weight, bias, eps).to(input.dtype))

    return kernel


def one_pass(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.mean(over(x))
    return mean, (x.square().mean(over(x)) - mean.square()).clamp_min(0)


def in_half(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Statistics kept in the input's own dtype."""
    mean, var = batch_statistics(x)
    return work(mean.to(dtype)), work(var.to(dtype))


def eps_outside(x, mean, var, weight, bias, eps):  # type: ignore[no-untyped-def]
    return normalized(x, mean, (torch.where(var > 0, var, 1e-30).sqrt() + eps).square(), weight, bias, 0.0)


def constant(values: Tensor, *_: Any) -> Tensor:
    return values.detach()


def batch_in_evaluation(input, running_mean, running_var, weight, bias, training, momentum, eps):  # type: ignore[no-untyped-def]
    if training or input.numel() <= input.size(1):
        return right(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return right(input, None, None, weight, bias, True, momentum, eps)


def running_in_training(input, running_mean, running_var, weight, bias, training, momentum, eps):  # type: ignore[no-untyped-def]
    if not training or running_mean is None or input.numel() == 0:
        return right(input, running_mean, running_var, weight, bias, training, momentum, eps)
    before = running_mean.clone(), running_var.clone()
    right(input.detach(), running_mean, running_var, None, None, True, momentum, eps)
    return normalized(work(input), *before, weight, bias, eps).to(input.dtype)


def one_value_taken(input, running_mean, running_var, weight, bias, training, momentum, eps):  # type: ignore[no-untyped-def]
    if training and input.numel() == input.size(1):
        return torch.zeros_like(input)
    return right(input, running_mean, running_var, weight, bias, training, momentum, eps)


def updated_twice(input, running_mean, running_var, weight, bias, training, momentum, eps):  # type: ignore[no-untyped-def]
    y = right(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if training and input.numel() > 0:
        right(input.detach(), running_mean, running_var, None, None, True, momentum, eps)
    return y


def momentum_ignored(input, running_mean, running_var, weight, bias, training, momentum, eps):  # type: ignore[no-untyped-def]
    """For the running mean alone."""
    spare = None if running_mean is None else running_mean.clone()
    y = right(input, spare if training else running_mean, running_var, weight, bias, training, momentum, eps)
    if training and input.numel() > 0:
        move(running_mean, work(input).mean(over(input)), 0.1)
    return y


def moved_in_evaluation(input, running_mean, running_var, weight, bias, training, momentum, eps):  # type: ignore[no-untyped-def]
    y = right(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if not training:
        running_mean += 1e-3
    return y


def writes_what_it_saved(input, running_mean, running_var, weight, bias, training, momentum, eps):  # type: ignore[no-untyped-def]
    y = right(input, running_mean, running_var, weight, bias, training, momentum, eps)
    scale = torch.ones_like(y)
    y = y * scale
    scale.add_(1)
    return y


def instance_norm(input, running_mean, running_var, weight, bias, training, momentum, eps):  # type: ignore[no-untyped-def]
    y = right(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if not training or input.numel() == 0 or input.dim() < 3:
        return y
    return F.instance_norm(input, None, None, weight, bias, True, 0.1, eps)


def writes_into_its_input(input, running_mean, running_var, weight, bias, training, momentum, eps):  # type: ignore[no-untyped-def]
    y = right(input.clone(), running_mean, running_var, weight, bias, training, momentum, eps)
    input.data.mul_(0.5)
    return y


def noisy(y: Tensor) -> Tensor:
    """The last bit of the output is not the same from run to run."""
    with torch.no_grad():
        step = torch.finfo(y.dtype).eps * torch.randint(0, 2, y.shape, device=y.device).to(y.dtype)
    return y * (1 + step)


def layout_mistaken(input, running_mean, running_var, weight, bias, training, momentum, eps):  # type: ignore[no-untyped-def]
    """The memory of a channels_last tensor is read as if it were contiguous."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    form = formats.get(input.dim())
    if form is None or input.is_contiguous() or not input.is_contiguous(memory_format=form):
        return right(input, running_mean, running_var, weight, bias, training, momentum, eps)
    last = [0, *range(2, input.dim()), 1]
    back = [0, input.dim() - 1, *range(1, input.dim() - 1)]
    seen = input.permute(last).reshape(input.shape)
    y = right(seen, running_mean, running_var, weight, bias, training, momentum, eps)
    return y.reshape([input.shape[i] for i in last]).permute(back)


# --- wrong in the backward pass ---------------------------------------------------------------------------------------


def backward_with(change: Callable[..., tuple[Tensor | None, ...]], again: bool = True) -> Callable[..., Tensor]:
    """`right`, whose gradients (dx, dweight, dbias) of x, weight, bias and dy are passed through `change`."""

    class Changed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias, mean, var, training, eps):  # type: ignore[no-untyped-def]
            ctx.save_for_backward(x, weight, bias, mean, var)
            ctx.how = training, eps
            return right(x, mean, var, weight, bias, training, 0.0, eps)

        @staticmethod
        def backward(ctx, dy):  # type: ignore[no-untyped-def]
            x, weight, bias, mean, var = ctx.saved_tensors
            training, eps = ctx.how
            with torch.enable_grad():
                leaves = [t if t is None or t.requires_grad else t.detach().requires_grad_() for t in (x, weight, bias)]
                y = right(leaves[0], mean, var, leaves[1], leaves[2], training, 0.0, eps)
                wanted = [t for t in leaves if t is not None]
                found = iter(torch.autograd.grad(y, wanted, dy, create_graph=torch.is_grad_enabled()))
                gradients = [None if t is None else next(found) for t in leaves]
            mode = (training,) if change is centred_in_evaluation else ()
            return (*change(dy, x, *gradients, *mode), None, None, None, None)

    if not again:
        Changed.backward = staticmethod(once_differentiable(Changed.backward))  # type: ignore[method-assign]

    def kernel(input, running_mean, running_var, weight, bias, training, momentum, eps):  # type: ignore[no-untyped-def]
        if input.numel() == 0:
            return right(input, running_mean, running_var, weight, bias, training, momentum, eps)
        mean, var = (None, None) if training else (running_mean, running_var)
        y = Changed.apply(input, weight, bias, mean, var, training, eps)
        if training:
            right(input.detach(), running_mean, running_var, None, None, True, momentum, eps)
        return y

    return kernel


def swapped(dy, x, dx, dweight, dbias):  # type: ignore[no-untyped-def]
    return (dx, dbias, dweight) if dweight is not None and dbias is not None else (dx, dweight, dbias)


def averaged(dy, x, dx, dweight, dbias):  # type: ignore[no-untyped-def]
    m = x.numel() // x.size(1)
    return dx, None if dweight is None else dweight / m, None if dbias is None else dbias / m


def one_position(dy, x, dx, dweight, dbias):  # type: ignore[no-untyped-def]
    positions = x.numel() // x.size(1) // x.size(0)
    return dx, dweight, None if dbias is None else dbias / positions


def centred_in_evaluation(dy, x, dx, dweight, dbias, training):  # type: ignore[no-untyped-def]
    return (dx if training else dx - dx.mean(over(dx), keepdim=True)), dweight, dbias


def off_where(condition: Callable[[Tensor], bool]) -> Callable[..., tuple[Tensor | None, ...]]:
    """dx half as large again where the condition holds for x."""

    def change(dy, x, dx, dweight, dbias):  # type: ignore[no-untyped-def]
        return (dx * 1.5 if condition(x) else dx), dweight, dbias

    return change


def many_values(x: Tensor) -> bool:
    return x.numel() // x.size(1) > 4096


def in_channels_last(x: Tensor) -> bool:
    return x.dim() > 3 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def without_graph(dy, x, dx, dweight, dbias):  # type: ignore[no-untyped-def]
    """A second derivative that is silently zero."""
    return tuple(None if t is None else t.detach() + 0 * dy.sum() for t in (dx, dweight, dbias))


def unchanged(dy, x, dx, dweight, dbias):  # type: ignore[no-untyped-def]
    return dx, dweight, dbias


def upstream_taken_for_contiguous(input, running_mean, running_var, weight, bias, training, momentum, eps):  # type: ignore[no-untyped-def]
    y = right(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return ReadAsContiguous.apply(y)


class ReadAsContiguous(torch.autograd.Function):
    """The gradient's memory is read in order, whatever its strides; zeros past its end."""

    @staticmethod
    def forward(ctx, y):  # type: ignore[no-untyped-def]
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        order = sorted(range(dy.dim()), key=lambda d: -dy.stride(d))
        memory = dy.permute(order).reshape(-1)
        if 0 in dy.stride():
            memory = torch.zeros_like(memory)
        return memory.reshape(dy.shape)


# --- wrong in what is fused -------------------------------------------------------------------------------------------


def residual_without_gradient(x, weight, bias, eps, residual=None, activation=None, statistics=None):  # type: ignore[no-untyped-def]
    residual = None if residual is None else residual.detach()
    return right_by_the_seam(x, weight, bias, eps, residual, activation, statistics)


def activation_without_gradient(x, weight, bias, eps, residual=None, activation=None, statistics=None):  # type: ignore[no-untyped-def]
    y, mean, var = right_by_the_seam(work(x), weight, bias, eps, residual, None, statistics)
    return (y + (finish(y, None, activation) - y).detach()).to(x.dtype), mean, var


def residual_after_the_activation(x, weight, bias, eps, residual=None, activation=None, statistics=None):  # type: ignore[no-untyped-def]
    y, mean, var = right_by_the_seam(work(x), weight, bias, eps, None, activation, statistics)
    return (y if residual is None else y + work(residual)).to(x.dtype), mean, var


def relu_writes(x, weight, bias, eps, residual=None, activation=None, statistics=None):  # type: ignore[no-untyped-def]
    found = right_by_the_seam(x.clone(), weight, bias, eps, residual, activation, statistics)
    if activation == "relu" and residual is None:
        x.data.clamp_(min=-1)
    return found


def relu_swallows_nan(x, weight, bias, eps, residual=None, activation=None, statistics=None):  # type: ignore[no-untyped-def]
    if activation != "relu":
        return right_by_the_seam(x, weight, bias, eps, residual, activation, statistics)
    y, mean, var = right_by_the_seam(x, weight, bias, eps, residual, None, statistics)
    return torch.where(y > 0, y, 0), mean, var


def at_nan(name: str, value: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The activation of that name is `value` where its input is NaN: NaN, with another derivative than torch's."""

    def kernel(x, weight, bias, eps, residual=None, activation=None, statistics=None):  # type: ignore[no-untyped-def]
        if activation != name:
            return right_by_the_seam(x, weight, bias, eps, residual, activation, statistics)
        wide = None if residual is None else work(residual)
        z, mean, var = right_by_the_seam(work(x), weight, bias, eps, wide, None, statistics)
        return torch.where(z.isnan(), value(z), finish(z, None, name)).to(x.dtype), mean, var

    return kernel


# --- wrong in what comes back -----------------------------------------------------------------------------------------


def raises(input, running_mean, running_var, weight, bias, training, momentum, eps):  # type: ignore[no-untyped-def]
    raise KeyError("no such thing")


def returns_a_list(input, running_mean, running_var, weight, bias, training, momentum, eps):  # type: ignore[no-untyped-def]
    return [input]


def returns_y_alone(x, weight, bias, eps, residual, activation):  # type: ignore[no-untyped-def]
    return right_by_the_seam(x, weight, bias, eps, residual, activation)[0]


def one_channel_short(input, running_mean, running_var, weight, bias, training, momentum, eps):  # type: ignore[no-untyped-def]
    return right(input, running_mean, running_var, weight, bias, training, momentum, eps)[:, 1:]


def always_float32(y: Tensor) -> Tensor:
    return y.float() if y.dtype != torch.float64 else y


def other_signature(x, gamma, beta):  # type: ignore[no-untyped-def]
    return x * gamma + beta


def full_precision_only(input, running_mean, running_var, weight, bias, training, momentum, eps):  # type: ignore[no-untyped-def]
    if input.dtype in (torch.float16, torch.bfloat16):
        raise TypeError("half precision is not supported")
    return right(input, running_mean, running_var, weight, bias, training, momentum, eps)


def training_alone(input, running_mean, running_var, weight, bias, training, momentum, eps):  # type: ignore[no-untyped-def]
    if not training:
        raise NotImplementedError("fold the statistics into the weights")
    return right(input, running_mean, running_var, weight, bias, training, momentum, eps)


def no_silu(x, weight, bias, eps, residual=None, activation=None, statistics=None):  # type: ignore[no-untyped-def]
    if activation == "silu":
        raise NotImplementedError("no silu")
    return right_by_the_seam(x, weight, bias, eps, residual, activation, statistics)


statistics_constant = changed(mean_of=constant, var_of=constant)
mean_constant = changed(mean_of=constant)
variance_constant = changed(var_of=constant)
biased_running_variance = changed(running_var_of=lambda var, m: var)
unbiased_normalization = changed(var_of=lambda var, m: var * m / (m - 1))
momentum_swapped = changed(momentum_of=lambda momentum: 1 - momentum)
running_never_updated = changed(momentum_of=lambda momentum: 0.0)
eps_outside_the_root = changed(norm=eps_outside)
one_pass_variance = changed(statistics=one_pass)
relu_flat_at_nan = at_nan("relu", lambda z: z.detach())
leaky_relu_whole_at_nan = at_nan("leaky_relu", lambda z: z)
half_precision_statistics = changed(statistics=in_half)
not_deterministic = changed(output=noisy)
wrong_dtype = changed(output=always_float32)
dweight_dbias_swapped = backward_with(swapped)
dweight_dbias_averaged = backward_with(averaged)
dbias_of_one_position = backward_with(one_position)
second_derivative_zero = backward_with(without_graph)
second_derivative_refused = backward_with(unchanged, again=False)

updated_by_the_deviation = changed(running_var_of=lambda var, m: (var * m / (m - 1)).sqrt())
mean_taken_off_in_evaluation = backward_with(centred_in_evaluation)
many_channels = backward_with(off_where(lambda x: x.size(1) > 8))
many_values_a_channel = backward_with(off_where(many_values))
wrong_in_channels_last = backward_with(off_where(in_channels_last))
folded_scale_and_shift = changed(norm=folded)
rsqrt_two_places_off = changed(norm=rsqrt_off)
gradients_summed_in_order = changed(norm=normalized_in_order)
summed_in_order = changed(statistics=statistics_in_order, norm=normalized_in_order)
updated_in_order = changed(statistics=with_values(welford))
merged_in_order = changed(statistics=with_values(merged_by_32))

RIGHT = ("right", "right_by_the_seam", "right_without_evaluation")
RIGHT_BUT_ROUNDED_OTHERWISE = (
    "folded_scale_and_shift",
    "rsqrt_two_places_off",
    "gradients_summed_in_order",
)
LESS_ACCURATE = ("summed_in_order", "updated_in_order", "merged_in_order")
# Bugs that have no name: what the facts have to say of them.
UNKNOWN = {
    "many_channels": ("what fails: dx, double backward", "2x67x5x3"),
    "many_values_a_channel": ("what fails: dx, double backward", "only shape 1x2x71x71"),
    "wrong_in_channels_last": ("only layout channels_last", "clean: forward, running_mean, running_var"),
}


def exits(input, running_mean, running_var, weight, bias, training, momentum, eps):  # type: ignore[no-untyped-def]
    raise SystemExit(0)


def wrong_without_gradients(input, running_mean, running_var, weight, bias, training, momentum, eps):  # type: ignore[no-untyped-def]
    y = right(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return y if torch.is_grad_enabled() else 1.5 * y


def drops_gradients_of_a_frozen_input(input, running_mean, running_var, weight, bias, training, momentum, eps):  # type: ignore[no-untyped-def]
    if not input.requires_grad and weight is not None:
        weight = weight.detach()
    return right(input, running_mean, running_var, weight, bias, training, momentum, eps)


BUGS = {
    "statistics_constant": "statistics treated as constants",
    "mean_constant": "gradient through the mean is missing",
    "variance_constant": "gradient through the variance is missing",
    "biased_running_variance": "biased running variance",
    "unbiased_normalization": "unbiased normalization",
    "momentum_swapped": "momentum swapped",
    "running_never_updated": "running statistics not updated",
    "eps_outside_the_root": "eps added outside the square root",
    "one_pass_variance": "one-pass variance",
    "half_precision_statistics": "half-precision statistics",
    "batch_in_evaluation": "evaluation uses batch statistics",
    "running_in_training": "training uses the running statistics",
    "second_derivative_zero": "no second derivative",
    "second_derivative_refused": "no second derivative",
    "writes_into_its_input": "an input is modified",
    "not_deterministic": "not deterministic",
    "dweight_dbias_swapped": "dweight and dbias swapped",
    "dweight_dbias_averaged": "dweight and dbias averaged instead of summed",
    "dbias_of_one_position": "dbias averaged instead of summed",
    "residual_without_gradient": "the gradient of the residual is missing",
    "activation_without_gradient": "the activation's gradient is ignored",
    "layout_mistaken": "channels_last memory read as contiguous",
    "upstream_taken_for_contiguous": "upstream gradient read as contiguous",
    "relu_swallows_nan": "NaN disappears",
    "relu_flat_at_nan": "the activation's derivative at NaN is not torch's",
    "leaky_relu_whole_at_nan": "the activation's derivative at NaN is not torch's",
    "updated_twice": "running statistics updated twice",
    "momentum_ignored": "momentum ignored for the running mean",
    "updated_by_the_deviation": "standard deviation stored as the running variance",
    "mean_taken_off_in_evaluation": "evaluation differentiates through the batch mean",
    "instance_norm": "each example normalized separately, as in instance norm",
    "residual_after_the_activation": "the residual is added after the activation",
    "writes_what_it_saved": "a tensor saved for the backward pass is modified",
    "relu_writes": "an input is modified",
    "one_value_taken": "one value per channel accepted",
    "raises": "the kernel raises an exception",
    "returns_a_list": "the output has a wrong type, shape, dtype or device",
    "returns_y_alone": "the output has a wrong type, shape, dtype or device",
    "one_channel_short": "the output has a wrong type, shape, dtype or device",
    "wrong_dtype": "the output has a wrong type, shape, dtype or device",
}
