"""Modules from an architecture's layers, and their initial weights."""

from __future__ import annotations

import hashlib
import random
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bncli import kernels
from bncli.engine.models.norms import BatchNorm, LayerNormOverChannels
from bncli.engine.user_code import imported
from bncli.errors import RecipeError
from bncli.names import ACTIVATIONS
from bncli.recipe import layers as plan
from bncli.recipe import sections
from bncli.recipe.sections import Init, NormSection, OwnModel, Recipe

Examples = Callable[[], Tensor]
NormFactory = Callable[[int], nn.Module]  # channels -> a module for inputs (N, channels, *S)


class Residual(nn.Module):
    """activation(body(x) + shortcut(x)) (He et al. 2015, equation 1)."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut, self.activation = body, shortcut, activation

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.activation(self.body(x) + self.shortcut(x))
        return y


class GlobalAverage(nn.Module):
    """(N, C, H, W) -> (N, C)"""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


def build(
    recipe: Recipe,
    shape: tuple[int, ...],
    classes: int,
    examples: Examples | None = None,
    device: torch.device | None = None,
) -> nn.Module:
    """The recipe's model on the CPU with its initial weights, for inputs (N, *shape) and `classes` logits.

    The weights of a layer depend on the seed and the layer's name alone, so arms whose shapes agree begin alike; for a
    model of the user's own see `SeparateDraws`. `examples` gives a batch (N, *shape) when lsuv asks for it. Raises
    RecipeError for a model of the user's own that cannot be made, Unavailable for a norm's kernel that cannot run on
    `device`, where the model will be (None: anywhere here).
    """
    norm = factory(recipe.norm, device)
    if isinstance(recipe.model, OwnModel):
        return _own(recipe.model, shape, classes, norm, recipe.train.seed)
    layers = plan.layers(recipe, shape, classes)
    assert layers is not None
    activation = getattr(nn, ACTIVATIONS[recipe.model.activation].module)
    model = _module(layers, norm, activation)
    if len(shape) == 3 and recipe.model.kind == "mlp":
        model = nn.Sequential(OrderedDict([("flatten", nn.Flatten()), *model.named_children()]))
    initialise(model, recipe.model.init, recipe.train.seed, examples)
    if isinstance(recipe.norm, sections.BatchNorm) and recipe.norm.kernel != "native":
        from bncli.engine.convert import convert  # which loads torch.fx

        convert(model, recipe.norm.kernel)  # the activations and residual adds that follow join the kernel
    return model


def factory(norm: NormSection, device: torch.device | None = None) -> NormFactory | None:
    """A maker of norm modules for `channels`, or None for no norm. Raises Unavailable for a kernel that cannot run."""
    if isinstance(norm, sections.BatchNorm):
        kernels.get(norm.kernel, device)
        arguments = norm.model_dump(exclude={"kind"})
        return lambda channels: BatchNorm(channels, **arguments)
    if isinstance(norm, sections.LayerNorm):
        return lambda channels: LayerNormOverChannels(channels, norm.eps, norm.affine)
    if isinstance(norm, sections.GroupNorm):
        return lambda channels: nn.GroupNorm(norm.groups, channels, norm.eps, norm.affine)
    if isinstance(norm, sections.InstanceNorm):  # of its own group each channel: one class for any number of positions
        return lambda channels: nn.GroupNorm(channels, channels, norm.eps, norm.affine)
    return None


def _module(layer: plan.Layer, norm: NormFactory | None, activation: Callable[[], nn.Module]) -> nn.Module:
    if isinstance(layer, plan.Sequence):
        return nn.Sequential(OrderedDict((name, _module(part, norm, activation)) for name, part in layer.layers))
    if isinstance(layer, plan.Residual):
        body, shortcut = _module(layer.body, norm, activation), _module(layer.shortcut, norm, activation)
        return Residual(body, shortcut, activation())
    if isinstance(layer, plan.Linear):
        return nn.Linear(layer.inputs, layer.outputs, layer.bias)
    if isinstance(layer, plan.Conv):
        padding = layer.kernel // 2
        return nn.Conv2d(layer.inputs, layer.outputs, layer.kernel, layer.stride, padding, bias=layer.bias)
    if isinstance(layer, plan.Norm):
        assert norm is not None
        return norm(layer.channels)
    if isinstance(layer, plan.MaxPool):
        return nn.MaxPool2d(layer.kernel, layer.stride, layer.padding)
    return GlobalAverage() if isinstance(layer, plan.GlobalAverage) else activation()


def _own(section: OwnModel, shape: tuple[int, ...], classes: int, norm: NormFactory | None, seed: int) -> nn.Module:
    where = f"model.module: {section.module}"
    try:
        function = imported(section.module)
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"{where}: {error}; it is looked for in the current folder and the environment") from error
    seed_global_generators(stream_seed(seed, "own model"))
    try:
        with SeparateDraws(seed):
            model = function(shape=shape, classes=classes, norm=norm, **section.arguments)
    except Exception as error:
        raise RecipeError(
            f"{where} raised {type(error).__name__}: {error}. It is called with shape={shape}, classes={classes}, "
            "norm= a function of the channels that makes the norm module (or None), and model.arguments"
        ) from error
    if not isinstance(model, nn.Module):
        raise RecipeError(f"{where} returned a {type(model).__name__}; expected a torch.nn.Module")
    seed_global_generators(stream_seed(seed, "own model's forward"))  # whatever the constructor drew
    return model


# --- initial weights ----------------------------------------------------------------------------------------------


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


def initialise(model: nn.Module, init: Init, seed: int, examples: Examples | None = None) -> None:
    """Set the weights of linear and convolution layers, in place; their biases become 0.

    gaussian: N(0, std^2). xavier: uniform, Glorot & Bengio 2010, equation 16. he: N(0, 2 / fan-in), He et al. 2015
    (arXiv 1502.01852). orthogonal: Saxe et al. 2013. lsuv: orthogonal, then unit output variance, Mishkin & Matas 2015.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            generator = stream(seed, f"{name}.weight")
            if init.kind == "gaussian":
                assert init.std is not None
                nn.init.normal_(module.weight, 0.0, init.std, generator=generator)
            elif init.kind == "xavier":
                nn.init.xavier_uniform_(module.weight, generator=generator)
            elif init.kind == "he":
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            else:
                nn.init.orthogonal_(module.weight, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if init.kind == "lsuv":
        if examples is None:
            raise ValueError("lsuv needs a batch of examples")
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
