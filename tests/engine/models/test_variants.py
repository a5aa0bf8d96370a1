"""Each variant by the identity that pins it: to batch norm, to evaluation, to torch's RMS norm, or to its formula."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bncli.engine import data
from bncli.engine.convert import convert
from bncli.engine.models import factory
from bncli.engine.train import training_loop
from bncli.engine.train.state import TrainState
from bncli.recipe import sections
from bncli.results.train import RunFinished
from tests.conftest import tiny

SHAPES = [(12, 3), (4, 3, 5), (4, 3, 2, 5), (2, 3, 2, 3, 2)]
BY_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=str)
NO_NOISE = {"shift": 0.0, "scale": 1.0, "shift_spread": 0.0, "scale_spread": 0.0}
NO_LIMIT = {"r_max": 1e9, "d_max": 1e9, "warmup": 0, "r_steps": 0, "d_steps": 0}
VARIANTS: dict[str, dict[str, Any]] = {
    "ghost": {"size": 2},
    "renorm": {"warmup": 1, "r_steps": 3, "d_steps": 4},
    "noisy": {},
    "frozen": {"after": 2},
    "rms": {},
    "dyt": {},
    "batch": {"backward": "ignore_statistics"},
}


def made(kind: str, **fields: Any) -> Any:
    """The recipe's module for 3 channels, in float64, with a weight and a bias that differ."""
    names = {"ghost": "GhostBatchNorm", "renorm": "BatchRenorm", "noisy": "NoisyBatchNorm", "frozen": "FrozenBatchNorm"}
    names |= {"rms": "RMSNorm", "dyt": "DynamicTanh", "batch": "BatchNorm"}
    make = factory(getattr(sections, names[kind])(kind=kind, **fields))
    assert make is not None
    return with_vectors(make(3).double())


def with_vectors(module: Any) -> Any:
    with torch.no_grad():
        for name, values in {"weight": [0.5, -1.0, 2.0], "bias": [0.3, 0.0, -4.0]}.items():
            if getattr(module, name, None) is not None:
                getattr(module, name).copy_(torch.tensor(values))
    return module


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """With means and deviations that differ between channels."""
    x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    per_channel = [-1 if dimension == 1 else 1 for dimension in range(len(shape))]
    return x * torch.tensor([0.1, 3.0, 1.0]).view(per_channel) + torch.tensor([5.0, 0.0, -2.0]).view(per_channel)


def assert_trains_and_evaluates_as_batch_norm(module: Any, shape: tuple[int, ...], steps: int = 3) -> None:
    other = with_vectors(nn.BatchNorm1d(3).double())
    other._check_input_dim = lambda x: None  # any positions
    for seed in range(steps):
        x, z = (numbers(*shape, seed=seed).requires_grad_() for _ in range(2))
        y, expected = module(x), other(z)
        torch.testing.assert_close(y, expected)
        for output in (y, expected):
            output.backward(numbers(*shape, seed=seed + 9))
        torch.testing.assert_close(x.grad, z.grad)
        torch.testing.assert_close(module.weight.grad, other.weight.grad)
        torch.testing.assert_close(module.bias.grad, other.bias.grad)
    torch.testing.assert_close(dict(module.state_dict()), dict(other.state_dict()))
    torch.testing.assert_close(module.eval()(numbers(*shape)), other.eval()(numbers(*shape)))


# --- the identities ---------------------------------------------------------------------------------------------------


@BY_SHAPE
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("ghost", {"size": 12}),
        ("renorm", {"r_max": 1.0, "d_max": 0.0, "warmup": 0}),
        ("renorm", {"warmup": 3}),
        ("noisy", NO_NOISE),
        ("frozen", {"after": 3}),
    ],
    ids=str,
)
def test_with_these_fields_each_is_batch_norm(kind: str, fields: dict[str, Any], shape: tuple[int, ...]) -> None:
    assert_trains_and_evaluates_as_batch_norm(made(kind, **fields), shape)


