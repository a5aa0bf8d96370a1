"""Our batch norm module beside torch's, and the other norms by their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bncli.engine.norm import BatchNorm, factory
from bncli.errors import Unavailable
from bncli.kernels import native
from bncli.recipe.sections import BatchNorm as BatchNormSection
from bncli.recipe.sections import GroupNorm, InstanceNorm, LayerNorm, NoNorm

# What any kernel other than native goes through: the seam returns statistics, the module keeps the running ones.
ROUTES = ["native", native.batch_norm]


@pytest.mark.parametrize("route", ROUTES, ids=["native", "through the seam"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("affine", [True, False])
def test_training_and_evaluation_agree_with_nn_batchnorm(route: object, momentum: float | None, affine: bool) -> None:
    theirs = nn.BatchNorm1d(3, eps=1e-3, momentum=momentum, affine=affine)
    ours = BatchNorm(3, eps=1e-3, momentum=momentum, affine=affine, kernel=route)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        x = 3 * torch.randn(4, 3, generator=generator) + 5  # m = 4: m against m - 1 shows
        one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        upstream = torch.randn(4, 3, generator=generator)
        theirs(one).backward(upstream)
        ours(other).backward(upstream)
        torch.testing.assert_close(other.grad, one.grad)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, msg=name)
    theirs.eval(), ours.eval()
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("route", ROUTES, ids=["native", "through the seam"])
def test_without_running_statistics_evaluation_uses_the_batch(route: object) -> None:
    ours = BatchNorm(2, track_running_stats=False, kernel=route).eval()  # type: ignore[arg-type]
    y = ours(torch.randn(50, 2, 3) * 4 + 1)
    torch.testing.assert_close(y.mean((0, 2)), torch.zeros(2), atol=1e-5, rtol=0)
    assert not list(ours.buffers())


def test_state_dict_loads_into_nn_batchnorm() -> None:
    nn.BatchNorm2d(4).load_state_dict(BatchNorm(4).state_dict(), strict=True)


def test_running_variance_is_the_unbiased_one() -> None:
    norm = BatchNorm(1, momentum=1.0, kernel=native.batch_norm)
    x = torch.tensor([[1.0], [2.0], [4.0], [9.0]])
    norm(x)
    torch.testing.assert_close(norm.running_var, x.var(0, correction=1))


def test_layer_norm_of_vectors_is_nn_layernorm() -> None:
    make = factory(LayerNorm(kind="layer"))
    assert make is not None
    x = torch.randn(5, 12)
    torch.testing.assert_close(make(12)(x), nn.LayerNorm(12)(x))


def test_instance_norm_is_nn_instancenorm() -> None:
    make = factory(InstanceNorm(kind="instance", affine=False))
    assert make is not None
    x = torch.randn(5, 4, 6, 6)
    torch.testing.assert_close(make(4)(x), nn.InstanceNorm2d(4)(x))


@pytest.mark.parametrize("norm", [LayerNorm(kind="layer"), GroupNorm(kind="group", groups=2)])
def test_norms_without_a_batch_give_an_example_the_same_alone(norm: LayerNorm | GroupNorm) -> None:
    make = factory(norm)
    assert make is not None
    x = torch.randn(5, 4, 6, 6)
    torch.testing.assert_close(make(4)(x)[:1], make(4)(x[:1]))


def test_no_norm_makes_no_module() -> None:
    assert factory(NoNorm()) is None


def test_a_kernel_that_cannot_run_is_refused_before_anything_is_built() -> None:
    with pytest.raises(Unavailable):
        factory(BatchNormSection(kind="batch", kernel="fused"))


def test_an_input_without_channels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"takes \(N, C, \*S\)"):
        BatchNorm(3, kernel=native.batch_norm)(torch.zeros(3))
