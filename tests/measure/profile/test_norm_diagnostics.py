"""Remarks on models with one thing wrong each, and none on a right one."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bncli.engine.convert import convert
from bncli.engine.models.norms import BatchNorm
from bncli.kernels import native
from bncli.measure.profile.norm_diagnostics import TrainingPlan, remarks, watch
from bncli.results.profile import NormRemark

Batch = Callable[[], Tensor]


def normal(*shape: int, mean: float | Tensor = 0.0) -> Batch:
    source = torch.Generator().manual_seed(0)
    return lambda: torch.randn(shape, generator=source) + mean


def remarks_on(
    model: nn.Module, batch: Batch, training: TrainingPlan | None = None, lr: float = 0.0, most: int = 200
) -> tuple[NormRemark, ...]:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)

    def step() -> None:
        optimizer.zero_grad()
        model(batch()).square().mean().backward()
        optimizer.step()

    return remarks("arm", watch(model, step, most=most), training or TrainingPlan(budget=1000, last_batch=0))


def only(found: tuple[NormRemark, ...]) -> NormRemark:
    assert len(found) == 1, found
    return found[0]


def mlp(**arguments: object) -> nn.Sequential:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(8, **arguments)  # type: ignore[arg-type]
    return nn.Sequential(nn.Linear(6, 8, bias=False), norm, nn.ReLU(), nn.Linear(8, 2))


@pytest.mark.parametrize("kind", ["torch's", "ours", "merged with what follows"])
def test_a_model_with_nothing_wrong_has_no_remarks(kind: str) -> None:
    model = mlp()
    if kind == "ours":
        model[1] = BatchNorm(8)
    elif kind == "merged with what follows":
        convert(model, native.batch_norm)
    assert remarks_on(model, normal(32, 6), lr=0.01) == ()


def test_hooks_are_removed_even_if_a_step_raises() -> None:
    model = mlp()

    def step() -> None:
        model(torch.ones(4, 6) * torch.arange(4)[:, None])
        raise ValueError("not about a norm")

    with pytest.raises(ValueError, match="not about a norm"):
        watch(model, step)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_mean_of_many_deviations_is_named_with_its_channels() -> None:
    mean = torch.zeros(8).index_fill(0, torch.tensor([2, 5]), 5000.0)
    found = only(remarks_on(nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 2)), normal(256, 8, mean=mean)))
    assert found.layer == "0"
    assert (found.kind, found.channels, found.dtype) == ("large mean", (2, 5), "float32")
    assert found.figures == {"of_channels": 8, "deviations": pytest.approx(5000, rel=0.2), "limit": 1000}


def test_a_mean_of_fifty_deviations_is_too_large_in_bfloat16_alone() -> None:
    batch = normal(256, 8, mean=50.0)
    assert remarks_on(nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 2)), batch) == ()
    model = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 2)).bfloat16()
    found = only(remarks_on(model, lambda: batch().bfloat16()))
    assert (found.kind, found.dtype) == ("large mean", "bfloat16")


def test_constant_channels_are_counted_and_the_first_are_named() -> None:
    mask = torch.ones(16).index_fill(0, torch.tensor([0, 3, 4, 9, 11]), 0.0)
    batch = normal(64, 16)
    model = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 2))
    found = only(remarks_on(model, lambda: batch() * mask + (1 - mask) * 3.3))
    assert (found.kind, found.channels) == ("constant channels", (0, 3, 4, 9, 11))
    assert found.figures == {"of_channels": 16, "eps": 1e-5}


def test_a_channel_that_varies_in_one_batch_of_many_is_not_constant() -> None:
    batches = iter([torch.zeros(8, 4)] * 3 + [torch.randn(8, 4)] * 200)
    model = nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2))
    assert remarks_on(model, lambda: next(batches)) == ()


def test_running_statistics_that_lag_behind_drifting_data_are_off() -> None:
    drift = iter(range(1000))
    batch = normal(64, 8)
    model = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 2))
    found = only(remarks_on(model, lambda: batch() + 0.3 * next(drift)))
    # A ramp of 0.3 a step: an average with momentum 0.1 lags by 0.3 * 0.9 / 0.1, the mean of the last five by 0.3 * 2.
    assert found.kind == "running mean off"
    assert found.figures["deviations"] == pytest.approx(0.3 * 9 - 0.3 * 2, abs=0.5)
    assert (found.channels, found.figures["of_channels"]) == (tuple(range(8)), 8)


def test_a_new_model_gets_no_remark_on_its_initial_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 2))
    assert remarks_on(model, normal(64, 8, mean=50.0)) == ()
    assert remarks_on(model, normal(64, 8, mean=50.0), most=5) == ()


def test_stale_statistics_of_a_trained_model_are_off_from_the_first_steps_on() -> None:
    model = nn.Sequential(nn.BatchNorm1d(8, momentum=0.01), nn.Linear(8, 2))
    model[0].num_batches_tracked.fill_(10_000)
    found = only(remarks_on(model, normal(64, 8, mean=20.0), most=10))
    assert (found.kind, found.figures["steps"]) == ("running mean off", 10_005)


def test_random_numbers_say_nothing_about_running_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm1d(8, momentum=0.01), nn.Linear(8, 2))
    model[0].num_batches_tracked.fill_(10_000)
    assert remarks_on(model, normal(64, 8, mean=20.0), TrainingPlan(real_data=False), most=10) == ()


def test_a_half_life_under_a_step_suggests_the_other_meaning_of_momentum() -> None:
    found = only(remarks_on(mlp(momentum=0.9), normal(32, 6)))
    assert (found.kind, found.layer) == ("short half-life", "1")
    assert found.figures == {"momentum": 0.9, "half_life_steps": pytest.approx(math.log(2) / math.log(10))}


def test_a_half_life_beyond_the_training_says_how_much_of_the_start_is_left() -> None:
    found = only(remarks_on(mlp(momentum=0.001), normal(32, 6), TrainingPlan(budget=500), most=10))
    assert found.kind == "long half-life"
    assert found.figures == {
        "momentum": 0.001,
        "half_life_steps": pytest.approx(692.8, abs=0.1),
        "budget_steps": 500,
        "kept": pytest.approx(0.999**500),
    }
    assert remarks_on(mlp(momentum=0.001), normal(32, 6), TrainingPlan(budget=5000), most=10) == ()


def test_a_cumulative_average_is_named() -> None:
    assert only(remarks_on(mlp(momentum=None), normal(32, 6))).kind == "cumulative average"


def test_a_norm_without_running_statistics_has_no_half_life() -> None:
    assert remarks_on(mlp(momentum=0.9, track_running_stats=False), normal(32, 6)) == ()


def biased(between: nn.Module | None = None) -> nn.Sequential:
    parts = [nn.Conv2d(3, 8, 3), *([between] if between else []), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 2)]
    return nn.Sequential(*parts)


@pytest.mark.parametrize("fused", [False, True])
def test_a_bias_in_front_of_a_batch_norm_has_no_effect(fused: bool) -> None:
    model = biased()
    if fused:
        convert(model, native.batch_norm)
    found = only(remarks_on(model, normal(16, 3, 8, 8), lr=0.01))
    assert (found.kind, found.layer, found.source) == ("bias without effect", "1", "0")
    assert (found.layer_class, found.source_class) == ("BatchNorm2d", "Conv2d")
    assert found.figures == {"parameters": 8}


@pytest.mark.parametrize("between", [nn.ReLU(), nn.ReLU(inplace=True), nn.Dropout(0.5)])
def test_a_bias_with_something_between_it_and_the_norm_has_an_effect(between: nn.Module) -> None:
    assert remarks_on(biased(between), normal(16, 3, 8, 8), lr=0.01) == ()


def test_a_bias_whose_output_is_used_elsewhere_has_an_effect() -> None:
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            return self.norm(y) + y

    assert remarks_on(Forked(), normal(32, 6)) == ()


def test_several_layers_are_one_remark_with_how_many_more() -> None:
    model = nn.Sequential(biased()[0], nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    found = only(remarks_on(model, normal(16, 3, 8, 8)))
    assert (found.kind, found.layer, found.more_layers) == ("bias without effect", "1", 1)


@pytest.mark.parametrize("ours", [False, True])
def test_one_value_a_channel_is_named_though_torch_refuses_the_step(ours: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 8, bias=False), BatchNorm(8) if ours else nn.BatchNorm1d(8))
    found = only(remarks_on(model, normal(1, 6)))
    assert (found.layer, found.kind) == ("1", "one value")


def test_a_last_batch_of_one_is_named_with_what_happens() -> None:
    one = TrainingPlan(budget=1000, last_batch=1)
    found = only(remarks_on(mlp(), normal(32, 6), one))
    assert (found.kind, found.figures) == ("last batch of one", {"raises": 1})
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten())
    assert only(remarks_on(model, normal(16, 3, 8, 8), one)).figures == {"raises": 0}
    assert remarks_on(mlp(), normal(32, 6), TrainingPlan(budget=1000, last_batch=2)) == ()


def test_a_model_without_batch_norm_takes_no_step() -> None:
    assert watch(nn.Linear(2, 2), pytest.fail).steps == 0
