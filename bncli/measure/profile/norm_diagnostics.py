"""Diagnostics of a model's batch norms: hooks watch them for a few training steps, and remarks say what is wrong.

Notation: N examples of a batch, C channels, m values a channel (N times the positions). What counts as far, constant or
too large is derived:
- A mean of r deviations leaves an input of unit roundoff u with a rounding of r u deviations. It is remarked on where
  that passes a tenth, and from LARGEST_RATIO on in any case, where a variance by E[x^2] - E[x]^2 in float32 has lost
  six of its seven digits.
- A channel is constant where its deviation is no more than a few roundings of its mean.
- A running mean is far where it lies a deviation or more off the last batches' mean: evaluation is then shifted by as
  much as the layer lets through. A batch's mean itself errs by its deviation over sqrt(N), so with few examples it
  takes SAMPLING of those. Before HALF_LIVES half-lives nothing is said, and what the average still holds of its start
  is subtracted, so that nothing is said of the zeros that a new model begins with.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from bncli.errors import RunFailed
from bncli.measure.reference.case import unit_roundoff
from bncli.results.profile import NormRemark

HALF_LIVES = 5  # after which a running average holds 3 % of its start
CUMULATIVE_STEPS = 20  # of a running average without a momentum
MOST_STEPS = 200
LAST = 5  # batches, whose statistics are kept
DEAD = 4.0  # times sqrt(u) of its weight's gradient: a bias whose gradient is no more than that learns nothing
LARGEST_RATIO = 1e3  # of a channel's mean to its deviation
ROUNDING_SHARE = 0.1  # of a deviation
ROUNDINGS = 4  # of its mean, that a constant channel's deviation may be
FAR, SAMPLING = 1.0, 4.0  # deviations of a channel; standard errors of a batch's mean

Layer = _ConvNd | nn.Linear


@dataclass
class WatchedNorm:
    """One batch norm in training mode, as its last batches left it."""

    name: str  # qualified
    norm: _BatchNorm
    start: tuple[Tensor, Tensor] | None = None  # running mean and variance (C) before the first step
    end: tuple[Tensor, Tensor] | None = None  # and after the last
    tracked: int = 0  # batches that they hold at the end, as far as it is known
    calls: int = 0  # in the steps watched
    values: int = 0  # m of the last batch
    examples: int = 0  # N of the last batch
    dtype: torch.dtype = torch.float32  # of the input
    means: deque[Tensor] = field(default_factory=lambda: deque(maxlen=LAST))  # (C) each, float32 or wider
    variances: deque[Tensor] = field(default_factory=lambda: deque(maxlen=LAST))  # (C) each, biased
    dead_bias: tuple[str, str, int] | None = None  # layer in front whose bias does nothing, its class, bias's values

    @property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and variance (batches, C) of the last batches."""
        return torch.stack(list(self.means)), torch.stack(list(self.variances))

    @property
    def constant(self) -> Tensor:
        """(C), whether a channel was constant in each of the last batches."""
        means, variances = self.statistics
        return (variances.sqrt() <= ROUNDINGS * unit_roundoff(self.dtype) * means.abs()).all(0)

    @property
    def half_life_steps(self) -> float | None:
        """ln 2 / -ln(1 - momentum); None for a cumulative average, and where nothing is tracked."""
        momentum = self.norm.momentum
        if momentum is None or not self.norm.track_running_stats:
            return None
        if momentum <= 0:
            return math.inf
        return 0.0 if momentum >= 1 else math.log(2) / -math.log1p(-momentum)


@dataclass(frozen=True)
class Watched:
    norms: tuple[WatchedNorm, ...]
    steps: int
    wanted: int  # steps, after which every running average that can be judged could be


