"""The optimizer step's options: gradient accumulation, gradient clipping, label smoothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bncli.engine import data
from bncli.engine.train import evaluate, evaluation_size, optimizer_step
from bncli.engine.train.state import TrainState
from tests.conftest import tiny

CPU = torch.device("cpu")
SGD = {"kind": "sgd", "lr": 0.5}


def state(norm: str = "none", double: bool = True, **train: Any) -> TrainState:
    recipe = tiny(norm={"kind": norm}, optimizer=SGD, train={"target": None, **train})
    made = TrainState(recipe, data.load(recipe.data, CPU), CPU)
    if double:
        made.model.double()
    return made


def batch(of: TrainState) -> tuple[Tensor, Tensor]:
    x, y = of.next_batch()
    return x.double(), y


def weights(of: TrainState) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in of.model.parameters()])


def gradients(of: TrainState) -> Tensor:
    found = [parameter.grad.flatten() for parameter in of.model.parameters() if parameter.grad is not None]
    return torch.cat(found)


# --- gradient accumulation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_micro_batches_without_statistics_over_the_batch_make_the_whole_batchs_step(norm: str) -> None:
    whole, parts = state(norm), state(norm, accumulate=4)
    for _ in range(3):
        losses = [optimizer_step(each, *batch(each)) for each in (whole, parts)]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-14, atol=0)
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-12, atol=1e-14)
    assert whole.step == parts.step == whole.batches == parts.batches == 3


def test_batch_norm_normalizes_each_micro_batch_by_its_own_statistics() -> None:
    """Ghost batch norm (arXiv 1705.08741): written out here as one pass over the batch in slices."""
    parts, by_hand, whole = state("batch", accumulate=4), state("batch"), state("batch")
    x, y = batch(parts)
    loss = optimizer_step(parts, x, y)
    logits = torch.cat([by_hand.model(slice_) for slice_ in x.split(5)])
    expected = F.cross_entropy(logits, y)
    expected.backward()
    by_hand.optimizer.step()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-14, atol=0)
    torch.testing.assert_close(weights(parts), weights(by_hand), rtol=1e-12, atol=1e-14)
    optimizer_step(whole, x, y)
    assert not torch.allclose(weights(parts), weights(whole), rtol=1e-4)


def test_running_statistics_are_updated_by_each_micro_batch() -> None:
    one, by_hand = state("batch", accumulate=4), state("batch")
    x, y = batch(one)
    optimizer_step(one, x, y)
    for slice_ in x.split(5):
        by_hand.model(slice_)
    for (name, buffer), expected in zip(one.model.named_buffers(), by_hand.model.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, rtol=1e-14, atol=0)
        if name.endswith("num_batches_tracked"):
            assert buffer == 4


def test_a_norm_that_evaluates_by_batch_statistics_does_so_over_a_micro_batch() -> None:
    norm = {"kind": "batch", "track_running_stats": False}
    assert evaluation_size(tiny(norm=norm, train={"accumulate": 4}), (8,)) == 5


# --- gradient clipping --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 4])
def test_gradients_above_the_norm_are_scaled_to_it_and_others_are_left_alone(accumulate: int) -> None:
    free, loose, tight = (state(clip_gradients=norm, accumulate=accumulate) for norm in (None, 1e6, 0.01))
    before = weights(free)
    for each in (free, loose, tight):
        optimizer_step(each, *batch(each))
    assert torch.equal(weights(loose), weights(free))
    norm = gradients(free).norm().item()
    assert norm > 0.01
    torch.testing.assert_close(gradients(tight).norm().item(), 0.01, rtol=1e-3, atol=0)  # torch adds 1e-6 to the norm
    direction = torch.dot(before - weights(tight), gradients(free)) / (before - weights(tight)).norm() / norm
    assert direction.item() == pytest.approx(1)


def test_fp16_gradients_are_clipped_without_the_loss_scale() -> None:
    """The scale is 65,536 at first: gradients that were clipped with it would leave the weights where they are."""
    single, half = (state(double=False, clip_gradients=0.1, precision=each) for each in ("fp32", "fp16"))
    before = weights(single)
    for each in (single, half):
        optimizer_step(each, *each.next_batch())
    steps = [(weights(each) - before).norm().item() for each in (single, half)]
    assert steps[0] == pytest.approx(0.5 * 0.1, rel=1e-3)
    assert steps[1] == pytest.approx(steps[0], rel=1e-2)


# --- label smoothing ----------------------------------------------------------------------------------------------


def test_label_smoothing_is_of_the_training_loss_and_not_of_the_held_out_loss() -> None:
    plain, smooth = state(double=False), state(double=False, label_smoothing=0.1)
    assert evaluate(plain)[0].evaluation == evaluate(smooth)[0].evaluation
    x, y = smooth.next_batch()
    shares = torch.full((len(y), 3), 0.1 / 3)
    shares[torch.arange(len(y)), y] += 0.9
    expected = -(shares * smooth.model(x).log_softmax(1)).sum(1).mean().item()
    assert optimizer_step(smooth, x, y).item() == pytest.approx(expected)
    assert not math.isclose(optimizer_step(plain, x, y).item(), expected, rel_tol=1e-3)