@BY_SHAPE
def test_ghost_norm_is_batch_norm_of_one_slice_after_the_other(shape: tuple[int, ...]) -> None:
    ghost, batch = made("ghost", size=2), with_vectors(nn.BatchNorm1d(3).double())
    batch._check_input_dim = lambda x: None
    x = numbers(*shape)
    slices = torch.stack([batch(part) for part in x.split(2)]).flatten(0, 1)
    torch.testing.assert_close(ghost(x), slices)
    torch.testing.assert_close(dict(ghost.state_dict()), dict(batch.state_dict()))


@BY_SHAPE
def test_renorm_without_limits_is_evaluation_by_the_running_statistics_before_the_batch(shape: tuple[int, ...]) -> None:
    renorm = made("renorm", **NO_LIMIT)
    renorm(numbers(*shape))  # the limits grow after the first batch
    for seed in range(1, 4):
        expected = copy.deepcopy(renorm).eval()(numbers(*shape, seed=seed))
        torch.testing.assert_close(renorm(numbers(*shape, seed=seed)), expected)


def test_renorm_is_its_formula_with_constant_r_and_d_where_limits_bind_in_some_channels() -> None:
    renorm = made("renorm", r_max=1.5, d_max=0.5, warmup=0, r_steps=0, d_steps=0)
    renorm(numbers(12, 3))  # the limits grow after the first batch
    renorm.running_mean.copy_(torch.tensor([5.0, 0.0, 0.0]))
    renorm.running_var.copy_(torch.tensor([0.01, 0.5, 1.0]))
    x = numbers(12, 3, seed=1).requires_grad_()
    mean, var = x.mean(0), x.var(0, correction=0)
    deviation, running = (var + 1e-5).sqrt(), (renorm.running_var + 1e-5).sqrt()
    r = (deviation / running).detach().clamp(1 / 1.5, 1.5)
    d = ((mean - renorm.running_mean) / running).detach().clamp(-0.5, 0.5)
    assert (d.abs() == 0.5).tolist() == [False, True, True]
    assert ((r > 1 / 1.5) & (r < 1.5)).tolist() == [True, False, True]
    expected = ((x - mean) / deviation * r + d) * renorm.weight + renorm.bias
    parameters = [x, renorm.weight, renorm.bias]
    y, g = renorm(x), numbers(12, 3, seed=2)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y, parameters, g), torch.autograd.grad(expected, parameters, g))


def test_the_limits_of_renorm_grow_as_in_the_paper() -> None:
    renorm = made("renorm")
    found = []
    for batches in (0, 5_000, 15_000, 22_500, 25_000, 40_000, 90_000):
        renorm.num_batches_tracked.fill_(batches)
        found.append(tuple(map(float, renorm.limits())))
    assert found == [(1, 0), (1, 0), (pytest.approx(1 + 2 * 10 / 35), 2.5), (2, 4.375),
                     (pytest.approx(1 + 2 * 20 / 35), 5), (3, 5), (3, 5)]  # fmt: skip


@BY_SHAPE
def test_frozen_norm_is_affine_and_moves_nothing_once_it_is_frozen(shape: tuple[int, ...]) -> None:
    frozen = made("frozen", after=2)
    for seed in range(2):
        frozen(numbers(*shape, seed=seed))
    before = copy.deepcopy(frozen.state_dict())
    x = numbers(*shape, seed=3).requires_grad_()
    y = frozen(x)
    torch.testing.assert_close(y, copy.deepcopy(frozen).eval()(x))
    (slopes,) = torch.autograd.grad(y.sum(), x)
    slope = frozen.weight / (frozen.running_var + frozen.eps).sqrt()
    torch.testing.assert_close(slopes, slope.view(1, 3, *[1] * (len(shape) - 2)).expand(shape))
    torch.testing.assert_close(dict(frozen.state_dict()), dict(before), rtol=0, atol=0)


