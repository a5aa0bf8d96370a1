"""The native kernel behind the seam, held to the definition written out in float64."""

from __future__ import annotations

import pytest
import torch

from bncli import kernels
from bncli.errors import Unavailable
from bncli.kernels.native import batch_norm


def defined(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """Ioffe & Szegedy 2015, algorithm 1, for x (N, C, *S)."""
    around = [0, *range(2, x.dim())]
    shape = [1, -1] + [1] * (x.dim() - 2)
    mean = x.mean(around).view(shape)
    var = ((x - mean) ** 2).mean(around).view(shape)
    return weight.view(shape) * (x - mean) / torch.sqrt(var + eps) + bias.view(shape)


@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 7), (4, 3, 5, 2), (2, 3, 2, 3, 2)])
@pytest.mark.parametrize(("scale", "eps"), [(0.1, 1e-5), (3.0, 1e-5), (1.0, 0.5)])
def test_forward_is_algorithm_1_for_any_number_of_positions(shape: tuple[int, ...], scale: float, eps: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = scale * torch.randn(*shape, dtype=torch.float64, generator=generator) + 2
    weight, bias = torch.rand(2, 3, dtype=torch.float64, generator=generator)
    y, mean, var = batch_norm(x, weight, bias, eps)
    around = [0, *range(2, x.dim())]
    torch.testing.assert_close(y, defined(x, weight, bias, eps), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mean, x.mean(around))
    torch.testing.assert_close(var, x.var(around, correction=0))


def test_residual_is_added_before_the_activation() -> None:
    x, residual = torch.randn(2, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y, _, _ = batch_norm(x, None, None, 1e-5, residual, "relu")
    plain, _, _ = batch_norm(x, None, None, 1e-5)
    torch.testing.assert_close(y, torch.relu(plain + residual))


def test_gradients_reach_x_weight_bias_and_residual() -> None:
    generator = torch.Generator().manual_seed(2)
    x, residual = (torch.randn(4, 3, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(3, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda *given: batch_norm(given[0], given[1], given[2], 1e-3, given[3])[0],
                                    (x, weight, bias, residual))  # fmt: skip


def test_statistics_of_half_precision_are_kept_in_float32() -> None:
    _, mean, var = batch_norm(torch.randn(8, 2).to(torch.bfloat16), None, None, 1e-5)
    assert mean.dtype == var.dtype == torch.float32


def test_given_statistics_normalize_instead_of_the_batchs() -> None:
    x = torch.randn(4, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    mean, var = torch.tensor([[0.0, 1.0, -1.0], [1.0, 4.0, 0.25]], dtype=torch.float64)
    y, used_mean, used_var = batch_norm(x, None, None, 0.5, statistics=(mean, var))
    torch.testing.assert_close(y, (x - mean.view(1, 3, 1)) / torch.sqrt(var.view(1, 3, 1) + 0.5))
    assert used_mean is mean
    assert used_var is var


def test_a_kernel_that_nobody_wrote_is_refused_and_not_replaced() -> None:
    with pytest.raises(Unavailable, match="kernel bogus: expected one of native, fused") as error:
        kernels.get("bogus")
    assert error.value.exit_code == 3
