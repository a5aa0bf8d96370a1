"""The statistics that the native kernel returns; its y is held to torch's in test_api."""

from __future__ import annotations

import torch

from bncli.kernels.native import batch_norm


def test_the_mean_and_the_biased_variance_of_the_batch_are_returned() -> None:
    x = 3 * torch.randn(4, 3, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 2
    _, mean, var = batch_norm(x.requires_grad_(), None, None, 1e-5)
    torch.testing.assert_close((mean, var), (x.mean((0, 2, 3)).detach(), x.var((0, 2, 3), correction=0).detach()))
    assert not mean.requires_grad
    assert not var.requires_grad


def test_statistics_of_half_precision_are_kept_in_float32() -> None:
    _, mean, var = batch_norm(torch.randn(8, 2).to(torch.bfloat16), None, None, 1e-5)
    assert mean.dtype == var.dtype == torch.float32


def test_given_statistics_normalize_instead_of_the_batchs_and_are_returned() -> None:
    x = torch.randn(4, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    mean, var = torch.tensor([[0.0, 1.0, -1.0], [1.0, 4.0, 0.25]], dtype=torch.float64)
    y, used_mean, used_var = batch_norm(x, None, None, 0.5, statistics=(mean, var))
    torch.testing.assert_close(y, (x - mean.view(1, 3, 1)) / torch.sqrt(var.view(1, 3, 1) + 0.5))
    assert used_mean is mean
    assert used_var is var