def test_frozen_from_the_start_leaves_the_input_but_for_weight_and_bias() -> None:
    x, frozen = numbers(12, 3), made("frozen", after=0)
    torch.testing.assert_close(frozen(x), x / (1 + 1e-5) ** 0.5 * frozen.weight + frozen.bias)
    assert int(frozen.num_batches_tracked) == 0


@pytest.mark.parametrize("shape", SHAPES[::2], ids=str)
def test_noise_has_the_papers_moments_and_is_drawn_anew_each_step(shape: tuple[int, ...]) -> None:
    noisy, batch = made("noisy"), made("noisy", **NO_NOISE)
    torch.manual_seed(0)
    x = numbers(*shape)
    y, many = batch(x), torch.stack([noisy(x) for _ in range(4000)])
    # y s + m: the mean of m is 0 and that of s (1 + 1.25) / 2; their variances add those of channel and value.
    expected_var = y.square() * (0.25**2 / 12 + 0.1**2) + 1 / 12 + 0.2**2 / 12
    errors = (many.mean(0) - y * 1.125) / (expected_var / 4000).sqrt()
    assert errors.abs().max() < 5  # standard errors
    torch.testing.assert_close(many.var(0), expected_var, rtol=0.15, atol=0)


@pytest.mark.parametrize(
    ("field", "value", "mean", "var", "of_the_channel"),
    [
        ("shift", 0.5, 0, 1 / 12, True),
        ("shift_spread", 0.1, 0, 0.2**2 / 12, False),
        ("scale", 1.25, 0.125, 0.25**2 / 12, True),
        ("scale_spread", 0.1, 0, 0.1**2, False),
    ],
)
def test_each_part_of_the_noise_is_that_of_the_channel_or_of_the_value(
    field: str, value: float, mean: float, var: float, of_the_channel: bool
) -> None:
    noisy, batch = made("noisy", **{**NO_NOISE, field: value}), made("noisy", **NO_NOISE)
    torch.manual_seed(0)
    x = numbers(4, 3, 5)
    y, many = batch(x).detach(), torch.stack([noisy(x) for _ in range(4000)]).detach()
    noise = (many - y) / (y if field.startswith("scale") else 1)
    torch.testing.assert_close(noise.mean(0), torch.full_like(y, mean), rtol=0, atol=5 * (var / 4000) ** 0.5)
    torch.testing.assert_close(noise.var(0), torch.full_like(y, var), rtol=0.15, atol=0)
    shared = noise[:, :1, :, :1].expand_as(noise)
    assert torch.allclose(noise, shared, atol=1e-9) == of_the_channel
    if not of_the_channel:
        assert torch.corrcoef(noise.flatten(1).T).fill_diagonal_(0).abs().max() < 0.1


@BY_SHAPE
def test_rms_norm_is_torchs_over_channels_and_positions(shape: tuple[int, ...]) -> None:
    rms, x = made("rms", eps=0.5), numbers(*shape).requires_grad_()
    expected = F.rms_norm(x, shape[1:], eps=0.5) * rms.weight.view(1, 3, *[1] * (len(shape) - 2))
    torch.testing.assert_close(rms(x), expected)
    if len(shape) == 2:
        torch.testing.assert_close(rms(x), F.rms_norm(x, (3,), rms.weight, 0.5))


@BY_SHAPE
def test_dynamic_tanh_is_its_formula_and_the_same_in_evaluation(shape: tuple[int, ...]) -> None:
    dyt, x = made("dyt", alpha=0.7), numbers(*shape)
    weight, bias = (each.view(1, 3, *[1] * (len(shape) - 2)) for each in (dyt.weight, dyt.bias))
    y = dyt(x)
    torch.testing.assert_close(y, weight * torch.tanh(0.7 * x) + bias, rtol=1e-6, atol=1e-6)  # alpha began in float32
    torch.testing.assert_close(dyt.eval()(x), y, rtol=0, atol=0)
    assert dyt.alpha.requires_grad


