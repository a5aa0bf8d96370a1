"""Which recipes' runs train together."""

from __future__ import annotations

from typing import Any

import pytest

from bncli.recipe.batches import alone, common
from tests.conftest import tiny


@pytest.mark.parametrize(
    ("field", "sections"),
    [
        ("norm", {"norm": {"kind": "layer"}}),
        ("norm", {"norm": {"kind": "batch", "kernel": "fused"}}),
        ("norm", {"norm": {"kind": "batch", "backward": "ignore_statistics"}}),
        ("norm.momentum", {"norm": {"kind": "batch", "momentum": None}}),
        ("probes", {"probes": {}}),
    ],
)
def test_what_trains_alone_is_named_by_its_field(field: str, sections: dict[str, Any]) -> None:
    assert alone(tiny(**sections)) == field


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_an_mlp_without_or_with_native_batch_norm_trains_with_others(norm: str) -> None:
    assert alone(tiny(norm={"kind": norm})) is None


def test_the_rate_and_the_initial_weights_need_not_be_common() -> None:
    point = {"optimizer.lr": 1.0, "model.init.std": 0.1, "train.seed": 3, "train.batch_size": 60}
    assert common(point) == {"train.batch_size": 60}