def watch(
    model: nn.Module, step: Callable[[], object], enough: Callable[[], bool] = lambda: False, most: int = MOST_STEPS
) -> Watched:
    """Watch training steps until every running average has forgotten its start, for `most` steps, or until `enough()`.

    At least one step, unless it is refused because a norm has one value a channel. Native and fused batch norms alike,
    but none inside a compiled model. The model is new and in training mode. Raises what the step raises.
    """
    modules = dict(model.named_modules())
    norms = {module: WatchedNorm(name, module) for name, module in modules.items() if isinstance(module, _BatchNorm)}
    layers = {module: name for name, module in modules.items() if isinstance(module, Layer)}
    if not norms:
        return Watched((), 0, 0)
    done, wanted = 0, min(most, max(map(_steps_wanted, norms.values())))
    with _hooked(norms, layers) as biased:
        for norm, seen in norms.items():
            seen.start = _running(norm)
        while done < 1 or (done < wanted and not enough()):
            try:
                step()
            except (ValueError, RunFailed):  # which torch raises for one value a channel
                if not any(seen.values == 1 for seen in norms.values()):
                    raise
                break
            done += 1
        for norm, seen in norms.items():
            seen.end = _running(norm)
            seen.tracked = seen.calls if norm.num_batches_tracked is None else int(norm.num_batches_tracked)
            seen.dead_bias = _dead_bias(biased.get(norm), layers, seen.dtype)
    return Watched(tuple(norms.values()), done, wanted)


def _steps_wanted(seen: WatchedNorm) -> int:
    """Steps after which its running average can be compared with the batches."""
    half_life = seen.half_life_steps
    if half_life is None:
        return CUMULATIVE_STEPS if seen.norm.track_running_stats else LAST
    return max(LAST, math.ceil(HALF_LIVES * half_life)) if half_life * HALF_LIVES <= MOST_STEPS else LAST


def _running(norm: _BatchNorm) -> tuple[Tensor, Tensor] | None:
    mean, var = norm.running_mean, norm.running_var
    return None if mean is None or var is None else (mean.clone(), var.clone())


def _dead_bias(layer: Layer | None, layers: dict[Layer, str], dtype: torch.dtype) -> tuple[str, str, int] | None:
    """The layer, its class and its bias's values, if that has no gradient to speak of: nothing else used the output."""
    if layer is None or layer.bias is None or layer.bias.grad is None or layer.weight.grad is None:
        return None
    least = DEAD * math.sqrt(unit_roundoff(dtype)) * float(layer.weight.grad.norm())
    found = layers[layer], type(layer).__name__, layer.bias.numel()
    return found if float(layer.bias.grad.norm()) <= least else None


