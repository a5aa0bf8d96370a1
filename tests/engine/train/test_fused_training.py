"""Training on the CPU with the fused kernel in C: the same course as with native, to the rounding of its steps."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from bncli.engine.train import train
from bncli.results.train import Evaluated
from tests.conftest import TINY, tiny

IMAGES = {**TINY["data"], "shape": [3, 8, 8], "examples": 96, "held_out": 33}
MODELS: dict[str, dict[str, Any]] = {
    "mlp": {},
    "cnn": {"data": IMAGES, "model": {"kind": "cnn", "channels": [8, 12]}},
    "resnet": {"data": IMAGES, "model": {"kind": "resnet", "depth": 20}},
}


LAYOUTS = ("contiguous", "channels_last")


@pytest.mark.parametrize(("name", "layout"), [("mlp", "contiguous"), *itertools.product(("cnn", "resnet"), LAYOUTS)])
def test_a_run_with_the_fused_kernel_goes_as_one_with_native(name: str, layout: str) -> None:
    """Native contiguous, at a rate at which a rounding of native's initial weights moves its losses by under 1e-6: at
    three times the rate a loss of the ResNet's jumps by half a percent on some processors."""
    losses = {}
    for kernel, layout_ in (("native", "contiguous"), ("fused", layout)):
        recipe = tiny(
            norm={"kind": "batch", "kernel": kernel},
            optimizer={"kind": "sgd", "lr": 0.001},
            train={"steps": 6, "evaluate_every": 2, "memory_format": layout_, "target": {"value": 1.0}},
            **MODELS[name],
        )
        found = [event.evaluation for event in train(recipe, "cpu", threads=1) if isinstance(event, Evaluated)]
        losses[kernel] = [evaluation.loss for evaluation in found]
    assert len(losses["fused"]) >= 4
    assert losses["fused"] == pytest.approx(losses["native"], rel=2e-3)
