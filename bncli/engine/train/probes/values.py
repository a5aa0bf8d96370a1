"""Values of the probes, as functions of tensors. m values a unit; a unit is a feature or a channel."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

PERCENTILES = (15, 50, 85)  # of the paper's figure 1b, c
STEP_SIZES = (0.5, 1.0, 2.0, 4.0)  # learning rates
SATURATED = 0.05  # of the largest derivative

Values = dict[str, float]


def precise(tensor: Tensor) -> Tensor:
    """The tensor in float64, or in float32 on a device without float64."""
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def vector(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def norm(tensor: Tensor) -> float:
    return torch.linalg.vector_norm(precise(tensor)).item()


# --- distributions of the inputs of a nonlinearity --------------------------------------------------------------------


def percentiles(inputs: Tensor) -> Values:
    """The percentiles of the first unit, and their medians over the units. inputs: (units, m), sorted along m."""
    found: Values = {}
    for percent in PERCENTILES:
        place = percent / 100 * (inputs.shape[1] - 1)
        each = inputs[:, math.floor(place)].lerp(inputs[:, math.ceil(place)], place % 1)
        found[f"unit_p{percent}"] = each[0].item()
        found[f"p{percent}"] = each.median().item()
    return found


def change(old: Tensor, new: Tensor) -> Values:
    """How far the distributions of the units moved: medians over the units of distances in deviations.

    The deviation that is the unit of length is the root mean square of the two distributions' deviations. It is at
    least 0.7 of the larger one, so a distribution that leaves a plateau, where its deviation was tiny, does not
    make a distance of thousands. Two constant units are at a distance of 0, or infinity.

    Args:
        old, new: (units, m), each sorted along m.

    Returns:
        drift: Wasserstein-1 distance. location: difference of the means. scale: difference of the deviations.
        shape: Wasserstein-1 distance of the distributions with mean 0 and deviation 1.
        drift_absolute: the drift in the inputs' own units.
    """
    sides = [precise(old), precise(new)]
    deviations, means = zip(*(torch.std_mean(side, 1, correction=0, keepdim=True) for side in sides), strict=True)
    length = ((deviations[0] ** 2 + deviations[1] ** 2) / 2).sqrt()
    standard = [_ratio(side - mean, deviation) for side, mean, deviation in zip(sides, means, deviations, strict=True)]
    drift = (sides[0] - sides[1]).abs().mean(1, keepdim=True)
    found = {
        "drift": _ratio(drift, length),
        "location": _ratio((means[0] - means[1]).abs(), length),
        "scale": _ratio((deviations[0] - deviations[1]).abs(), length),
        "shape": (standard[0] - standard[1]).abs().mean(1),
        "drift_absolute": drift,
    }
    return {name: each.median().item() for name, each in found.items()}


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, where 0 / 0 is 0."""
    return torch.where(part == 0, part, part / whole)


def saturation(nonlinearity: nn.Module, inputs: Tensor) -> Values:
    """share: outputs whose derivative is under 5 % of its maximum; dead: units of a ReLU with no derivative above 0.

    inputs: (m, units). Empty for other nonlinearities; NaN for inputs that are NaN.
    """
    if isinstance(nonlinearity, nn.Sigmoid | nn.Tanh):
        # sigmoid(x) = (1 + tanh(x / 2)) / 2
        relative = 1 - (inputs if isinstance(nonlinearity, nn.Tanh) else inputs / 2).tanh() ** 2
        return {"share": _share(relative < SATURATED, relative)}
    if isinstance(nonlinearity, nn.ReLU):
        largest = inputs.amax(0)
        return {"dead": _share(largest <= 0, largest)}
    return {}


def _share(true: Tensor, of: Tensor) -> float:
    return torch.where(of.isnan(), of, true.to(of)).mean().item()


