"""Recorder: what the modules of a model receive and return in a forward pass, and in which order they run."""

from __future__ import annotations

from collections import Counter, defaultdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bncli.engine.models.init import stream
from bncli.names import NORMS

MOST_VALUES = 4096  # per unit, of all passes together
MOST_FEATURES = 1024  # of a covariance
NONLINEARITIES = (
    *(nn.Sigmoid, nn.Tanh, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.GELU, nn.SiLU, nn.ELU, nn.SELU, nn.CELU),
    *(nn.Softplus, nn.Mish, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish),
)
# By the names of their classes; torch's LocalResponseNorm divides by more than its input.
KEEP_SCALE = {"LocalResponseNorm", *(row.section for row in NORMS.values() if not row.cancels_scale)}
TORCH_NORMS = ("torch.nn.modules.batchnorm", "torch.nn.modules.instancenorm", "torch.nn.modules.normalization")


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm of bncli's or of torch's, or a subclass of one."""
    places = {kind.__module__ for kind in type(module).__mro__}
    return any(place in TORCH_NORMS or place.startswith("bncli.engine.models.") for place in places)


def cancels_scale(norm: nn.Module) -> bool:
    """Whether the scale of a norm's input has no effect: it has one on a norm that takes its running statistics."""
    running = not norm.training and getattr(norm, "running_mean", None) is not None
    return not running and KEEP_SCALE.isdisjoint(kind.__name__ for kind in type(norm).__mro__)


def weights_of(module: nn.Module) -> list[Tensor]:
    """A module's own parameters that are trained, without vectors (biases, and the weights of norms)."""
    return [each for each in module.parameters(recurse=False) if each.dim() > 1 and each.requires_grad]


def unit_values(tensor: Tensor, most: int, features_last: bool = False) -> Tensor:
    """A copy (m, units) in float32 or wider of (N, units, *S), or of (N, *S, units) where features are last.

    Of more than `most` examples and positions, `most` random ones, always the same for tensors of one shape.
    """
    values = tensor.detach()
    if values.dim() == 1:
        values = values.unsqueeze(1)
    values = values if features_last else values.movedim(1, -1)
    count = values[..., 0].numel()
    if count > most:
        places = torch.randint(count, (most,), generator=stream(0, "probe positions")).to(values.device)
        values = values[torch.unravel_index(places, values.shape[:-1])]
    wide = torch.promote_types(values.dtype, torch.float32)
    return values.to(wide, copy=True).reshape(-1, values.shape[-1])


class Recorder:
    """Hooks on a model that record its forward passes.

    A module that is called more than once in a pass counts as several: name, name:2, ...

    executed: name -> module with parameters of its own, in the order of the first execution.
    nonlinearities: name -> module. inputs: name -> a tensor (m, units) for each pass.
    normalized: name of a norm -> a tensor (m, features) for each pass: its output without its weight and bias, and
        without the features whose weight is 0.
    followed_by_norm: names of the layers whose output a norm received in which its scale has no effect.
    """

    def __init__(self, model: nn.Module, passes: int) -> None:
        self.executed: dict[str, nn.Module] = {}
        self.nonlinearities: dict[str, nn.Module] = {}
        self.inputs: dict[str, list[Tensor]] = defaultdict(list)
        self.normalized: dict[str, list[Tensor]] = defaultdict(list)
        self.followed_by_norm: set[str] = set()
        self._most = max(1, MOST_VALUES // passes)
        self.begin_pass()
        self._hooks = []
        for name, module in model.named_modules():
            before, after = module.register_forward_pre_hook, module.register_forward_hook
            if next(module.parameters(recurse=False), None) is not None:
                self._hooks.append(before(partial(self._executed, name)))
            if isinstance(module, NONLINEARITIES):
                self._hooks.append(before(partial(self._nonlinearity, name)))
            elif is_norm(module):
                self._hooks.append(before(self._before_norm))
                self._hooks.append(after(partial(self._after_norm, name), with_kwargs=True))
            elif weights_of(module):
                self._hooks.append(after(partial(self._after_layer, name)))

    def begin_pass(self) -> None:
        self._calls: Counter[str] = Counter()
        self._returned: dict[int, tuple[str, Any]] = {}  # an output that is kept keeps its id

    def remove(self) -> None:
        self._returned.clear()
        for hook in self._hooks:
            hook.remove()

    def _call(self, name: str) -> str:
        self._calls[name] += 1
        return name if self._calls[name] == 1 else f"{name}:{self._calls[name]}"

    def _executed(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.executed.setdefault(name, module)

    def _nonlinearity(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        call = self._call(name)
        self.nonlinearities[call] = module
        self.inputs[call].append(unit_values(args[0], self._most))

    def _before_norm(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and id(args[0]) in self._returned and cancels_scale(module):
            self.followed_by_norm.add(self._returned[id(args[0])][0])

    def _after_norm(self, name: str, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
        # A norm with a residual or an activation fused into it returns more than the normalized activations.
        if len(args) == 1 and not kwargs and getattr(module, "activation", None) is None:
            self.normalized[self._call(name)].append(_without_affine(module, output, self._most))

    def _after_layer(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._returned[id(output)] = (name, output)


def _without_affine(module: nn.Module, output: Tensor, most: int) -> Tensor:
    """The normalized activations (m, features) in a norm's output, at most MOST_FEATURES of them."""
    shape = getattr(module, "normalized_shape", None)  # of nn.LayerNorm and nn.RMSNorm
    if shape is not None:
        output = output.flatten(-len(shape))
    values = unit_values(output, most, shape is not None)
    weight, bias = (getattr(module, name, None) for name in ("weight", "bias"))
    features = torch.arange(values.shape[1], device=values.device)
    if weight is not None:
        features = features[weight.detach().flatten() != 0]
    features = features[:: -(-len(features) // MOST_FEATURES) or 1]
    values = values[:, features]
    if bias is not None:
        values = values - bias.detach().flatten()[features]
    return values if weight is None else values / weight.detach().flatten()[features]
