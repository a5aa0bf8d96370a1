"""Whitening norms: groups of channels are decorrelated, not only scaled (Decorrelated Batch Norm and IterNorm).

Letters: C channels in G groups of k; m values per channel; g the gradient of the loss in a matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bncli.engine.models.variants import affine
from bncli.kernels.layout import accumulation, match_layout
from bncli.kernels.native import interpolate_
from bncli.kernels.synchronized import merged, ranks

# --- the inverse square root of a covariance --------------------------------------------------------------------------


def zca(covariance: Tensor, eps: float) -> Tensor:
    """(covariance + eps)^(-1/2), the symmetric whitening matrix (Huang et al. 2018, arXiv 1804.08450, equation 4).

    Any number of derivatives is finite, for equal eigenvalues too. A matrix with NaN or infinity gives NaN.

    Args:
        covariance: (G, k, k), symmetric, without negative eigenvalues but for rounding.
        eps: added to the eigenvalues.

    Returns:
        (G, k, k).
    """
    root: Tensor = _InverseRoot.apply(covariance, eps)[0]
    return root


class _InverseRoot(torch.autograd.Function):
    """S = (C + eps)^(-1/2) by eigenvectors; returns S, its eigenvalues and its eigenvectors.

    The derivative is not taken through the eigenvectors, in which 1 / (l_i - l_j) is infinite for equal eigenvalues.
    S C S = 1 and R = S^(-1) give R dS + dS R = -S dC S, so that dS and the gradient solve Sylvester equations, with
    divisors s_i + s_j > 0.
    """

    @staticmethod
    def forward(covariance: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        finite = covariance.isfinite().all(-1).all(-1)
        identity = torch.eye(covariance.size(-1), dtype=covariance.dtype, device=covariance.device)
        # LAPACK raises an exception for NaN, which a training run that diverges must not end in.
        values, vectors = torch.linalg.eigh(torch.where(finite[:, None, None], covariance, identity))
        roots = torch.where(finite[:, None], (values.clamp_min(0) + eps).rsqrt(), torch.nan)
        return (vectors * roots[:, None]) @ vectors.mT, roots, vectors

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Any) -> tuple[Tensor, None]:
        root, roots, vectors = ctx.saved_tensors
        solution: Tensor = _Sylvester.apply(root, root @ (g + g.mT) @ root / 2, roots, vectors)
        return -root @ solution @ root, None


class _Sylvester(torch.autograd.Function):
    """The symmetric X of A X + X A = B, for symmetric A with these eigenvalues and eigenvectors, and symmetric B."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, values: Tensor, vectors: Tensor) -> Tensor:
        divisors = values[:, :, None] + values[:, None]
        return vectors @ ((vectors.mT @ b @ vectors) / divisors) @ vectors.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor], output: Tensor) -> None:
        a, _, values, vectors = inputs
        ctx.save_for_backward(a, values, vectors, output)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None, None]:
        # A dX + dX A = dB - dA X - X dA, and the solution's operator is its own adjoint.
        a, values, vectors, x = ctx.saved_tensors
        of_b: Tensor = _Sylvester.apply(a, (g + g.mT) / 2, values, vectors)
        return -(of_b @ x + x @ of_b), of_b, None, None


def newton(covariance: Tensor, eps: float, iterations: int) -> Tensor:
    """An approximation of `zca` by Newton steps (Huang et al. 2019, arXiv 1904.03441, algorithm 1).

    With no step it is 1 / sqrt(trace): the group is scaled and not decorrelated. A group of one channel is exact.

    The paper's step is P = (3 P - P^3 S) / 2, whose rounding errors grow from step to step: with eigenvalues from 1 to
    100 the result is best after 10 steps and lost after 15. The coupled form (Higham 2008, Functions of Matrices,
    equation 6.35) has the same values and the same cost without that growth; it keeps S P, the inverse of P at the end.

    Args:
        covariance: (G, k, k), symmetric.
        eps: added to the diagonal.
        iterations: Newton steps.

    Returns:
        (G, k, k).
    """
    identity = torch.eye(covariance.size(-1), dtype=covariance.dtype, device=covariance.device)
    regular = covariance + eps * identity
    # The eigenvalues are divided by their sum, so that the steps converge.
    trace = regular.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    root, inverse = identity.expand_as(regular), regular / trace
    for _ in range(iterations):
        step = (3 * identity - root @ inverse) / 2
        root, inverse = step @ root, inverse @ step
    return root * trace.rsqrt()


# --- the module -------------------------------------------------------------------------------------------------------


