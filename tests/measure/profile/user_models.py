"""Models of a user: functions without arguments that return a module, some of which cannot be trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 4),
    )  # fmt: skip


class TwoOutputs(nn.Module):
    """A dictionary of floating-point and whole-number outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = small()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.body(x)
        return {"logits": y, "class": y.argmax(1)}


class OnlyWholeNumbers(TwoOutputs):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.body(x).argmax(1)


class Raising(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("no such luck")


def one_value_a_channel() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6))


def no_module() -> Tensor:
    return torch.ones(1)


class NormFirst(nn.Module):
    """Nothing comes before the batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(self.norm(x))
        return y


class ByValue(NormFirst):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)