def whitening(normalized: Tensor) -> Values:
    """The distance of the activations from what LeCun et al. 1998 ask for: mean 0, and the identity as covariance.

    Each distance is a Frobenius norm over the square root of the number of features. m examples of independent
    features with variance 1 are expected at about sqrt((features - 1) / m) off the diagonal, the key
    `off_diagonal_if_independent`, and at sqrt(2 / m) on it if they are Gaussian. Features that a batch norm normalized
    have a variance of 1 - eps / (variance + eps) in each batch by itself.

    Args:
        normalized: (m, features).
    """
    values = precise(normalized)
    m, features = values.shape
    mean = values.mean(0)
    covariance = (values - mean).T @ (values - mean) / m
    variances = covariance.diagonal().clone()
    covariance.fill_diagonal_(0)
    return {
        "diagonal": norm(variances - 1) / features**0.5,
        "off_diagonal": norm(covariance) / features**0.5,
        "mean": norm(mean) / features**0.5,
        "off_diagonal_if_independent": ((features - 1) / m) ** 0.5,
    }


# --- gradients --------------------------------------------------------------------------------------------------------


class GradientMoments:
    """Mean and spread of a layer's gradient over batches (Welford's update, so that a small spread is exact too)."""

    def __init__(self) -> None:
        self.mean: Tensor | None = None  # (parameters,)
        self.batches, self.spread = 0, 0.0

    def add(self, gradient: Tensor) -> None:
        """Add the gradient (parameters,) of a batch."""
        self.batches += 1
        if self.mean is None:
            self.mean = torch.zeros_like(gradient)
        difference = gradient - self.mean
        self.mean += difference / self.batches
        self.spread += norm(difference) ** 2 * (self.batches - 1) / self.batches

    def values(self) -> Values:
        """norm: of the mean over the batches, |E g|; noise: E |g - E g|^2 / E |g|^2, absent for a single batch.

        The batches' mean takes the place of the expectation, so K batches of mere noise have 1 - 1 / K, not 1.
        """
        assert self.mean is not None
        found = {"norm": norm(self.mean)}
        if self.batches > 1:
            spread = self.spread / self.batches
            square = spread + found["norm"] ** 2
            found["noise"] = spread / square if square else 0.0
        return found


def shift(before: Tensor, after: Tensor) -> Values:
    """Internal covariate shift (Santurkar et al. 2018, arXiv 1805.11604, definition 2.1), relative to its G.

    Args:
        before: G (parameters,), the gradient of a layer's weight.
        after: G', the same on the same batch after the layers below took their step.

    Returns:
        distance: |G - G'| / |G|. cosine: of the angle between G and G'.
    """
    before, after = precise(before), precise(after)
    length = before.norm()
    cosine = torch.dot(before, after) / (length * after.norm())
    return {"distance": ((before - after).norm() / length).item(), "cosine": cosine.item()}


def landscape(gradient: Tensor, at: Callable[[float], tuple[Tensor, Tensor]], learning_rate: float) -> Values:
    """Loss and gradient along the gradient, 1/2 to 4 learning rates far (Santurkar et al. 2018, section 3).

    Args:
        gradient: g (parameters,), at the weights w.
        at: step size s -> the loss () and the gradient (parameters,) at w - s g.
        learning_rate: of the run now.

    Returns:
        loss_min, loss_max, loss_range: of the loss at the step sizes. predictiveness: the largest Euclidean distance of
        a gradient there to g. smoothness: the largest such distance over the length of its step, s |g|.
    """
    sizes = [factor * learning_rate for factor in STEP_SIZES]
    losses, gradients = zip(*map(at, sizes), strict=True)
    distances = torch.tensor([norm(each - gradient) for each in gradients], dtype=torch.float64)
    low, high = torch.stack(losses).aminmax()
    return {
        "loss_min": low.item(),
        "loss_max": high.item(),
        "loss_range": (high - low).item(),
        "predictiveness": distances.max().item(),
        "smoothness": (distances / torch.tensor(sizes, dtype=torch.float64) / norm(gradient)).max().item(),
    }
