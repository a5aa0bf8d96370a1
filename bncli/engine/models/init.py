"""Initial weights of a model, and the random streams that they are drawn from."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bncli.recipe.sections import Init

Examples = Callable[[], Tensor]


def stream_seed(seed: int, name: str) -> int:
    """The seed of one independent stream of random numbers: `order`, `augment`, or a parameter's name."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1


def stream(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(stream_seed(seed, name))


def seed_global_generators(seed: int, device: torch.device | None = None) -> None:
    """Seed the global generators of torch, numpy (32 bits) and Python, which a user's model may draw from.

    device: the only one in use, where that is known; without an accelerator, torch.manual_seed takes ten times as long.
    """
    only_cpu = device is not None and device.type == "cpu"
    (torch.default_generator.manual_seed if only_cpu else torch.manual_seed)(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def global_generators(device: torch.device) -> dict[str, Any]:
    """The states of those generators and of the device's, as tensors and numbers."""
    _, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [torch.from_numpy(np.asarray(keys, np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "mps": torch.mps.get_rng_state() if device.type == "mps" else None,
    }


def restore_global_generators(states: dict[str, Any], device: torch.device) -> None:
    """Restore the states that `global_generators` returned."""
    keys, *rest = states["numpy"]
    random.setstate(states["python"])
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
    elif device.type == "mps":
        torch.mps.set_rng_state(states["mps"])


class SeparateDraws(TorchDispatchMode):
    """A context in which each random draw of torch has its own seed, so that no draw shifts the later ones.

    The seed of a draw depends on the seed of the run, the shape, and the number of earlier draws of that shape. For a
    vector (usually a bias) it depends on the last draw with more dimensions (usually its weight) and on the vectors of
    that shape since. Arms that draw the weights of each shape in the same order thus start with equal weights, even if
    one omits a bias or adds a norm. Other sources of a constructor (a file, its own generator, numpy, torch after its
    own torch.manual_seed) are unchanged.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed, self._ours = seed, torch.initial_seed()
        self._drawn: Counter[str] = Counter()
        self._weight = ""

    # Settings that torch reads, so that a constructor may do everything that it may do outside the mode.
    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Functions that the constructor compiles stay compiled."""
        return True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: the wrapper for True would import torch._dynamo, which takes a second."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tags = getattr(func, "tags", ())  # a higher-order operator has none
        draws = torch.Tag.nondeterministic_seeded in tags and kwargs.get("generator") is None
        if draws and torch.initial_seed() == self._ours:
            self._ours = stream_seed(self._seed, self._name(_drawn_shape(args)))
            torch.default_generator.manual_seed(self._ours)  # torch.manual_seed takes a tenth of a millisecond
            if torch.cuda.is_initialized():
                torch.cuda.manual_seed_all(self._ours)
        return func(*args, **kwargs)

    def _name(self, shape: tuple[int, ...]) -> str:
        is_weight = len(shape) > 1
        kind = f"own model {shape}" if is_weight else f"{self._weight} {shape}"
        self._drawn[kind] += 1
        name = f"{kind} {self._drawn[kind]}"
        if is_weight:
            self._weight = name
        return name


def _drawn_shape(args: tuple[Any, ...]) -> tuple[int, ...]:
    """The shape that a random operator draws with these arguments: that of a tensor, or a size."""
    tensors = [tuple(each.shape) for each in args if isinstance(each, Tensor)]
    sizes = [tuple(each) for each in args if isinstance(each, list | tuple)]
    return next(iter([*tensors, *sizes]), ())


def initialize(model: nn.Module, init: Init, seed: int, examples: Examples | None = None) -> None:
    """Set the weights of linear and convolution layers, in place; their biases become 0.

    gaussian: N(0, std^2). xavier: uniform, Glorot & Bengio 2010, equation 16. he: N(0, 2 / fan-in), He et al. 2015
    (arXiv 1502.01852). orthogonal: Saxe et al. 2013. lsuv: orthogonal, then unit output variance, Mishkin & Matas 2015.
    """
    fill: dict[str, Callable[..., Tensor]] = {
        "gaussian": partial(nn.init.normal_, std=init.std or 0.0),
        "xavier": nn.init.xavier_uniform_,
        "he": partial(nn.init.kaiming_normal_, nonlinearity="relu"),
        "orthogonal": nn.init.orthogonal_,
        "lsuv": nn.init.orthogonal_,
    }
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            fill[init.kind](module.weight, generator=stream(seed, f"{name}.weight"))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if init.kind == "lsuv":
        assert examples is not None
        _unit_variance(model, examples())


@torch.no_grad()
def _unit_variance(model: nn.Module, examples: Tensor, tolerance: float = 0.1, most: int = 10) -> None:
    """Scale each layer until its output's variance over a batch is within `tolerance` of 1 (arXiv 1511.06422)."""
    state = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for layer in [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]:
        seen: list[Tensor] = []
        hook = layer.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output))
        for _ in range(most):
            seen.clear()
            model(examples)
            deviation = seen[-1].std()
            if deviation == 0 or abs(deviation.item() ** 2 - 1) < tolerance:
                break
            layer.weight.div_(deviation)
        hook.remove()
    for name, buffer in model.named_buffers():  # undo the updates of running statistics above
        buffer.copy_(state[name])
