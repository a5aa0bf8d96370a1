"""Recorder: order of execution, inputs of nonlinearities, normalized activations, and which layer a norm follows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import bncli
from bncli.engine.train.probes.recorder import MOST_FEATURES, Recorder, is_norm, unit_values


def recorded(model: nn.Module, x: Tensor, passes: int = 1) -> Recorder:
    recorder = Recorder(model, passes)
    for _ in range(passes):
        recorder.begin_pass()
        model(x)
    recorder.remove()
    return recorder


class Block(nn.Module):
    """Defined in another order than it runs, with one ReLU for two places and one weight for two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 1)
        self.relu = nn.ReLU(inplace=True)
        self.first = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.first(x)))
        y: Tensor = self.relu(self.second(x) - 1)
        return y


def test_modules_count_in_the_order_in_which_they_run() -> None:
    recorder = recorded(Block(), torch.randn(5, 3, 8, 8))
    assert list(recorder.executed) == ["first", "norm", "second"]
    assert recorder.followed_by_norm == {"first"}


def test_each_call_of_a_shared_nonlinearity_counts_and_its_input_is_seen_before_it_is_overwritten() -> None:
    block, x = Block(), torch.randn(5, 3, 8, 8)
    recorder = recorded(block, x, passes=2)
    assert list(recorder.inputs) == ["relu", "relu:2"]
    first, second = recorder.inputs["relu"]
    normalized = block.norm(block.first(x))
    assert torch.equal(first, normalized.permute(0, 2, 3, 1).reshape(-1, 4))
    assert torch.equal(first, second)
    assert (first < 0).any()
    assert (recorder.inputs["relu:2"][0] < 0).any()


def test_nothing_is_recorded_once_the_hooks_are_removed() -> None:
    block, x = Block(), torch.randn(5, 3, 8, 8)
    recorder = recorded(block, x)
    block(x)
    assert len(recorder.inputs["relu"]) == 1
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())


NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "batch": (lambda: nn.BatchNorm2d(6), (9, 6, 4, 4)),
    "ours": (lambda: bncli.BatchNorm2d(6, kernel="fused"), (9, 6, 4, 4)),
    "group": (lambda: nn.GroupNorm(2, 6), (9, 6, 4, 4)),
    "layer": (lambda: nn.LayerNorm(6), (9, 5, 6)),
    "layer over positions": (lambda: nn.LayerNorm((2, 3)), (9, 2, 3)),
    "rms": (lambda: nn.RMSNorm(6), (9, 6)),
}


@pytest.mark.parametrize("name", NORMS)
def test_the_weight_and_bias_of_a_norm_are_taken_back_out(name: str) -> None:
    make, shape = NORMS[name]
    norm, x = make(), 3 + torch.randn(shape)
    plain = recorded(norm, x).normalized[""][0]
    assert plain.shape[1] == 6
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn_like(parameter))
    assert is_norm(norm)
    torch.testing.assert_close(recorded(norm, x).normalized[""][0], plain, rtol=1e-4, atol=1e-4)


def test_features_whose_weight_is_zero_are_left_out() -> None:
    norm = nn.BatchNorm1d(3)
    norm.weight.data[1] = 0
    assert recorded(norm, torch.randn(10, 3)).normalized[""][0].shape == (10, 2)


def test_a_norm_with_a_residual_or_an_activation_in_it_gives_no_normalized_activations() -> None:
    x = torch.randn(10, 3)
    assert not recorded(bncli.BatchNorm1d(3, activation="relu"), x).normalized
    norm = bncli.BatchNorm1d(3)
    recorder = Recorder(norm, 1)
    norm(x, x)
    norm(x, activation="relu")
    assert not recorder.normalized
    norm(x)
    assert len(recorder.normalized[""]) == 1


def test_a_covariance_takes_evenly_spaced_features_of_many() -> None:
    found = recorded(nn.BatchNorm1d(3 * MOST_FEATURES), torch.randn(4, 3 * MOST_FEATURES)).normalized[""][0]
    assert found.shape == (4, MOST_FEATURES)


def test_many_values_are_sampled_at_the_same_places_for_all_units_and_every_time() -> None:
    x = torch.arange(4 * 2 * 10 * 10.0).view(4, 2, 10, 10)
    values = unit_values(x, 50)
    assert values.shape == (50, 2)
    assert torch.equal(values[:, 1] - values[:, 0], torch.full((50,), 100.0))
    assert len(values[:, 0].unique()) > 40
    assert torch.equal(values, unit_values(x, 50))
    assert torch.equal(unit_values(x.bfloat16(), 400), x.bfloat16().float().permute(0, 2, 3, 1).reshape(-1, 2))
