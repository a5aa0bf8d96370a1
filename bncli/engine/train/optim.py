"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import functools
import inspect
import math
from typing import Any

import torch
from torch import nn

from bncli.recipe.sections import Adam, AdamW, Cosine, Exponential, Recipe, Sgd, StepDecay


def optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """torch's optimizer with two parameter groups: with and without weight decay."""
    section = recipe.optimizer
    everything = section.weight_decay_on == "all"
    decayed = [p for p in model.parameters() if everything or p.dim() > 1]
    spared = [p for p in model.parameters() if not everything and p.dim() <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed}]
    if spared:
        groups.append({"params": spared, "weight_decay": 0.0})
    arguments = section.model_dump(exclude={"kind", "weight_decay_on"})
    kinds: dict[type, type] = {Sgd: torch.optim.SGD, Adam: torch.optim.Adam, AdamW: torch.optim.AdamW}
    made: torch.optim.Optimizer = uncompiled(kinds[type(section)])(groups, **arguments)
    return made


@functools.cache
def uncompiled(kind: type) -> type:
    """The same optimizer class without the wrappers that only serve to compile the optimizer itself.

    torch 2.13's import torch._dynamo at the first call, which took 0.75 s (torch: 1.1 s): `_use_grad` around
    step, `_disable_dynamo` around the others. The wrapped methods are torch's; step runs under no_grad as in torch.
    """
    names = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    plain: dict[str, Any] = {name: inspect.unwrap(getattr(kind, name)) for name in names}
    return type(kind.__name__, (kind,), {**plain, "step": torch.no_grad()(inspect.unwrap(getattr(kind, "step")))})  # noqa: B009


def learning_rate_factor(recipe: Recipe, step: int) -> float:
    """The factor of the learning rate for the update after `step` earlier ones."""
    schedule = recipe.schedule
    factor = min(1.0, (step + 1) / (schedule.warmup + 1))
    if isinstance(schedule, Exponential):
        factor *= schedule.gamma ** (step / schedule.every)
    elif isinstance(schedule, StepDecay):
        factor *= schedule.gamma ** sum(step >= milestone for milestone in schedule.milestones)
    elif isinstance(schedule, Cosine):
        share = min(1.0, max(0, step - schedule.warmup) / max(1, recipe.train.steps - schedule.warmup))
        factor *= schedule.final + (1 - schedule.final) * (1 + math.cos(math.pi * share)) / 2
    return factor


def learning_rate(recipe: Recipe, step: int) -> float:
    """The rate for the update after `step` earlier ones."""
    return recipe.optimizer.lr * learning_rate_factor(recipe, step)


def set_learning_rate(optimizer: torch.optim.Optimizer, recipe: Recipe, step: int) -> None:
    """Set the rate for the update after `step` earlier ones. A schedule is a function of the step, without state."""
    if recipe.schedule.kind == "constant" and step > recipe.schedule.warmup:
        return  # it is final; computing it takes 0.5 % of a step of a small network
    rate = learning_rate(recipe, step)
    for group in optimizer.param_groups:
        group["lr"] = rate