@BY_SHAPE
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("momentum", [0.3, None])
def test_ignoring_the_statistics_changes_the_gradient_alone(
    shape: tuple[int, ...], track: bool, momentum: float | None
) -> None:
    fields: dict[str, Any] = {"momentum": momentum, "track_running_stats": track}
    wrong, right = made("batch", backward="ignore_statistics", **fields), made("batch", **fields)
    for seed in range(3):
        x = numbers(*shape, seed=seed).requires_grad_()
        y = wrong(x)
        torch.testing.assert_close(y, right(x))
    (found,) = torch.autograd.grad(y, x, torch.ones_like(y))
    var = x.detach().var([0, *range(2, x.dim())], correction=0)
    slope = (wrong.weight / (var + 1e-5).sqrt()).view(1, 3, *[1] * (len(shape) - 2))
    torch.testing.assert_close(found, slope.expand(shape))  # the full gradient of a sum is 0
    torch.testing.assert_close(dict(wrong.state_dict()), dict(right.state_dict()))
    torch.testing.assert_close(wrong.eval()(x), right.eval()(x))


@pytest.mark.parametrize("training", [True, False])
def test_ignoring_the_statistics_takes_half_precision_vectors_and_an_empty_batch(training: bool) -> None:
    module, x = made("batch", **VARIANTS["batch"]).bfloat16().train(training), numbers(8, 3).bfloat16()
    exact = copy.deepcopy(module).double()(x.double())
    largest = float(exact.detach().abs().max())
    torch.testing.assert_close(module(x).double(), exact, rtol=0, atol=largest * torch.finfo(torch.bfloat16).eps)
    assert module(x[:0]).shape == (0, 3)


# --- what all have in common ------------------------------------------------------------------------------------------

OVER_BATCH = [kind for kind in VARIANTS if kind not in ("rms", "dyt")]


@pytest.mark.parametrize("kind", OVER_BATCH)
@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1)])
def test_one_value_per_channel_is_refused_in_training(kind: str, shape: tuple[int, ...]) -> None:
    module = made(kind, **VARIANTS[kind])
    with pytest.raises(ValueError, match=r"more than (1|one) value per channel"):
        module(torch.ones(shape, dtype=torch.float64))
    assert module.running_var.tolist() == [1, 1, 1]
    assert module.eval()(torch.ones(shape, dtype=torch.float64)).shape == shape


def test_frozen_norm_takes_one_value_per_channel_once_it_is_frozen() -> None:
    frozen, x = made("frozen", after=1), numbers(1, 3)
    frozen(numbers(4, 3))
    torch.testing.assert_close(frozen(x), copy.deepcopy(frozen).eval()(x))