class Whitening(nn.Module):
    """Batch norm that decorrelates the channels of a group, for any input (N, C, *S): xhat = W (x - mean).

    W is `zca` or `newton` of the group's covariance over N and S. In training mode mean and covariance are the batch's;
    in evaluation the running ones. A group of one channel is batch norm, in both modes.

    The papers average W itself. But the W of a batch is larger in the mean than that of all examples: after 2,000
    batches of 20 with groups of 10, the covariance of fresh outputs then differs from the identity by 0.86 (Frobenius
    norm over sqrt(k)), and by 0.02 with the W of an averaged covariance. So the covariance is averaged here, with batch
    norm's m / (m - 1).

    Args:
        channels: C.
        group_size: k, channels per group; divides C.
        eps: added to the diagonal of the covariance.
        momentum: weight of the new batch in the running statistics; None for a cumulative average.
        affine: with a weight and a bias per channel.
        iterations: Newton steps of IterNorm; None for the exact ZCA.
        sync: mean and covariance in training are those of all ranks of torch's default process group.

    Raises:
        ValueError: for a group size that does not divide C.
    """

    num_batches_tracked: Tensor
    running_mean: Tensor
    running_covariance: Tensor

    def __init__(
        self,
        channels: int,
        group_size: int = 4,
        eps: float = 1e-3,
        momentum: float | None = 0.1,
        affine: bool = True,
        iterations: int | None = None,
        sync: bool = False,
    ) -> None:
        super().__init__()
        if channels % group_size:
            raise ValueError(f"groups of {group_size} channels do not divide {channels} channels")
        self.channels, self.group_size, self.eps, self.momentum = channels, group_size, eps, momentum
        self.iterations, self.sync = iterations, sync
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None
        identity = torch.eye(group_size).expand(channels // group_size, group_size, group_size)
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_covariance", identity.clone())
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        """Whiten each group of channels.

        Args:
            x: (N, C, *S). Statistics are in float32, or float64 for float64, also under autocast.

        Returns:
            (N, C, *S), in the dtype and the layout of x.

        Raises:
            ValueError: for another number of channels, or in training for no more values per channel than channels per
                group, whose covariance has no inverse.
        """
        if x.dim() < 2 or x.size(1) != self.channels:
            raise ValueError(f"expected (N, {self.channels}, *S), got {tuple(x.shape)}")
        with torch.autocast(x.device.type, enabled=False):
            blocks = (self.channels // self.group_size, self.group_size, x.numel() // self.channels)  # (G, k, m)
            values = x.transpose(0, 1).reshape(blocks).to(accumulation(x))
            if self.training:
                mean, covariance = self._batch_statistics(values)
            else:
                mean, covariance = self.running_mean.view(-1, self.group_size, 1), self.running_covariance
            xhat = self._whitening_matrix(covariance).to(values.dtype) @ (values - mean.to(values.dtype))
            y = xhat.reshape(self.channels, x.size(0), *x.shape[2:]).transpose(0, 1)
            return match_layout(affine(y, self.weight, self.bias).to(x.dtype), x)

    def _batch_statistics(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (G, k, 1) and biased covariance (G, k, k) of (G, k, m); the running ones are updated."""
        m: Any = values.size(-1)
        mean = values.mean(-1, keepdim=True) if m else values.sum(-1, keepdim=True)
        centred = values - mean
        covariance = centred @ centred.mT / max(1, m)
        if self.sync and ranks() > 1:
            mean, covariance, m = merged(mean, covariance, values.size(-1))
        if values.size(-1) <= self.group_size and m <= self.group_size:
            raise ValueError(
                f"expected more than {self.group_size} values per channel when training with {self.group_size} "
                f"channels per group, got {int(m)}: their covariance has no inverse"
            )
        with torch.no_grad():
            self.num_batches_tracked += 1
            wide = torch.promote_types(self.running_mean.dtype, values.dtype)
            share = self.num_batches_tracked.to(wide).reciprocal() if self.momentum is None else self.momentum
            interpolate_(self.running_mean, mean.flatten(), share)
            interpolate_(self.running_covariance, covariance * (m / (m - 1)), share)
        return mean, covariance

    def _whitening_matrix(self, covariance: Tensor) -> Tensor:
        # Small matrices, so float64 costs little: in float32, small eigenvalues would lose digits to the largest.
        # Metal has no float64.
        wide = covariance if covariance.device.type == "mps" else covariance.double()
        return zca(wide, self.eps) if self.iterations is None else newton(wide, self.eps, self.iterations)

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        names = ("group_size", "eps", "momentum", "iterations", *["sync"] * self.sync)
        return ", ".join([str(self.channels), *(f"{name}={getattr(self, name)}" for name in names)])
