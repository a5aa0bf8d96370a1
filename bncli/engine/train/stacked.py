"""Models of one architecture, stacked into one that computes them all in one pass, and their optimizer.

Letters: R runs, N examples, C channels. Every parameter and buffer has a leading run axis. Inside, examples come last,
(R, C, N): a linear layer is one batched product with the weights as they are, and a batch norm torch's own over R*C
channels. In float32, on one thread of a CPU whose batched products have the bits of single ones, no bit of a run
depends on the others: each product, sum and loop below is over the values of one run. MKL's have them (AVX2, AVX-512)
where each run's values begin at a multiple of 16 bytes, as with a multiple of 4 examples; with 5 or 7 they can be an
ulp apart.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bncli.engine.models.norms import BatchNorm

GAP = 32  # values between two runs, so that no vectorized loop, which ends in scalar code, goes on into the next run


class Stacked(nn.Sequential):
    """(R, N, *shape) -> logits (R, N, classes); a state_dict like that of each model."""

    def forward(self, input: Tensor) -> Tensor:
        logits: Tensor = super().forward(input.flatten(2).transpose(1, 2))
        return logits.transpose(1, 2)

    def keep(self, kept: Tensor) -> None:
        """Keep the runs at those places of the run axis, of the buffers; the optimizer has the parameters."""
        for module in self.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer[kept])


class Linears(nn.Module):
    """(R, in, N) -> (R, out, N)."""

    def __init__(self, parts: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight, self.bias = parameters(parts, "weight"), parameters(parts, "bias")

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        return self.weight @ x if self.bias is None else torch.baddbmm(self.bias.unsqueeze(2), self.weight, x)


class BatchNorms(nn.Module):
    """(R, C, N) -> (R, C, N)."""

    def __init__(self, parts: Sequence[BatchNorm]) -> None:
        super().__init__()
        self.weight, self.bias = parameters(parts, "weight"), parameters(parts, "bias")
        self.momentum, self.eps = parts[0].momentum, parts[0].eps
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            held = [getattr(part, name) for part in parts]
            self.register_buffer(name, None if held[0] is None else torch.stack(held))

    def forward(self, x: Tensor) -> Tensor:
        *running, batches = self._buffers.values()
        if self.training and batches is not None:
            batches.add_(1)
        vectors: Any = [None if each is None else each.view(-1) for each in (*running, self.weight, self.bias)]
        options: Any = self.training or batches is None, self.momentum, self.eps
        return F.batch_norm(x.reshape(1, -1, x.shape[2]), *vectors, *options).view_as(x)


class Elementwise(nn.Module):
    """A function of every value of (R, C, N)."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.of_output, self.function, self.gradient = FUNCTIONS[type(parts[0])]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Elementwise.apply(x, self.of_output, self.function, self.gradient)
        return y


class _Elementwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, of_output: bool, function: Any, gradient: Any) -> Tensor:
        y: Tensor = function(x, out=_with_gaps(x))
        ctx.gradient = gradient
        ctx.save_for_backward(y if of_output else x)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.gradient(dy, *ctx.saved_tensors, grad_input=_with_gaps(dy)), None, None, None


def _with_gaps(x: Tensor) -> Tensor:
    """An empty tensor like (R, C, N) whose runs are GAP values apart."""
    channels, examples = x.shape[1:]
    return x.new_empty_strided(x.shape, (channels * examples + GAP, examples, 1))


def _gelu(x: Tensor, out: Tensor) -> Tensor:
    """x/2 (1 + erf(x/sqrt 2)). torch 2.13's own writes to other places of an `out` that has gaps."""
    return torch.erf(x * 0.5**0.5, out=out).add_(1).mul_(x).mul_(0.5)


aten = torch.ops.aten
# Of those whose vectorized and scalar code may round differently: whether the gradient is of the output, not the input.
FUNCTIONS: dict[type, tuple[bool, Any, Any]] = {
    nn.Sigmoid: (True, torch.sigmoid, aten.sigmoid_backward.grad_input),
    nn.Tanh: (True, torch.tanh, aten.tanh_backward.grad_input),
    nn.GELU: (False, _gelu, aten.gelu_backward.grad_input),
}
STACKED: dict[type, Callable[[Any], nn.Module]] = {
    nn.Flatten: lambda parts: nn.Identity(),
    nn.Linear: Linears,
    BatchNorm: BatchNorms,
    **dict.fromkeys((nn.ReLU, nn.LeakyReLU), lambda parts: parts[0]),
    **dict.fromkeys(FUNCTIONS, Elementwise),
}


def stack(models: Sequence[nn.Module], kind: type[nn.Sequential] = Stacked) -> nn.Sequential:
    """R models of one architecture, such as `recipe.batches` describes, as one; it has copies of their weights."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for name, first in models[0].named_children():
        parts: Any = [model.get_submodule(name) for model in models]
        layers[name] = stack(parts, nn.Sequential) if type(first) is nn.Sequential else STACKED[type(first)](parts)
    return kind(layers)


def parameters(parts: Sequence[nn.Module], name: str) -> nn.Parameter | None:
    """A parameter of R modules as one (R, *shape); None where they have none."""
    held = [getattr(part, name) for part in parts]
    return None if held[0] is None else nn.Parameter(torch.stack([each.detach() for each in held]))


def cross_entropy(logits: Tensor, y: Tensor, reduction: str = "mean", label_smoothing: float = 0.0) -> Tensor:
    """Of (N, classes), which is (); or of (R, N, classes), which is (R,): y is (N,), or (R, N)."""
    if logits.dim() == 2:
        return F.cross_entropy(logits, y, reduction=reduction, label_smoothing=label_smoothing)
    # Over the second axis of (R, classes, N) it takes a third of the time that it takes over a last one of 10 classes.
    across, y = logits.transpose(1, 2), y.expand(logits.shape[:2])
    each = F.cross_entropy(across, y, reduction="none", label_smoothing=label_smoothing)
    return each.mean(1) if reduction == "mean" else each.sum(1)
