"""What happens to examples before a model sees them: normalisation, layout, augmentation.

N examples, B examples of a batch, C channels, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Conversion:
    """From stored examples to what a model takes: bytes become float32 by (x - mean) / std, images get their layout."""

    mean: Tensor  # (C, 1, 1), in units of the stored values
    std: Tensor
    memory_format: torch.memory_format = torch.contiguous_format

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype == torch.uint8:
            return x.to(torch.float32, memory_format=self.memory_format).sub_(self.mean).div_(self.std)
        return x.contiguous(memory_format=self.memory_format)


def normalisation(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Mean and deviation by which (x - mean) / std is the normalised x: (C, 1, 1) for images, (features,) for vectors.

    `unit` brings bytes to 0..1 and leaves floats as they are. `standard` is over the examples of x and, in images, the
    positions; the deviation of a constant feature is 1, so that it ends as 0.
    """
    size = (x.shape[1], 1, 1) if x.dim() == 4 else (x.shape[1],)
    if kind == "unit":
        return torch.zeros(size), torch.full(size, 255.0 if x.dtype == torch.uint8 else 1.0)
    if x.dtype == torch.uint8:
        return byte_statistics(byte_counts(x))
    around = (0, 2, 3) if x.dim() == 4 else (0,)
    variance, mean = torch.var_mean(x.double(), dim=around, correction=0)
    low, high = x.amin(around), x.amax(around)
    mean = torch.where(low == high, low, mean)  # the rounded mean of equal values need not be that value
    std = torch.where(low == high, 1.0, variance.sqrt())
    return mean.float().view(size), std.float().view(size)


def byte_counts(x: Tensor) -> Tensor:
    """How often each value occurs in each channel of x (N, C, H, W) uint8: (C, 256) int64. Counts of parts add up."""
    return torch.stack([torch.bincount(x[:, channel].flatten(), minlength=256) for channel in range(x.shape[1])])


def byte_statistics(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (C, 1, 1) of the bytes counted in (C, 256); the deviation of a constant channel is 1."""
    values, share = torch.arange(256.0, dtype=torch.float64), counts.double() / counts.sum(1, keepdim=True)
    mean = (share * values).sum(1, keepdim=True)
    std = (share * (values - mean) ** 2).sum(1, keepdim=True).sqrt()
    std = torch.where((counts > 0).sum(1, keepdim=True) == 1, 1.0, std)
    return mean.float().unsqueeze(2), std.float().unsqueeze(2)


def crop_flip(x: Tensor, generator: Generator | None) -> Tensor:
    """Each image of x (B, C, H, W) moved by up to H // 8 pixels each way, zeros moving in, and mirrored by a coin.

    He et al. 2015 (arXiv 1512.03385), section 4.2. One draw for the batch, from `generator` on its own device.
    """
    batch, _, height, width = x.shape
    margin, origin = height // 8, torch.device("cpu") if generator is None else generator.device
    draw = torch.rand(3, batch, 1, generator=generator, device=origin)
    draw = send(draw, x.device)
    top, left = (draw[:2] * (2 * margin + 1)).long()
    rows, columns = (torch.arange(size, device=x.device) for size in (height, width))
    columns = torch.where(draw[2] < 0.5, columns.flip(0), columns)
    example = torch.arange(batch, device=x.device)[:, None, None]
    padded = pad(x, (margin, margin, margin, margin))
    moved = padded[example, :, (top + rows)[:, :, None], (left + columns)[:, None, :]]  # (B, H, W, C)
    return moved.permute(0, 3, 1, 2).contiguous()


def send(x: Tensor, device: torch.device | str) -> Tensor:
    """x on the device; to a GPU by way of pinned memory, so that the host does not wait for the copy."""
    if torch.device(device).type == "cuda" and not x.is_cuda:
        x = x.pin_memory()
    return x.to(device, non_blocking=True)
