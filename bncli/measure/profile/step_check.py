"""Comparison of a training step with native's: loss, gradients and running statistics, after the same batches.

An error is relative, in the 2-norm, of each tensor: to its norm plus a share of the norm of all tensors of its kind,
since one whose exact value is 0 (the gradient of a bias in front of a batch norm) holds roundings alone.

Roundings put an element of a ReLU that is close enough to its kink on the other side. In a layer of a thousand values
one such element changes the gradients by a few per cent, in any right kernel, so a narrow bound can only be held where
there are none. Hence two checks. A few examples in float64, where an element in 10^14 is that close: up to 4 sqrt(u),
u the unit roundoff. And a whole batch in the recipe's precision: up to a tenth, or twice the native step's error
against float64, in one of BATCHES batches, since what is wrong is wrong in each of them.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bncli.engine.convert.fold import fold
from bncli.engine.data.splits import Batch, Dataset
from bncli.measure.profile.step_models import StepModel, Trainable
from bncli.results.profile import StepDifference

EXAMPLES, NARROW = 8, 4 * math.sqrt(2.0**-53)  # of the check in float64
BATCHES, WIDE = 3, 0.1  # of the check in the recipe's precision

Kind = Literal["loss", "gradient", "running statistic", "output"]
Found = dict[Kind, dict[str, Tensor]]  # kind -> name -> tensor, float64
Errors = dict[tuple[Kind, str], float]  # (kind, name) -> relative error


def difference(
    model: StepModel, kernel: str, other: Trainable, dataset: Dataset, device: torch.device
) -> StepDifference | None:
    """What is wrong with the step of `other`, which has taken none so far; None where nothing is.

    It takes up to BATCHES steps here. Raises what a step raises.
    """
    native = model.trainable("native", dataset, device)
    batches = [native.batch() for _ in range(BATCHES)]
    in_float64 = _in_float64(model, kernel, dataset, batches[0])
    return in_float64 or _in_the_recipes_precision(model, other, native, dataset, batches)


def folding_difference(trainable: Trainable, fold: Callable[[nn.Module], nn.Module] = fold) -> StepDifference | None:
    """What is wrong with the outputs of a model after `fold`, in evaluation mode; None where nothing is.

    In float64 they differ by the roundings of the folded weights, some hundred u: the bound is that of the steps. Where
    a user's model does not take float64, the whole batch in the recipe's precision, up to a tenth. Raises what `fold`
    and a forward pass raise.
    """
    exact, x, bound = copy.deepcopy(trainable.model).eval(), trainable.evaluation_x, NARROW
    try:
        expected = _outputs(trainable, exact.double(), x[:EXAMPLES].double())
        found = _outputs(trainable, fold(exact), x[:EXAMPLES].double())
    except Exception:  # a user's model need not take float64
        exact, bound = copy.deepcopy(trainable.model).eval(), WIDE
        expected, found = (_outputs(trainable, model, x) for model in (exact, fold(exact)))
    wrong = _above(_errors(expected, found, 0.0), {}, bound)
    return _largest(wrong, bound, in_float64=bound == NARROW) if wrong else None


@torch.inference_mode()
def _outputs(trainable: Trainable, model: nn.Module, x: Tensor) -> Found:
    tensors = [each for each in tree_leaves(trainable.forward(model, x)) if isinstance(each, Tensor)]
    return {"output": {"": torch.cat([each.double().flatten() for each in tensors])}}


def _in_float64(model: StepModel, kernel: str, dataset: Dataset, batch: Batch) -> StepDifference | None:
    x, y = (each[:EXAMPLES] for each in batch)
    native = _doubled(model, "native", dataset, x.device)
    try:
        expected = _outcome(native, (x.double(), y))
    except Exception:  # a user's model need not take float64
        return None
    found = _outcome(_doubled(model, kernel, dataset, x.device), (x.double(), y))
    wrong = _above(_errors(expected, found, NARROW), {}, NARROW)
    return _largest(wrong, NARROW, in_float64=True) if wrong else None


def _in_the_recipes_precision(
    model: StepModel, other: Trainable, native: Trainable, dataset: Dataset, batches: list[Batch]
) -> StepDifference | None:
    exact: Trainable | None = None
    wrong: Errors = {}
    for batch in batches:
        expected, found = _outcome(native, batch), _outcome(other, batch)
        wrong = _above(_errors(expected, found, WIDE), {}, WIDE)
        if wrong:
            with contextlib.suppress(Exception):  # a user's model need not take float64
                exact = exact or _doubled(model, "native", dataset, batch[0].device)
                truth = _outcome(exact, (batch[0].double(), batch[1]))
                wrong = _above(_errors(truth, found, WIDE), _errors(truth, expected, WIDE), WIDE)
        if not wrong:
            return None
    return _largest(wrong, WIDE, in_float64=False)


def _doubled(model: StepModel, kernel: str, dataset: Dataset, device: torch.device) -> Trainable:
    """In float64, which autocast leaves as it is; its weights stay, as those of the models that it is compared with."""
    made = model.trainable(kernel, dataset, device)
    made.model.double()
    return made


def _outcome(trainable: Trainable, batch: Batch) -> Found:
    torch.manual_seed(0)  # of dropout
    loss = trainable.step(*batch)
    parameters, buffers = trainable.model.named_parameters(), trainable.model.named_buffers()
    return {
        "loss": {"": loss.double()},
        "gradient": {name: p.grad.double() for name, p in parameters if p.grad is not None},
        "running statistic": {
            name: buffer.double() for name, buffer in buffers if name.rpartition(".")[2].startswith("running_")
        },
    }


def _errors(expected: Found, found: Found, share: float) -> Errors:
    """Relative errors in the 2-norm; infinite where a tensor is missing."""
    errors: Errors = {}
    for kind, tensors in expected.items():
        size = math.hypot(*(float(tensor.norm()) for tensor in tensors.values()))
        for name, tensor in tensors.items():
            other, scale = found[kind].get(name), float(tensor.norm()) + share * size
            if other is None or other.shape != tensor.shape:
                errors[kind, name] = math.inf
                continue
            distance = float((other - tensor).norm())
            errors[kind, name] = distance / scale if scale > 0 else (0.0 if distance == 0 else math.inf)
    return errors


def _above(errors: Errors, allowed: Errors, bound: float) -> Errors:
    """The errors above the bound and above twice what is allowed; NaN is above everything."""
    return {where: error for where, error in errors.items() if not error <= max(bound, 2 * allowed.get(where, 0.0))}


def _largest(wrong: Errors, allowed: float, in_float64: bool) -> StepDifference:
    kind, name = worst = max(wrong, key=lambda where: math.inf if math.isnan(wrong[where]) else wrong[where])
    return StepDifference(kind, name, len(wrong) - 1, wrong[worst], allowed, in_float64)
