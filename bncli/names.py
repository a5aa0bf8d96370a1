"""Names of kernels, norms, activations, probes and measures: one table each, from which the recipe's schema, the
command line's choices, the modules and the checks are read. No torch.
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
    module: str = ""  # with its batch_norm and unavailable_reason; empty for those that measure makes
    devices: tuple[str, ...] = ()  # torch's device types that it is written for; empty: all of them
    in_recipe: bool = False
    in_gradcheck: bool = False  # besides those with a module
    in_profile: bool = False


# --- norms ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Norm:
    """A normalization of (N, C, *S), described by the values that share a mean."""

    name: str
    section: str  # class of bncli.recipe.sections
    over_batch: bool  # a mean is taken over all N examples, and evaluation uses running statistics
    channel_groups: Literal["one", "given", "every", "none"]  # that a mean is taken over; none: it takes no mean
    has_kernels: bool = False  # bncli has kernels of its own for it; else torch's operator alone
    # The channels of a group share a covariance instead of having a variance each; they are multiplied by its inverse
    # square root, exact or of a number of Newton steps.
    whitens: Literal["exactly", "by steps"] | None = None
    checked: bool = False  # gradcheck can check it: bncli.kernels.definition has its definition
    cancels_scale: bool = True  # it divides by a measure of its own input, whose scale then has no effect
    bias_is_dead: bool = False  # it subtracts each channel's mean, so a bias in front of it has no effect
    vectors: int = 2  # (C) each, parameters of an affine one: weight and bias
    scalars: int = 0  # its other parameters

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes whose results differ."""
        return ("train", "eval") if self.over_batch else ("train",)

    @property
    def has_running_variance(self) -> bool:
        """Whether evaluation normalizes by a running mean and variance (C), which a kernel's signature has."""
        return self.over_batch and not self.whitens

    def covariance_channels(self, given: int) -> int:
        """k: how many channels share a covariance. given: the group size of a norm that whitens."""
        return given if self.whitens else 1

    def groups(self, channels: int, given: int) -> int:
        """Into how many groups the channels are divided. given: the number of a norm that takes one."""
        return {"one": 1, "given": given, "every": channels, "none": 1}[self.channel_groups]

    def values_per_mean(self, shape: Sequence[int], given: int) -> int:
        """m: how many values of (N, C, *S) one mean is taken over; 0 where none is."""
        examples, channels, *positions = shape
        if self.channel_groups == "none":
            return 0
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


# --- probes and measures ----------------------------------------------------------------------------------------------

Compared = Literal["ratio", "difference"]  # how two arms are compared; a value that can be zero takes the difference


@dataclass(frozen=True)
class Measure:
    """A number of a run that a claim can be about. A probe's value is named `probe.value`."""

    name: str
    help: str
    compared: Compared = "ratio"
    per_layer: bool = False  # measured at each layer; a claim takes the mean over layers where it names none
    activations: tuple[str, ...] = ()  # after which it has a value; empty: after all
    norm: Literal["any", "cancels scale"] | None = None  # without which it has no value, or none to compare

    @property
    def probe(self) -> str | None:
        """The probe that measures it, or None for a measure that every run has."""
        return self.name.split(".")[0] if "." in self.name else None


# --- the tables -------------------------------------------------------------------------------------------------------

_KERNELS = (
    Kernel("native", "torch's own", "bncli.kernels.native", in_recipe=True, in_profile=True),
    Kernel("fused", "ours", "bncli.kernels.fused", ("cpu", "cuda"), in_recipe=True, in_profile=True),
    Kernel("fused-interpreted", "the GPU's, in Triton's interpreter", "bncli.kernels.fused.interpreted", ("cpu",)),
    Kernel("compiled", "torch.compile of native", in_gradcheck=True, in_profile=True),
    Kernel("apex", "NVIDIA apex's groupbn", devices=("cuda",), in_profile=True),
    Kernel("inplace_abn", "mapillary's in-place activated batch norm", in_profile=True),
    Kernel("flag_gems", "FlagGems' Triton batch norm", devices=("cuda",), in_profile=True),
)

_NORMS = (
    Norm("batch", "BatchNorm", True, "every", has_kernels=True, checked=True, bias_is_dead=True),
    Norm("layer", "LayerNorm", over_batch=False, channel_groups="one", checked=True),
    Norm("group", "GroupNorm", over_batch=False, channel_groups="given", checked=True),
    Norm("instance", "InstanceNorm", over_batch=False, channel_groups="every", checked=True, bias_is_dead=True),
    Norm("whiten", "Whiten", True, "every", checked=True, bias_is_dead=True, whitens="exactly"),
    Norm("iternorm", "IterNorm", True, "every", checked=True, bias_is_dead=True, whitens="by steps"),
    Norm("ghost", "GhostBatchNorm", over_batch=True, channel_groups="every", bias_is_dead=True),
    Norm("renorm", "BatchRenorm", over_batch=True, channel_groups="every", bias_is_dead=True),
    Norm("noisy", "NoisyBatchNorm", over_batch=True, channel_groups="every", bias_is_dead=True),
    Norm("frozen", "FrozenBatchNorm", over_batch=True, channel_groups="every", cancels_scale=False),
    Norm("rms", "RMSNorm", over_batch=False, channel_groups="one", vectors=1),
    Norm("dyt", "DynamicTanh", over_batch=False, channel_groups="none", cancels_scale=False, scalars=1),
)