# Renorm and ignored statistics take for constants what depends on the input.
@pytest.mark.parametrize("kind", [kind for kind in VARIANTS if kind not in ("renorm", "batch")])
@pytest.mark.parametrize("training", [True, False])
def test_second_derivatives_are_those_of_differences(kind: str, training: bool) -> None:
    module = made(kind, **VARIANTS[kind]).train(training)

    def call(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return copy.deepcopy(module)(x)

    assert torch.autograd.gradgradcheck(call, numbers(4, 3, 2).requires_grad_())


@pytest.mark.parametrize("kind", VARIANTS)
@pytest.mark.parametrize("training", [True, False])
def test_the_layout_of_the_output_is_that_of_the_input(kind: str, training: bool) -> None:
    for layout in (torch.contiguous_format, torch.channels_last):
        x = numbers(4, 3, 2, 5).contiguous(memory_format=layout)
        assert made(kind, **VARIANTS[kind]).train(training)(x).stride() == x.stride()


@pytest.mark.parametrize("kind", VARIANTS)
def test_a_saved_variant_goes_on_as_it_would_have(kind: str) -> None:
    first, second = made(kind, **VARIANTS[kind]), made(kind, **VARIANTS[kind])
    for seed in range(3):
        first(numbers(4, 3, 5, seed=seed))
    second.load_state_dict(first.state_dict())
    for seed in range(3, 6):
        outputs = []
        for module in (first, second):
            torch.manual_seed(seed)
            outputs.append(module(numbers(4, 3, 5, seed=seed)))
        assert torch.equal(*outputs)
    assert torch.equal(first.eval()(numbers(4, 3)), second.eval()(numbers(4, 3)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", VARIANTS)
def test_half_precision_keeps_statistics_in_float32(kind: str, training: bool) -> None:
    """Inputs of 300 with deviations of 8 would have squares beyond float16, and no variance left in bfloat16."""
    module = made(kind, **VARIANTS[kind]).float()
    x = 300 + 8 * torch.randn(64, 3, 4, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.bfloat16, torch.float16):
        rounded = x.to(dtype)
        results = []
        for each in (rounded, rounded.double()):
            copied = copy.deepcopy(module).train(training).to(torch.float64 if each.dtype == torch.float64 else None)
            torch.manual_seed(0)
            if kind == "noisy":
                copied.shift = copied.shift_spread = copied.scale_spread = 0.0
                copied.scale = 1.0
            results.append(copied(each).double())
        # The output's rounding: a unit of its largest value.
        largest = float(results[1].detach().abs().max())
        torch.testing.assert_close(*results, rtol=0, atol=largest * torch.finfo(dtype).eps)


@pytest.mark.parametrize("kind", VARIANTS)
def test_autocast_gives_what_the_same_input_gives_without_it(kind: str) -> None:
    module = made(kind, **VARIANTS[kind]).float()
    x = numbers(8, 3, 4).float().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(0)
        inside = copy.deepcopy(module)(x)
    torch.manual_seed(0)
    torch.testing.assert_close(inside, copy.deepcopy(module)(x))


@pytest.mark.parametrize("kind", [kind for kind in VARIANTS if kind != "batch"])
def test_convert_and_torchs_own_conversion_leave_the_variants_as_they_are(kind: str) -> None:
    model = nn.Sequential(made(kind, **VARIANTS[kind]), nn.ReLU(), nn.BatchNorm1d(3).double())
    variant = type(model[0])
    convert(model, "native")
    assert type(model[0]) is variant
    assert [line.name for line in model.bncli_conversion.norms] == ["2"]  # type: ignore[union-attr]
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(model)[0]) is variant


@pytest.mark.parametrize("kind", VARIANTS)
def test_a_training_step_compiles_into_one_graph(kind: str) -> None:
    module = made(kind, **VARIANTS[kind])
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    for seed in range(3):
        outputs = []
        for each in (module, compiled):
            torch.manual_seed(0)
            outputs.append(each(numbers(4, 3, 5, seed=seed)))
        torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("fields", [{"kind": kind, **fields} for kind, fields in VARIANTS.items()], ids=str)
def test_the_initial_weight_is_the_recipes(fields: dict[str, Any]) -> None:
    for affine in (True, False):
        module = factory(tiny(norm={**fields, "init_weight": 0.25, "affine": affine}).norm)(3)  # type: ignore[misc]
        assert (module.weight is not None) == affine
        assert not affine or module.weight.tolist() == [0.25] * 3  # type: ignore[operator, union-attr]


LEARNS = {**VARIANTS, "ghost": {"size": 10}, "renorm": {"warmup": 5, "r_steps": 20, "d_steps": 15},
          "frozen": {"after": 30}}  # fmt: skip


@pytest.mark.parametrize("kind", [kind for kind in LEARNS if kind != "batch"])
def test_a_net_with_each_variant_learns(kind: str) -> None:
    recipe = tiny(
        data={"source": "digits"},
        model={"kind": "mlp", "hidden": [64, 32]},
        norm={"kind": kind, **LEARNS[kind]},
        optimizer={"kind": "sgd", "lr": 0.1},
        train={"steps": 150, "batch_size": 60, "evaluate_every": 10, "target": {"value": 0.7}},
    )
    cpu = torch.device("cpu")
    *_, (_, last) = training_loop(TrainState(recipe, data.load(recipe.data, cpu, torch.contiguous_format), cpu))
    assert isinstance(last, RunFinished)
    assert last.result.status == "reached"
