"""The recipe's model: modules made from its layers, with their initial weights."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bncli import kernels
from bncli.engine.models import variants
from bncli.engine.models.init import Examples, SeparateDraws, initialize, seed_global_generators, stream_seed
from bncli.engine.models.norms import BatchNorm, LayerNormOverChannels, ignoring_statistics
from bncli.engine.models.whitening import Whitening
from bncli.engine.user_code import blame_user_code, imported
from bncli.errors import RecipeError
from bncli.names import ACTIVATIONS
from bncli.recipe import layers as plan
from bncli.recipe import sections
from bncli.recipe.sections import NormSection, OwnModel, Recipe

NormFactory = Callable[[int], nn.Module]  # channels -> a module for inputs (N, channels, *S)


class Residual(nn.Module):
    """activation(body(x) + shortcut(x)) (He et al. 2015, equation 1)."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut, self.activation = body, shortcut, activation

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.activation(self.body(x) + self.shortcut(x))
        return y


class Branches(nn.ModuleDict):
    """(N, C, H, W) -> the outputs of all modules, concatenated along the channels."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.values()], dim=1)


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

    The weights of a layer depend only on the seed and the layer's name, so arms whose shapes agree have equal initial
    weights; for a user's model see `SeparateDraws`. `examples` returns a batch (N, *shape) for lsuv. Raises RecipeError
    if a user's model cannot be built, Unavailable if the norm's kernel cannot run on `device`, where the model will be
    (None: on any device here).
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
    seed_global_generators(stream_seed(recipe.train.seed, "forward"))  # that dropout and noisy batch norm draw from
    initialize(model, recipe.model.init, recipe.train.seed, examples)
    return model


def blame_own_model(recipe: Recipe) -> AbstractContextManager[None]:
    """A context in which an exception of a user's model becomes RunFailed; those of other models pass unchanged."""
    if not isinstance(recipe.model, OwnModel):
        return nullcontext()
    contract = "It takes batches (N, *shape) and returns logits (N, classes)"
    return blame_user_code(f"model.module: {recipe.model.module}", contract)


def factory(norm: NormSection, device: torch.device | None = None) -> NormFactory | None:
    """A maker of norm modules for `channels`, or None for no norm. Raises Unavailable for a kernel that cannot run."""
    if isinstance(norm, sections.NoNorm):
        return None
    make = _module_of(norm, device)

    def with_initial_weight(channels: int) -> nn.Module:
        module = make(channels)
        if isinstance(module.weight, Tensor):
            nn.init.constant_(module.weight, norm.init_weight)
        return module

    return with_initial_weight


VARIANTS: dict[type, Callable[..., nn.Module]] = {
    sections.Whiten: Whitening,
    sections.IterNorm: Whitening,
    sections.GhostBatchNorm: variants.GhostBatchNorm,
    sections.BatchRenorm: variants.BatchRenorm,
    sections.NoisyBatchNorm: variants.NoisyBatchNorm,
    sections.FrozenBatchNorm: variants.FrozenBatchNorm,
    sections.RMSNorm: variants.RMSNorm,
    sections.DynamicTanh: variants.DynamicTanh,
}


def _module_of(norm: Any, device: torch.device | None) -> NormFactory:
    options = norm.model_dump(exclude={"kind", "init_weight", "backward"})
    if type(norm) in VARIANTS:
        return partial(VARIANTS[type(norm)], **options)
    if isinstance(norm, sections.BatchNorm):
        kernels.get(norm.kernel, device)
        wrong = {"kernel": ignoring_statistics} if norm.backward == "ignore_statistics" else {}
        return partial(BatchNorm, **options | wrong)
    if isinstance(norm, sections.LayerNorm):
        return partial(LayerNormOverChannels, eps=norm.eps, affine=norm.affine)
    # Instance norm is group norm with one group per channel.
    groups = norm.groups if isinstance(norm, sections.GroupNorm) else None
    return lambda channels: nn.GroupNorm(groups or channels, channels, norm.eps, norm.affine)


def _module(layer: plan.Layer, norm: NormFactory | None, activation: Callable[[], nn.Module]) -> nn.Module:
    if isinstance(layer, plan.Sequence):
        return nn.Sequential(OrderedDict((name, _module(part, norm, activation)) for name, part in layer.layers))
    if isinstance(layer, plan.Branches):
        return Branches({name: _module(part, norm, activation) for name, part in layer.layers})
    if isinstance(layer, plan.Residual):
        body, shortcut = _module(layer.body, norm, activation), _module(layer.shortcut, norm, activation)
        return Residual(body, shortcut, activation())
    if isinstance(layer, plan.Linear):
        return nn.Linear(layer.inputs, layer.outputs, layer.bias)
    if isinstance(layer, plan.Conv):
        sizes = layer.inputs, layer.outputs, layer.kernel, layer.stride, layer.kernel // 2
        return nn.Conv2d(*sizes, groups=layer.groups, bias=layer.bias)
    if isinstance(layer, plan.Norm):
        assert norm is not None
        made = norm(layer.channels)
        if layer.zero_weight:
            nn.init.zeros_(made.weight)  # type: ignore[arg-type]
        return made
    if isinstance(layer, plan.Dropout):
        return nn.Dropout(layer.probability)
    if isinstance(layer, plan.MaxPool):
        return nn.MaxPool2d(layer.kernel, layer.stride, layer.padding)
    if isinstance(layer, plan.AveragePool):
        return nn.AvgPool2d(layer.kernel, layer.stride, layer.padding)
    return GlobalAverage() if isinstance(layer, plan.GlobalAverage) else activation()


def _own(section: OwnModel, shape: tuple[int, ...], classes: int, norm: NormFactory | None, seed: int) -> nn.Module:
    where = f"model.module: {section.module}"
    try:
        function = imported(section.module)
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"{where}: {error}; searched: the current folder, the recipe's, the environment") from error
    contract = (
        f"It is called with shape={shape}, classes={classes}, norm= a function of the channels that returns the norm "
        "module (or None), and model.arguments"
    )
    asked = list[int]()  # the channels of each norm

    def counted(channels: int) -> nn.Module:
        assert norm is not None
        asked.append(channels)
        return norm(channels)

    seed_global_generators(stream_seed(seed, "own model"))
    with blame_user_code(where, contract, RecipeError), SeparateDraws(seed):
        model = function(shape=shape, classes=classes, norm=norm and counted, **section.arguments)
    if not isinstance(model, nn.Module):
        returned = "nothing (None)" if model is None else f"a {type(model).__name__}"
        raise RecipeError(f"{where} returned {returned}; expected a torch.nn.Module")
    if norm is not None and not asked:
        raise RecipeError(
            f"{where} never called norm, so the recipe's norm has no effect; call it, or write norm: none"
        )
    seed_global_generators(stream_seed(seed, "own model's forward"))  # whatever the constructor drew
    return model
