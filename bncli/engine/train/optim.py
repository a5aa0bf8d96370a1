"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import functools
import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from bncli.recipe.sections import Adam, AdamW, Cosine, Exponential, Recipe, Sgd, StepDecay


def optimizer(recipe: Recipe, model: nn.Module, rates: Tensor | None = None) -> torch.optim.Optimizer:
    """torch's optimizer with two parameter groups: with and without weight decay. rates: (R,) of a stacked model."""
    section = recipe.optimizer
    everything, vector = section.weight_decay_on == "all", 1 if rates is None else 2  # dimensions
    decayed = [p for p in model.parameters() if everything or p.dim() > vector]
    spared = [p for p in model.parameters() if not everything and p.dim() <= vector]
    groups: list[dict[str, Any]] = [{"params": decayed}]
    if spared:
        groups.append({"params": spared, "weight_decay": 0.0})
    options = section.model_dump(exclude={"kind", "weight_decay_on"})
    kinds: dict[type, type] = {Sgd: torch.optim.SGD, Adam: torch.optim.Adam, AdamW: torch.optim.AdamW}
    kind = kinds[type(section)]
    if rates is not None:
        together = {"lr": rates, "rates": rates, "decoupled": isinstance(section, AdamW)}
        kind, options = RatePerRun, {"defaults": options | together}
    made: torch.optim.Optimizer = uncompiled(kind)(groups, **options)
    return made


class RatePerRun(torch.optim.Optimizer):
    """SGD, Adam or AdamW of a stacked model's parameters, (R, out, in) and (R, C), with rates (R,): torch's formulas.

    Each product and sum is rounded by itself, or has a factor for each run: a loop ends in scalar code, which may round
    a product and a sum otherwise than vectorized code, and where it ends depends on the number of runs.

    Of a group, `lr` is `rates` times the schedule's factor, and `decoupled` the decay of weights of AdamW.
    """

    updates = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the parameters by their gradients."""
        self.updates += 1
        for group in self.param_groups:
            decay, rates = group["weight_decay"], (group["lr"][:, None], group["lr"][:, None, None])
            for p in group["params"]:
                g, rate, state = p.grad, rates[p.dim() - 2], self.state[p]
                if decay and group["decoupled"]:
                    p.mul_(1 - rate * decay)
                elif decay:
                    g = g + decay * p
                if "betas" in group:
                    (share, square_share), eps = group["betas"], group["eps"]
                    if not state:
                        state.update(mean=torch.zeros_like(p), square=torch.zeros_like(p))
                    state["mean"].mul_(share).add_((1 - share) * g)
                    state["square"].mul_(square_share).add_((1 - square_share) * g.square())
                    g = state["mean"] / (state["square"].sqrt() / (1 - square_share**self.updates) ** 0.5 + eps)
                    rate = rate / (1 - share**self.updates)
                elif momentum := group["momentum"]:
                    state["mean"] = state["mean"].mul_(momentum).add_(g) if state else g.clone()
                    g = g + momentum * state["mean"] if group["nesterov"] else state["mean"]
                p.addcmul_(g, rate, value=-1)

    @torch.no_grad()
    def keep(self, kept: Tensor) -> None:
        """Keep the runs at those places of the run axis, of the parameters too."""
        for group in self.param_groups:
            group |= {name: group[name][kept] for name in ("lr", "rates")}
            for p in group["params"]:
                p.data, p.grad = p[kept], None
                self.state[p] = {name: each[kept] for name, each in self.state[p].items()}


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
    """The rate of the update that led to that step, or of the first one if there was none."""
    return recipe.optimizer.lr * learning_rate_factor(recipe, max(0, step - 1))


def set_learning_rate(optimizer: torch.optim.Optimizer, recipe: Recipe, step: int) -> None:
    """Set the rate for the update after `step` earlier ones. A schedule is a function of the step, without state."""
    if recipe.schedule.kind == "constant" and step > recipe.schedule.warmup:
        return  # it is final; computing it takes 0.5 % of a step of a small network
    factor = learning_rate_factor(recipe, step)
    for group in optimizer.param_groups:
        group["lr"] = group.get("rates", recipe.optimizer.lr) * factor