_ACTIVATIONS = (
    Activation("sigmoid", "Sigmoid", in_recipe=True),
    Activation("tanh", "Tanh", in_recipe=True),
    Activation("relu", "ReLU", in_recipe=True, fused=True, kinked=True),
    Activation("leaky_relu", "LeakyReLU", in_recipe=True, fused=True, kinked=True, slope=0.01),
    Activation("gelu", "GELU", in_recipe=True),
    Activation("silu", "SiLU", fused=True),
)

_MEASURES = (
    Measure("steps_to_target", "optimizer steps spent below the target"),
    Measure("seconds_to_target", "seconds of training to the target"),
    Measure("examples_to_target", "training examples seen on the way to the target"),
    Measure("final", "the target's metric at the end: median of the last evaluations", "difference"),
    Measure("best", "best value of the target's metric", "difference"),
    Measure("largest_learning_rate", "largest rate at which the arm trains, and at the rates below it too"),
    Measure(
        "inputs.drift", "Wasserstein-1 distance of a unit's inputs to the last point, in deviations", per_layer=True
    ),
    Measure("inputs.drift_from_start", "the same to the inputs before training", per_layer=True),
    Measure("inputs.location", "change of the mean since the last point, in deviations", per_layer=True),
    Measure("inputs.scale", "change of the deviation since the last point, in deviations", per_layer=True),
    Measure("inputs.shape", "the drift that is left with mean and deviation equal", per_layer=True),
    Measure(
        "saturation.share",
        "outputs with a derivative under 5 % of its maximum",
        "difference",
        per_layer=True,
        activations=("sigmoid", "tanh"),
    ),
    Measure(
        "saturation.dead",
        "units with a zero derivative on all examples",
        "difference",
        per_layer=True,
        activations=("relu",),
    ),
    Measure("gradients.norm", "norm of a layer's weight gradient", per_layer=True),
    Measure("gradients.first_over_last", "norm of the first layer's weight gradient over the last's"),
    Measure("gradients.noise", "share of the gradient's mean square that varies between batches", per_layer=True),
    Measure("shift.distance", "internal covariate shift: norm of G - G' over the norm of G", per_layer=True),
    Measure("shift.cosine", "cosine of G and G'", "difference", per_layer=True),
    Measure("landscape.loss_range", "largest less smallest loss along the gradient"),
    Measure("landscape.predictiveness", "largest distance of a gradient along the step to the gradient before it"),
    Measure("landscape.smoothness", "effective beta-smoothness: the largest such distance over the step's length"),
    Measure(
        "regularization.logit_variance",
        "variance of an example's logits over random batches, in training mode",
        "difference",
    ),
    Measure("regularization.gap", "held-out loss less training loss, in evaluation mode", "difference"),
    Measure("regularization.held_out_loss", "held-out loss, in evaluation mode"),
    Measure("regularization.training_loss", "loss of training examples, in evaluation mode"),
    Measure(
        "whitening.diagonal",
        "covariance less identity: diagonal part, Frobenius norm per feature",
        per_layer=True,
        norm="any",
    ),
    Measure("whitening.off_diagonal", "covariance less identity: the other part", per_layer=True, norm="any"),
    Measure("scale.norm", "norm of a layer's weight", per_layer=True),
    Measure(
        "scale.effective_learning_rate",
        "learning rate over the squared norm of a normalized weight",
        per_layer=True,
        norm="cancels scale",
    ),
)

KERNELS = {row.name: row for row in _KERNELS}
NORMS = {row.name: row for row in _NORMS}
ACTIVATIONS = {row.name: row for row in _ACTIVATIONS}
MEASURES = {row.name: row for row in _MEASURES}
PROBES = tuple(dict.fromkeys(row.probe for row in _MEASURES if row.probe))
PROBE_CHOICES = ("all", *PROBES)

RECIPE_KERNELS = tuple(row.name for row in KERNELS.values() if row.in_recipe)
GRADCHECK_KERNELS = tuple(row.name for row in KERNELS.values() if row.module or row.in_gradcheck)
PROFILE_KERNELS = tuple(row.name for row in KERNELS.values() if row.in_profile)
RECIPE_ACTIVATIONS = tuple(row.name for row in ACTIVATIONS.values() if row.in_recipe)
FUSED_ACTIVATIONS = tuple(row.name for row in ACTIVATIONS.values() if row.fused)
KINKED_ACTIVATIONS = tuple(row.name for row in ACTIVATIONS.values() if row.kinked)
CHECKED_NORMS = tuple(row.name for row in NORMS.values() if row.checked)
CHECKED_GROUPS = 2  # of the group norm that is checked and defined
CHECKED_GROUP_SIZE = 2  # channels that share a covariance, of the whitening norms that are checked and defined
CHECKED_NEWTON_STEPS = 5

# Types for pydantic and Typer, which read the choices at run time; a type checker, which cannot, sees strings.
if TYPE_CHECKING:
    RecipeKernel = str
    RecipeActivation = str
    NormName = str
    ProbeName = str
    MeasureName = str
else:
    RecipeKernel = Literal[RECIPE_KERNELS]
    RecipeActivation = Literal[RECIPE_ACTIVATIONS]
    NormName = Literal[CHECKED_NORMS]
    ProbeName = Literal[PROBE_CHOICES]
    MeasureName = Literal[tuple(MEASURES)]


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