@contextlib.contextmanager
def _hooked(norms: dict[_BatchNorm, WatchedNorm], layers: dict[Layer, str]) -> Iterator[dict[nn.Module, Layer]]:
    """While inside, fill in `norms`; yields the layer with a bias right in front of a norm, as far as there is one.

    Right in front: its output is the same tensor as the norm's input, and nothing has written into it since.
    """
    biased: dict[nn.Module, Layer] = {}
    outputs: dict[int, tuple[weakref.ref[Tensor], int, Layer]] = {}

    def after_layer(layer: Layer, inputs: object, output: Tensor) -> None:
        if layer.bias is not None:
            outputs[id(output)] = (weakref.ref(output), output._version, layer)

    def before_norm(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not norm.training or not inputs:
            return
        assert isinstance(norm, _BatchNorm)
        output, version, layer = outputs.get(id(inputs[0]), (None, 0, None))
        if output is not None and layer is not None and output() is inputs[0] and version == inputs[0]._version:
            biased[norm] = layer
        _record_input(norms[norm], inputs[0].detach())

    handles = [layer.register_forward_hook(after_layer) for layer in layers]
    handles += [norm.register_forward_pre_hook(before_norm) for norm in norms]
    try:
        yield biased
    finally:
        for handle in handles:
            handle.remove()


def _record_input(seen: WatchedNorm, x: Tensor) -> None:
    """Take in an input (N, C, *S). Nothing waits for the device."""
    seen.calls += 1
    seen.examples, seen.values, seen.dtype = len(x), x.numel() // max(1, x.size(1)), x.dtype
    if seen.values < 1:
        return
    wide = x if x.dtype == torch.float64 else x.float()
    variance, mean = torch.var_mean(wide, [0, *range(2, x.dim())], correction=0)
    seen.means.append(mean)
    seen.variances.append(variance)


# --- remarks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingPlan:
    """How the model is trained, as far as its norms are concerned. None where it is unknown."""

    budget: int | None = None  # steps
    last_batch: int | None = None  # examples that an epoch leaves over
    real_data: bool = True  # random numbers say nothing about running statistics


Remark = tuple[float, NormRemark]  # the layer with the largest number is quoted


def remarks(arm: str, watched: Watched, training: TrainingPlan) -> tuple[NormRemark, ...]:
    """One remark for each kind that any layer has: of the worst layer, with how many more have it."""
    kinds: dict[str, list[Remark]] = {}
    for seen in watched.norms:
        for severity, remark in _remarks(arm, seen, training):
            named = replace(remark, layer_class=type(seen.norm).__name__)
            kinds.setdefault(remark.kind, []).append((severity, named))
    # Of layers that are equally bad, max takes the first.
    worst = [(max(alike, key=lambda each: each[0])[1], len(alike) - 1) for alike in kinds.values()]
    return tuple(replace(remark, more_layers=more) for remark, more in worst)


def _remarks(arm: str, seen: WatchedNorm, training: TrainingPlan) -> Iterator[Remark]:
    if not seen.means:
        return
    if seen.values == 1:
        yield 0.0, NormRemark(arm, "one value", seen.name)
        return
    yield from _input_remarks(arm, seen)
    yield from _momentum_remarks(arm, seen, training.budget)
    if training.real_data:
        yield from _running_mean_remarks(arm, seen)
    if seen.dead_bias is not None:
        layer, kind, parameters = seen.dead_bias
        remark = NormRemark(arm, "bias without effect", seen.name, source=layer, source_class=kind)
        yield 0.0, replace(remark, figures={"parameters": parameters})
    if training.last_batch == 1:
        raises = float(seen.values == seen.examples)
        yield raises, NormRemark(arm, "last batch of one", seen.name, figures={"raises": raises})


def _input_remarks(arm: str, seen: WatchedNorm) -> Iterator[Remark]:
    constant, (means, variances) = seen.constant, seen.statistics
    channels: dict[str, float] = {"of_channels": len(constant)}
    if constant.any():
        remark = NormRemark(arm, "constant channels", seen.name, figures={**channels, "eps": seen.norm.eps})
        yield float(constant.sum()) / len(constant), replace(remark, channels=_channels(constant))
    ratio = torch.where(constant, 0.0, (means.abs() / variances.sqrt()).nan_to_num(0.0, posinf=0.0).amin(0))
    limit = min(LARGEST_RATIO, ROUNDING_SHARE / unit_roundoff(seen.dtype))
    large, largest = ratio > limit, float(ratio.max())
    if large.any():
        figures = {**channels, "deviations": largest, "limit": limit}
        dtype = str(seen.dtype).removeprefix("torch.")
        remark = NormRemark(arm, "large mean", seen.name, figures=figures, channels=_channels(large), dtype=dtype)
        yield largest, remark


def _momentum_remarks(arm: str, seen: WatchedNorm, budget: int | None) -> Iterator[Remark]:
    if not seen.norm.track_running_stats:
        return
    momentum, half_life = seen.norm.momentum, seen.half_life_steps
    if momentum is None or half_life is None:
        yield 0.0, NormRemark(arm, "cumulative average", seen.name)
        return
    figures = {"momentum": momentum, "half_life_steps": half_life}
    if half_life < 1:
        yield -half_life, NormRemark(arm, "short half-life", seen.name, figures=figures)
    elif half_life > (math.inf if budget is None else budget) or math.isinf(half_life):
        if budget is not None:
            figures |= {"budget_steps": budget, "kept": (1 - momentum) ** budget}
        yield half_life, NormRemark(arm, "long half-life", seen.name, figures=figures)


def _running_mean_remarks(arm: str, seen: WatchedNorm) -> Iterator[Remark]:
    if seen.start is None or seen.end is None or len(seen.means) < LAST:
        return
    half_life = seen.half_life_steps
    if seen.tracked < (CUMULATIVE_STEPS if half_life is None else HALF_LIVES * half_life):
        return
    means, variances = seen.statistics
    running = seen.end[0].to(means.dtype)
    if seen.norm.momentum is not None and seen.tracked == seen.calls:  # began at its initial value
        left = (1 - seen.norm.momentum) ** seen.calls
        running = (running - left * seen.start[0]) / (1 - left)
    deviations = (running - means.mean(0)).abs() / variances.mean(0).sqrt()
    distance = torch.where(seen.constant, 0.0, deviations.nan_to_num(0.0, posinf=0.0))
    far, largest = distance > max(FAR, SAMPLING / math.sqrt(seen.examples)), float(distance.max())
    if far.any():
        figures: dict[str, float] = {"of_channels": len(far), "steps": seen.tracked, "deviations": largest}
        yield largest, NormRemark(arm, "running mean off", seen.name, figures=figures, channels=_channels(far))


def _channels(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero().flatten().tolist())
