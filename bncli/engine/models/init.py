"""Initial weights of a model, and the streams of random numbers that they are drawn from."""

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


def seed_global_generators(seed: int) -> None:
    """Those that a model of the user's own may draw from: torch's, numpy's (of 32 bits) and Python's."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def global_generators(device: torch.device) -> dict[str, Any]:
    """The states of the generators above and of the device's, as tensors and numbers."""
    _, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [torch.from_numpy(np.asarray(keys, np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "mps": torch.mps.get_rng_state() if device.type == "mps" else None,
    }


def restore_global_generators(states: dict[str, Any], device: torch.device) -> None:
    """Set them as they were when `global_generators` was called."""
    keys, *rest = states["numpy"]
    random.setstate(states["python"])
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
    elif device.type == "mps":
        torch.mps.set_rng_state(states["mps"])


class SeparateDraws(TorchDispatchMode):
    """A context in which each of torch's random draws is seeded for itself, so that none shifts those after it.

    The seed of a draw is that of the run, the drawn shape, and how many draws of that shape came before. For a vector,
    mostly a bias, it is the last draw of more dimensions, mostly its weight, and the vectors of that shape since. So
    arms that draw their weights of each shape in the same order begin alike, also where one leaves out a bias or adds a
    norm. What a constructor does with the numbers, and what it takes from elsewhere (a file, a generator of its own,
    numpy, torch after a torch.manual_seed of its own), is left alone.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed, self._ours = seed, torch.initial_seed()
        self._drawn: Counter[str] = Counter()
        self._weight = ""

    # What torch asks of a mode, so that a constructor may do all that it may do outside one.
    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """A compiled function that the constructor runs is compiled."""
        return True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """The wrapper that a True would add imports torch._dynamo, which takes a second."""
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
    """The shape that a random operator of these arguments draws: a tensor's, or the size given."""
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
    for name, buffer in model.named_buffers():  # the passes above must not count as batches
        buffer.copy_(state[name])
