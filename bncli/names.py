"""Names of kernels, norms and activations: one table each, from which the recipe's schema, the command line's choices,
the modules and the checks are read. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from bncli.errors import CODE_OF_YOURS, UsageError

# --- kernels ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """A batch norm kernel. A recipe, gradcheck and profile each take some of them by name."""

    name: str
    help: str
    module: str = ""  # with its batch_norm and unavailable_reason; empty for those that only profile knows
    devices: tuple[str, ...] = ()  # torch's device types that it is written for; empty: all of them
    in_recipe: bool = False
    in_profile: bool = False


# --- norms ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Norm:
    """A normalization of (N, C, *S), described by the values that share a mean."""

    name: str
    section: str  # class of bncli.recipe.sections
    over_batch: bool  # a mean is taken over all N examples, and evaluation uses running statistics
    channel_groups: Literal["one", "given", "every"]  # the groups of channels that a mean is taken over
    has_kernels: bool = False  # bncli has kernels of its own for it; else torch's operator alone

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes whose results differ."""
        return ("train", "eval") if self.over_batch else ("train",)

    def groups(self, channels: int, given: int) -> int:
        """Into how many groups the channels are divided. given: the number of a norm that takes one."""
        return {"one": 1, "given": given, "every": channels}[self.channel_groups]

    def values_per_mean(self, shape: Sequence[int], given: int) -> int:
        """m: how many values of (N, C, *S) one mean is taken over."""
        examples, channels, *positions = shape
        return (examples if self.over_batch else 1) * (channels // self.groups(channels, given)) * math.prod(positions)


# --- activations ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Activation:
    """An activation function, by its name in torch.nn.functional."""

    name: str
    module: str  # class of torch.nn
    in_recipe: bool = False
    fused: bool = False  # kernels apply it after the norm
    kinked: bool = False  # its derivative is a step at 0, and known from the sign of the input
    slope: float | None = None  # of negative inputs, where it is a parameter; kernels take this one alone


# --- the tables -------------------------------------------------------------------------------------------------------

_KERNELS = (
    Kernel("native", "torch's own", "bncli.kernels.native", in_recipe=True, in_profile=True),
    Kernel("fused", "ours", "bncli.kernels.fused", ("cpu", "cuda"), in_recipe=True, in_profile=True),
    Kernel("fused-interpreted", "the GPU's, in Triton's interpreter", "bncli.kernels.fused.interpreted", ("cpu",)),
    Kernel("compiled", "torch.compile of native", in_profile=True),
    Kernel("apex", "NVIDIA apex's groupbn", devices=("cuda",), in_profile=True),
    Kernel("inplace_abn", "mapillary's in-place activated batch norm", in_profile=True),
    Kernel("flag_gems", "FlagGems' Triton batch norm", devices=("cuda",), in_profile=True),
)

_NORMS = (
    Norm("batch", "BatchNorm", over_batch=True, channel_groups="every", has_kernels=True),
    Norm("layer", "LayerNorm", over_batch=False, channel_groups="one"),
    Norm("group", "GroupNorm", over_batch=False, channel_groups="given"),
    Norm("instance", "InstanceNorm", over_batch=False, channel_groups="every"),
)

_ACTIVATIONS = (
    Activation("sigmoid", "Sigmoid", in_recipe=True),
    Activation("tanh", "Tanh", in_recipe=True),
    Activation("relu", "ReLU", in_recipe=True, fused=True, kinked=True),
    Activation("leaky_relu", "LeakyReLU", in_recipe=True, fused=True, kinked=True, slope=0.01),
    Activation("gelu", "GELU", in_recipe=True),
    Activation("silu", "SiLU", fused=True),
)

KERNELS = {row.name: row for row in _KERNELS}
NORMS = {row.name: row for row in _NORMS}
ACTIVATIONS = {row.name: row for row in _ACTIVATIONS}

RECIPE_KERNELS = tuple(row.name for row in KERNELS.values() if row.in_recipe)
GRADCHECK_KERNELS = tuple(row.name for row in KERNELS.values() if row.module)
PROFILE_KERNELS = tuple(row.name for row in KERNELS.values() if row.in_profile)
RECIPE_ACTIVATIONS = tuple(row.name for row in ACTIVATIONS.values() if row.in_recipe)
FUSED_ACTIVATIONS = tuple(row.name for row in ACTIVATIONS.values() if row.fused)
KINKED_ACTIVATIONS = tuple(row.name for row in ACTIVATIONS.values() if row.kinked)
CHECKED_GROUPS = 2  # of the group norm that is checked and defined

# Types for pydantic and Typer, which read the choices at run time; a type checker, which cannot, sees strings.
if TYPE_CHECKING:
    RecipeKernel = str
    RecipeActivation = str
    NormName = str
else:
    RecipeKernel = Literal[RECIPE_KERNELS]
    RecipeActivation = Literal[RECIPE_ACTIVATIONS]
    NormName = Literal[tuple(NORMS)]


def check_kernel(name: str, known: Sequence[str], allow_code: bool) -> None:
    """Raises UsageError for a name that is none of `known`, and for the user's own code where it is not allowed."""
    if name in known:
        return
    if ":" not in name:
        import difflib  # which a right name need not wait for

        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected {', '.join(known)} or package.module:function"
        raise UsageError(f"there is no such kernel; {hint}", field="kernel", value=name)
    if not allow_code:
        raise UsageError(f"it is {CODE_OF_YOURS}", field="kernel", value=name, permission="allow_code")
