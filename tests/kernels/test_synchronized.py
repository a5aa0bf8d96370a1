"""Batch statistics over ranks: what one process makes of the joined batch, with unequal parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

import bncli
from bncli.engine.models.whitening import Whitening
from tests.ranks import Group, group

PARTS = {2: (5, 2), 3: (1, 6, 0)}  # examples of each rank
SHAPES = {2: (7, 4, 3, 2), 3: (7, 4)}


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest) -> Iterator[Group]:
    with group(request.param) as made:
        yield made


def inputs(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """x far from zero, a residual, and weights of the outputs in the loss."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    return 3 * drawn[0] + 10, drawn[1], drawn[2]


def assert_close(value: Tensor, expected: Tensor, name: str) -> None:
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12, msg=lambda text: f"{name}: {text}")


def own_part(x: Tensor, parts: tuple[int, ...] | None) -> Tensor:
    return x if parts is None else x.split(parts)[distributed.get_rank()]


def trained(module: nn.Module, shape: tuple[int, ...], parts: tuple[int, ...] | None) -> dict[str, Any]:
    """Outputs, gradients and buffers after two calls of a module in training."""
    parameters = dict(module.double().train().named_parameters())
    for number, vector in enumerate(parameters.values()):
        nn.init.normal_(vector, generator=torch.Generator().manual_seed(number))
    has_residual = isinstance(module, bncli.BatchNorm)
    found: dict[str, Any] = {}
    for call in range(2):
        x, residual, loss_weights = (own_part(each, parts) for each in inputs(*shape))
        x, residual = (x * (call + 1)).requires_grad_(), residual.clone().requires_grad_()
        y = module(x, residual, "silu") if has_residual else module(x)
        (y * y.sin() * loss_weights).sum().backward()
        found |= {f"{call} y": y.detach(), f"{call} dx": x.grad, f"{call} dresidual": residual.grad}
    gradients = {f"d{name}": each.grad for name, each in parameters.items()}
    if parts is not None:
        for gradient in gradients.values():
            distributed.all_reduce(gradient)
    return found | gradients | {name: each.clone() for name, each in module.named_buffers()}


MODULES = {
    "native": lambda sync: bncli.BatchNorm(4, sync=sync),
    "fused": lambda sync: bncli.BatchNorm(4, kernel="fused", sync=sync),
    "no vectors": lambda sync: bncli.BatchNorm(4, affine=False, kernel="fused", sync=sync),
    "no bias": lambda sync: bncli.BatchNorm(4, bias=False, sync=sync),
    "cumulative": lambda sync: bncli.BatchNorm(4, momentum=None, sync=sync),
    "untracked": lambda sync: bncli.BatchNorm(4, track_running_stats=False, sync=sync),
    "whiten": lambda sync: Whitening(4, 2, sync=sync),
    "iternorm": lambda sync: Whitening(4, 4, iterations=5, sync=sync),
}


def made(kind: str, sync: bool, shape: tuple[int, ...], parts: tuple[int, ...] | None) -> dict[str, Any]:
    return trained(MODULES[kind](sync), shape, parts)


@pytest.mark.parametrize("kind", MODULES)
def test_outputs_gradients_and_buffers_are_those_of_the_joined_batch(ranks: Group, kind: str) -> None:
    count = len(ranks.pipes)
    whole = made(kind, False, SHAPES[count], None)
    by_rank = ranks(made, kind, True, SHAPES[count], PARTS[count])
    for name, expected in whole.items():
        values = [each[name] for each in by_rank]
        if name[0].isdigit() and expected is not None:
            values, expected = [torch.cat(values)], expected
        for value in values:
            if expected is None:
                assert value is None
            else:
                assert_close(value, expected, name)


class Net(nn.Module):
    """Convolutions with a residual add and activations that the fused kernel takes along."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), norm(4), nn.ReLU(), nn.Conv2d(4, 4, 1), norm(4))
        self.head = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.body(x))
        return found


def net_trained(norm: type[nn.Module], options: dict[str, Any] | None, parts: tuple[int, ...] | None) -> dict[str, Any]:
    torch.manual_seed(0)
    net = Net(norm)
    return trained(net if options is None else bncli.convert(net, **options), (7, 3, 4, 4), parts)


@pytest.mark.parametrize("kernel", ["native", "fused"])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_a_converted_model_trains_as_on_the_joined_batch(ranks: Group, norm: type[nn.Module], kernel: str) -> None:
    whole = net_trained(nn.BatchNorm2d, None, None)
    by_rank = ranks(net_trained, norm, {"kernel": kernel, "sync": True}, PARTS[len(ranks.pipes)])
    for name, expected in whole.items():
        if name[0].isdigit():
            continue
        for each in by_rank:
            assert_close(each[name], expected, name)


def second_derivative(sync: bool, parts: tuple[int, ...] | None) -> Tensor:
    x, _, loss_weights = (own_part(each, parts) for each in inputs(7, 4))
    x.requires_grad_()
    y = bncli.batch_norm(x, None, None, training=True, sync=sync)
    (dx,) = torch.autograd.grad((y * y.sin() * loss_weights).sum(), x, create_graph=True)
    return torch.autograd.grad(dx.square().sum(), x)[0]


def test_second_derivatives_are_those_of_the_joined_batch(ranks: Group) -> None:
    by_rank = ranks(second_derivative, True, PARTS[len(ranks.pipes)])
    torch.testing.assert_close(torch.cat(by_rank), second_derivative(False, None), rtol=1e-10, atol=1e-10)


def far_from_zero(kernel: str, parts: tuple[int, ...] | None) -> Tensor:
    x = own_part((inputs(7, 4)[0] + 1e4).float(), parts)
    return bncli.batch_norm(x, None, None, training=True, kernel=kernel, sync=True)


def test_a_large_mean_costs_no_digits(ranks: Group) -> None:
    x = (inputs(7, 4)[0] + 1e4).float().double()
    for kernel in ("native", "fused"):
        y = torch.cat(ranks(far_from_zero, kernel, PARTS[len(ranks.pipes)]))
        torch.testing.assert_close(y.double(), bncli.batch_norm(x, None, None, training=True), rtol=0, atol=5e-4)


def one_value() -> str:
    x = torch.ones(int(distributed.get_rank() == 0), 4)
    with pytest.raises(ValueError, match="more than one value per channel over all ranks") as refused:
        bncli.batch_norm(x, None, None, training=True, sync=True)
    return str(refused.value)


def test_one_value_on_all_ranks_together_has_no_variance(ranks: Group) -> None:
    assert "(1, 4)" in ranks(one_value)[0]


def test_without_a_group_the_batch_is_this_processs_own() -> None:
    x, _, _ = inputs(7, 4)
    assert torch.equal(*(bncli.batch_norm(x, None, None, training=True, sync=sync) for sync in (False, True)))
    left = bncli.convert(nn.Sequential(nn.SyncBatchNorm(3)), "native").bncli_conversion.norms[0]
    assert left.operation is None
