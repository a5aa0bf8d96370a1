"""Recipes that tests train: small, seeded, and finished in well under a second."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import pytest

# Processes that test at the same time share the cores: two threads each would wait for one another. Where a test asks
# for several, one that waits leaves its core to others, which libgomp reads as torch loads it, here and in processes
# that tests start: 0.13 ms of CPU for a small batch norm on two busy cores, and 16 ms where it spins.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from bncli.engine.device import cpu_threads
from bncli.kernels import fused
from bncli.recipe.sections import Recipe

torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))

if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    # Without a GPU the fused kernel in Triton is tested in its interpreter. Triton decides that when it is first
    # imported, so this comes before any test does.
    fused.launcher(torch.device("cpu"), interpreted=True)

TINY: dict[str, Any] = {
    "data": {"source": "synthetic", "shape": [8], "classes": 3, "examples": 120, "held_out": 60, "noise": 0.5},
    "model": {"kind": "mlp", "hidden": [16], "activation": "relu"},
    "norm": {"kind": "batch"},
    "optimizer": {"kind": "sgd", "lr": 0.5},
    "train": {"steps": 60, "batch_size": 20, "evaluate_every": 5, "target": {"value": 0.9}},
}


# A model of the user's own, whose forward pass does `act` first.
OWN = """
from torch import nn
class Own(nn.Linear):
    def forward(self, x):
        {act}
        return super().forward(x)
def make(shape, classes, norm):
    return Own(shape[0], classes)
"""


def tiny(**sections: Any) -> Recipe:
    """The small recipe with whole sections replaced, and `train` fields changed one by one."""
    train = {**TINY["train"], **sections.pop("train", {})}
    return Recipe.model_validate({**TINY, **sections, "train": train})


@pytest.fixture(autouse=True)
def threads_are_restored() -> Iterator[None]:
    """More than there were before a test, or a command that it ran, would slow down all tests that follow."""
    with cpu_threads(torch.get_num_threads()):
        yield


def pytest_configure() -> None:
    """Examples of hypothesis may take any time: its limit of 200 ms fails tests where other programs use the cores."""
    import hypothesis

    hypothesis.settings.register_profile("any time", deadline=None)
    hypothesis.settings.load_profile("any time")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
