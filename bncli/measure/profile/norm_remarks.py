"""What a model's batch norms suffer from, in words, from what `norm_health.watch` saw.

What counts as far, constant or too large is derived:
- A mean of r deviations leaves an input of unit roundoff u with a rounding of r u deviations. It is reported where that
  passes a tenth, and from LARGEST_RATIO on in any case, where a variance by E[x^2] - E[x]^2 in float32 has lost six of
  its seven digits.
- A channel is constant where its deviation is no more than a few roundings of its own mean.
- A running mean is far where it lies a deviation or more off the last batches' mean: evaluation is then shifted by as
  much as the layer lets through. A batch's mean itself errs by its deviation over sqrt(N), so with few examples it
  takes SAMPLING of those. Before HALF_LIVES half-lives nothing is said, and what the average still holds of its start
  is taken off, so that a fresh model is not blamed for its zeros.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bncli.measure.profile.norm_diagnostics import CUMULATIVE_STEPS, HALF_LIVES, LAST, Seen, Watched, unit_roundoff
from bncli.results.profile import NormRemark

LARGEST_RATIO = 1e3  # of a channel's mean to its deviation
ROUNDING_SHARE = 0.1  # of a deviation
ROUNDINGS = 4  # of its mean, that a constant channel's deviation may be
FAR, SAMPLING = 1.0, 4.0  # deviations of a channel; standard errors of a batch's mean
NAMED = 4  # channels of a list, whose others are counted


@dataclass(frozen=True)
class Training:
    """How the model is trained, as far as its norms care. None where it is unknown."""

    budget: int | None = None  # steps
    last_batch: int | None = None  # examples that an epoch leaves over
    real_data: bool = True  # random numbers say nothing about running statistics


@dataclass(frozen=True)
class Finding:
    layer: str
    kind: str  # findings of one kind are one remark
    severity: float  # the one with most of it is quoted
    text: str
    advice: str


def remarks(arm: str, watched: Watched, training: Training) -> tuple[NormRemark, ...]:
    """One remark a kind of finding: the worst layer, and how many more have it."""
    kinds: dict[str, list[Finding]] = {}
    for seen in watched.norms:
        for finding in _findings(seen, training):
            kinds.setdefault(finding.kind, []).append(finding)
    found = []
    for alike in kinds.values():
        worst = max(alike, key=lambda finding: finding.severity)  # the first of several
        more = f" and {len(alike) - 1} more" if len(alike) > 1 else ""
        found.append(NormRemark(arm, (worst.layer or "(the model)") + more, worst.text, worst.advice))
    return tuple(found)


def _findings(seen: Seen, training: Training) -> Iterator[Finding]:
    if not seen.means:
        return
    if seen.values == 1:
        yield Finding(
            seen.name, "one value", 0, "one value a channel: a batch of 1, and no positions",
            "nothing is left of the input, and torch raises in training: use batches of 2 or more, or a norm that "
            "averages over channels",
        )  # fmt: skip
        return
    yield from _of_the_input(seen)
    yield from _of_the_momentum(seen, training.budget)
    if training.real_data:
        yield from _of_the_running_mean(seen)
    if seen.dead_bias is not None:
        layer, values = seen.dead_bias
        yield Finding(
            seen.name, "bias", 0, f"the bias of {layer} right in front is subtracted again ({values} dead parameters)",
            f"give {layer} bias=False: the norm's own bias does its work",
        )  # fmt: skip
    if training.last_batch == 1:
        yield _last_batch_of_one(seen)


def _of_the_input(seen: Seen) -> Iterator[Finding]:
    means, deviations = torch.stack(list(seen.means)), torch.stack(list(seen.variances)).sqrt()  # (batches, C) each
    constant = _constant(seen)
    count = means.size(1)
    if constant.any():
        factor = 1 / math.sqrt(seen.norm.eps)
        yield Finding(
            seen.name, "constant", float(constant.sum()) / count,
            f"{int(constant.sum())} of {count} channels are constant in a batch: {_listed(constant)}",
            f"their output is the norm's bias, and gradients pass times 1/sqrt(eps) = {factor:,.0f}: leave these "
            "inputs away, or look for a dead activation in front",
        )  # fmt: skip
    ratio = torch.where(constant, 0.0, (means.abs() / deviations).nan_to_num(0.0, posinf=0.0).amin(0))
    limit = min(LARGEST_RATIO, ROUNDING_SHARE / unit_roundoff(seen.dtype))
    large = ratio > limit
    if large.any():
        name = str(seen.dtype).removeprefix("torch.")
        yield Finding(
            seen.name, "mean", float(ratio.max()),
            f"a mean of {float(ratio.max()):,.0f} deviations in {int(large.sum())} of {count} channels: "
            f"{_listed(large)}",
            f"beyond {limit:,.0f} in {name} digits of the variance are lost: take the mean off earlier, in the data or "
            "in the layer before",
        )  # fmt: skip


def _constant(seen: Seen) -> Tensor:
    """(C), whether a channel was constant in each of the last batches."""
    rounding = ROUNDINGS * unit_roundoff(seen.dtype)
    pairs = zip(seen.means, seen.variances, strict=True)
    return torch.stack([variance.sqrt() <= rounding * mean.abs() for mean, variance in pairs]).all(0)


def _of_the_momentum(seen: Seen, budget: int | None) -> Iterator[Finding]:
    if not seen.norm.track_running_stats:
        return
    momentum, half_life = seen.norm.momentum, seen.half_life_steps
    if momentum is None or half_life is None:
        yield Finding(
            seen.name, "cumulative", 0, "momentum None: the running statistics are the cumulative average of all steps",
            "the first batches count as much as the last: give a momentum, or reset the statistics before evaluation "
            "and run some batches",
        )  # fmt: skip
    elif half_life < 1:
        meant = f"{1 - momentum:.3g}" if momentum < 1 else "0.1"
        yield Finding(
            seen.name, "short half-life", -half_life,
            f"momentum {momentum:g}: the running average's half-life is {half_life:.2g} steps",
            "evaluation uses hardly more than the last batch; momentum is the weight of the new batch, and "
            f"{meant} may be what was meant",
        )  # fmt: skip
    elif half_life > (math.inf if budget is None else budget) or math.isinf(half_life):
        against = "" if budget is None else f", and training has {budget:,}"
        kept = 1.0 if budget is None else (1 - momentum) ** budget
        yield Finding(
            seen.name, "long half-life", half_life,
            f"momentum {momentum:g}: the running average's half-life is {half_life:,.0f} steps{against}",
            f"at the end {kept:.0%} of it is still its initial 0 and 1: raise the momentum, or re-estimate it over "
            "some batches before evaluation",
        )  # fmt: skip


def _of_the_running_mean(seen: Seen) -> Iterator[Finding]:
    if seen.start is None or seen.end is None or len(seen.means) < LAST:
        return
    half_life = seen.half_life_steps
    if seen.tracked < (CUMULATIVE_STEPS if half_life is None else HALF_LIVES * half_life):
        return
    running = seen.end[0].to(seen.means[-1].dtype)
    if seen.norm.momentum is not None and seen.tracked == seen.calls:  # began at its initial value
        left = (1 - seen.norm.momentum) ** seen.calls
        running = (running - left * seen.start[0]) / (1 - left)
    mean, deviation = torch.stack(list(seen.means)).mean(0), torch.stack(list(seen.variances)).mean(0).sqrt()
    distance = torch.where(_constant(seen), 0.0, ((running - mean).abs() / deviation).nan_to_num(0.0, posinf=0.0))
    far = distance > max(FAR, SAMPLING / math.sqrt(seen.examples))
    if far.any():
        yield Finding(
            seen.name, "far", float(distance.max()),
            f"after {seen.tracked:,} steps the running mean is {float(distance.max()):.2g} deviations off the batches' "
            f"in {int(far.sum())} of {len(far)} channels: {_listed(far)}",
            "evaluation sees other inputs than training: raise the momentum or lower the learning rate, or re-estimate "
            "the statistics over some batches before evaluation",
        )  # fmt: skip


def _last_batch_of_one(seen: Seen) -> Finding:
    alone = seen.values == seen.examples
    happens = "torch raises there in training" if alone else "its statistics are those of one example"
    return Finding(
        seen.name, "last batch", float(alone), f"an epoch's last batch would have 1 example: {happens}",
        "bncli leaves that batch out; in a DataLoader set drop_last=True, or take another batch size",
    )  # fmt: skip


def _listed(mask: Tensor) -> str:
    channels = mask.nonzero().flatten().tolist()
    more = f", ... ({len(channels) - NAMED} more)" if len(channels) > NAMED else ""
    return ", ".join(map(str, channels[:NAMED])) + more
