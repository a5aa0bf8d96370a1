"""Training state: everything that changes while a run trains, saved and loaded as a whole."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from bncli.engine import data
from bncli.engine.data.splits import Batch, Dataset, Split, order
from bncli.engine.device import PeakMemory, synchronize
from bncli.engine.distributed import ALONE, Ranks
from bncli.engine.models import build, init
from bncli.engine.models.init import global_generators, restore_global_generators, stream
from bncli.engine.target import StepsToTarget
from bncli.engine.train.optim import optimizer, set_learning_rate
from bncli.engine.train.stacked import stack
from bncli.errors import DataError
from bncli.names import PROBES
from bncli.recipe.layers import shape_contradictions
from bncli.recipe.sections import BatchNorm, OwnModel, Recipe
from bncli.recipe.yaml import dotted
from bncli.results.serialize import from_plain
from bncli.results.train import Evaluation, ProbePoint, RunningStatistics, Status, Target

LSUV_EXAMPLES = 500
# Attributes that are saved as they are, and by their state_dict.
NUMBERS = ("step", "batches", "skipped", "evaluation_s", "checkpoint_s")
NOT_HELD = (torch.complex32, torch.complex128, torch.quint8, torch.qint8, torch.qint32)  # in safetensors files
PARTS = ("model", "optimizer", "scaler")


class Run:
    """What a run has of its own: its place among those that train together, its order of the data, its results so far.

    train_loss: of the last batch whose loss was read. status: None until it ends, for the reason of a divergence.
    """

    def __init__(self, index: int, recipe: Recipe, split: Split, batches: int = 0) -> None:
        """batches: taken from the data so far."""
        self.index, self.recipe = index, recipe
        generator = stream(recipe.train.seed, "order")
        self.order = order(len(split), recipe.train.batch_size, generator, split.index_device, start=batches)
        self.evaluations: list[Evaluation] = []
        self.best_evaluation: Evaluation | None = None
        target = recipe.train.target
        values = () if target is None else (target.value, *target.also)
        self.targets = [StepsToTarget(Target(target.metric, value)) for value in values if target]
        self.train_loss: float | None = None
        self.status: Status | None = None
        self.reason: str | None = None

    def record(self, evaluation: Evaluation) -> None:
        self.evaluations.append(evaluation)
        if self.best_evaluation is None or self._rank(evaluation) > self._rank(self.best_evaluation):
            self.best_evaluation = evaluation
        for target in self.targets:
            target.add(evaluation)

    def _rank(self, evaluation: Evaluation) -> float:
        """Larger is better by the target's metric, accuracy without a target; NaN is the worst."""
        metric = self.targets[0].target.metric if self.targets else "accuracy"
        value = evaluation.value(metric) * (1 if metric == "accuracy" else -1)
        return -math.inf if math.isnan(value) else value

    @property
    def reached(self) -> bool:
        """Whether the steps to every target are final."""
        return bool(self.targets) and all(target.steps is not None for target in self.targets)


class TrainState:
    """A run between two steps: its model, optimizer, random streams, position in the data, and results so far.

    A new state of the same recipe and data that loads `state_dict()` of another continues bit for bit.

    step: optimizer steps taken. batches: batches taken from the data; more than steps if the fp16 scaler skipped some.
    skipped: consecutive batches, up to now, whose step was skipped. runs: what each run has of its own.
    checkpoint_s: seconds spent in copying and saving weights and states. best: step and weights, on the CPU, of the
    best evaluation so far, where `keeps_best`. population: the buffers of the last evaluation (precise statistics).
    """

    def __init__(
        self, recipe: Recipe | Sequence[Recipe], dataset: Dataset, device: torch.device, ranks: Ranks = ALONE
    ) -> None:
        """recipe: one, whose model is trained as it is; or several, of runs whose models are stacked.

        Raises DataError for data that do not fit the recipe, and whatever `build` raises.
        """
        self.stacked = not isinstance(recipe, Recipe)
        recipes = [recipe] if isinstance(recipe, Recipe) else recipe
        self.recipe = recipe = recipes[0]  # for what the runs have in common
        train = recipe.train
        check_fit(recipe, dataset)
        self.dataset, self.device, self.ranks = dataset, device, ranks
        self.step = self.batches = self.skipped = 0
        self.augmentation = stream(train.seed, "augment")
        self.runs = [Run(index, each, dataset.train) for index, each in enumerate(recipes)]
        self._coming = self._batches_to_come()
        models = []
        for each in recipes:
            examples = partial(sample, dataset, each.train.seed, LSUV_EXAMPLES)
            models.append(build(each, dataset.shape, dataset.classes, examples, device))
        model = stack(models) if self.stacked else models[0]
        self.probes = Probes(recipe, model) if recipe.probes else None
        fuse(model, recipe)
        self.model: nn.Module = model.to(device, memory_format=data.MEMORY_FORMATS[train.memory_format])  # type: ignore[call-overload]
        self.parallel = self.model  # what trains it: with ranks, DistributedDataParallel
        rates = torch.tensor([each.optimizer.lr for each in recipes], device=device) if self.stacked else None
        self.optimizer = optimizer(recipe, self.model, rates)
        set_learning_rate(self.optimizer, recipe, 0)
        # The hook counts updates that the fp16 scaler did not skip, without a host sync.
        self.optimizer.register_step_post_hook(self._count_update)
        self.scaler = torch.amp.GradScaler(device.type, enabled=train.precision == "fp16")
        if train.compile:
            torch.compiler.reset()  # earlier runs of this process count towards the recompile limit
            self.model.compile(dynamic=False)
        begin_training(self.model)
        self.running_statistics: tuple[RunningStatistics, ...] | None = None
        self.evaluation_s = self.checkpoint_s = 0.0
        self.keeps_best = False
        self.best: tuple[int, dict[str, Tensor]] | None = None
        self.population: dict[str, Tensor] = {}
        self.clock = Clock(train.batch_size, device, runs=len(self.runs))
        self.memory = PeakMemory(device)  # read in evaluations, which do not count for the throughput

    def next_batch(self) -> Batch:
        """x (B, *shape) float32 and y (B,) int64, augmented, on the device; with a leading run axis of stacked runs.

        With ranks, it is this rank's part of the batch.
        """
        self.batches += 1
        if self.ranks.rank:  # other draws than rank 0's, whose generators alone are saved
            seed = init.stream_seed(self.recipe.train.seed, f"rank {self.ranks.rank}, batch {self.batches}")
            self.augmentation.manual_seed(seed)
            init.seed_global_generators(seed, self.device)
        x, y = next(self._coming)
        runs = len(self.runs)
        return (x.unflatten(0, (runs, -1)), y.view(runs, -1)) if self.stacked else (x, y)

    def keep(self, runs: list[Run]) -> None:
        """Go on with these runs alone."""
        kept = torch.tensor([self.runs.index(run) for run in runs], device=self.device)
        self.model.keep(kept)  # type: ignore[operator]
        self.optimizer.keep(kept)  # type: ignore[attr-defined]
        self.runs, self.clock.runs = runs, len(runs)
        self._coming = self._batches_to_come()

    def _count_update(self, *_: Any) -> None:
        self.step += 1
        self.skipped = 0

    def end(self, status: Status, indices: Collection[int] | None = None) -> None:
        """End the runs with those indices, or all of them."""
        for run in self.runs:
            if indices is None or run.index in indices:
                run.status = status

    def keep_weights(self) -> None:
        """Copy the weights if the last evaluation is the best, and in any case the statistics that are precise."""
        began, run = perf_counter(), self.runs[0]
        if self.running_statistics is not None:
            held = self.model.state_dict(keep_vars=True).items()
            self.population = copies({name: each for name, each in held if not isinstance(each, nn.Parameter)})
        if self.keeps_best and run.best_evaluation is run.evaluations[-1]:
            self.best = self.step, copies(self.model.state_dict())
            self.memory.end("saving")
        self.checkpoint_s += perf_counter() - began

    @property
    def phase(self) -> str:
        """What takes memory between the evaluations."""
        return "training" if self.step else "preparation"

    # --- saved and loaded -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that changes in training, as tensors (no copies, as in torch), numbers and text.

        Of a user's model, what is neither in its state_dict nor a buffer nor a flag of a module or parameter is not
        included.
        """
        model, kept, [run] = self.model, self.model.state_dict(), self.runs
        return {
            **{name: getattr(self, name) for name in NUMBERS},
            "train_loss": run.train_loss,
            **{name: getattr(self, name).state_dict() for name in PARTS},
            "buffers": {name: buffer for name, buffer in model.named_buffers() if name not in kept},
            "modes": [module.training for module in model.modules()],
            "trained": [parameter.requires_grad for parameter in model.parameters()],
            "best": self.best,
            "population": self.population,
            "augmentation": self.augmentation.get_state(),
            "global generators": global_generators(self.device),
            "evaluations": [asdict(evaluation) for evaluation in run.evaluations],
            "running statistics": self.running_statistics and [asdict(layer) for layer in self.running_statistics],
            "intervals": self.clock.so_far(self.step),
            "warm_ups": self.clock.warm_ups,
            "peak_memory_mib": dict(self.memory.mib),
            "probes": self.probes and self.probes.state_dict(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from a `state_dict()` of the same recipe, data and device; Python's and numpy's generators too."""
        for name in NUMBERS:
            setattr(self, name, saved[name])
        train_loss = saved["train_loss"]
        whole = type(self.step) is type(self.batches) is int and isinstance(train_loss, float | None)
        if not (whole and 0 <= self.step <= self.batches <= 51 * (self.step + 1)):  # of fp16, up to 50 are skipped
            raise ValueError("its step does not fit its place in the data, or its loss is none")
        for name in PARTS:
            getattr(self, name).load_state_dict(saved[name])
        for name, buffer in saved["buffers"].items():
            self.model.get_buffer(name).copy_(buffer)
        for module, training in zip(self.model.modules(), saved["modes"], strict=True):
            module.training = training
        for parameter, trained in zip(self.model.parameters(), saved["trained"], strict=True):
            parameter.requires_grad_(trained)
        self.best, self.population = saved["best"], saved["population"]
        self.runs = [run := Run(0, self.recipe, self.dataset.train, self.batches)]
        run.train_loss = train_loss
        for evaluation in saved["evaluations"]:
            run.record(from_plain(Evaluation, evaluation))
        layers = saved["running statistics"]
        self.running_statistics = layers and tuple(from_plain(RunningStatistics, layer) for layer in layers)
        intervals = [(int(steps), float(seconds)) for steps, seconds in saved["intervals"]]
        self.clock = Clock(self.recipe.train.batch_size, self.device, intervals=intervals)
        self.clock.warm_ups = [*saved["warm_ups"], len(intervals)]
        peaks = saved["peak_memory_mib"].items()
        self.memory.mib = {str(phase): None if mib is None else float(mib) for phase, mib in peaks}
        if self.probes:
            self.probes.load_state_dict(saved["probes"])
        self.augmentation.set_state(saved["augmentation"])
        self._coming = self._batches_to_come()
        restore_global_generators(saved["global generators"], self.device)
        self.memory.end("preparation")

    def _batches_to_come(self) -> Iterator[Batch]:
        orders = [run.order for run in self.runs]
        indices = map(torch.cat, zip(*orders, strict=True)) if self.stacked else orders[0]
        if self.ranks.count > 1:
            indices = (self.ranks.part(batch, self.recipe.train.accumulate) for batch in orders[0])
        return self.dataset.train.batches(indices, self.augmentation)


def check_fit(recipe: Recipe, dataset: Dataset) -> None:
    """Raises DataError for contradictions that only the loaded data reveal; the rest of a recipe is checked before."""
    for keys, text in shape_contradictions(recipe, dataset.shape, dataset.classes):
        raise DataError(f"{dotted(keys)}: {text}")


def can_hold(value: Any) -> bool:
    """Whether a safetensors file can hold an entry of a state_dict."""
    return isinstance(value, Tensor) and value.layout is torch.strided and value.dtype not in NOT_HELD


def copies(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """Those of a state_dict that a safetensors file can hold, copied to the CPU."""
    contiguous = torch.contiguous_format
    held = {name: each.detach() for name, each in tensors.items() if can_hold(each)}
    return {name: each.to("cpu", copy=True, memory_format=contiguous) for name, each in held.items()}


def sample(dataset: Dataset, seed: int, count: int) -> Tensor:
    """Random training examples (count, *shape) on the CPU; a file may be sorted by class."""
    split = dataset.train
    some = torch.randperm(len(split), generator=stream(seed, "sample"))[:count].to(split.index_device)
    return next(split.batches(iter([some]), stream(seed, "sample augment")))[0].cpu()


def fuse(model: nn.Module, recipe: Recipe) -> None:
    """Fuse activations and residual adds into the kernels of the batch norms of a recipe's model."""
    if isinstance(recipe.norm, BatchNorm) and recipe.norm.kernel != "native" and not isinstance(recipe.model, OwnModel):
        from bncli.engine.convert import convert  # which loads torch.fx

        convert(model, recipe.norm.kernel, sync=recipe.norm.sync)


def begin_training(model: nn.Module) -> None:
    """Call `train` where a user's class overrides it, for example to keep norms frozen.

    Modules that are in evaluation mode stay in it.
    """
    flags = [(module, module.training) for module in model.modules()]
    for module, training in flags:
        if training and type(module).train is not nn.Module.train:
            module.train()
    for module, training in flags:
        if not training and module.training:
            module.eval()


class Probes:
    """What a run keeps for its probes, on the CPU, so that it takes none of a GPU's memory while the run trains.

    points: all so far. seconds: spent on them. first, last: sorted inputs (units, m) of each nonlinearity at the first
    and at the last of its probings.
    """

    def __init__(self, recipe: Recipe, model: nn.Module) -> None:
        """model: as built, on the CPU, before activations and residual adds are fused into its norms."""
        assert recipe.probes is not None
        self.section = recipe.probes
        # A user's model may change while it trains, so it is copied each time.
        self.copy = None if isinstance(recipe.model, OwnModel) else copy.deepcopy(model)
        self.points: list[ProbePoint] = []
        self.seconds = 0.0
        self.first: dict[str, Tensor] = {}
        self.last: dict[str, Tensor] = {}

    @property
    def measures(self) -> tuple[str, ...]:
        return PROBES if "all" in self.section.measure else self.section.measure

    @property
    def last_step(self) -> int:
        """The step of the last probing, -1 before the first."""
        return self.points[-1].step if self.points else -1

    def state_dict(self) -> dict[str, Any]:
        points = [asdict(point) for point in self.points]
        return {"points": points, "probes_s": self.seconds, "first": dict(self.first), "last": dict(self.last)}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.points = [from_plain(ProbePoint, point) for point in saved["points"]]
        self.seconds, self.first, self.last = saved["probes_s"], dict(saved["first"]), dict(saved["last"])


@dataclass
class Clock:
    """Training time without evaluations.

    warm_ups: the intervals of lazy initialization and compilation, the first of each process that a run is trained in.
    """

    batch_size: int
    device: torch.device
    now: Callable[[], float] = perf_counter
    runs: int = 1  # that share the time
    intervals: list[tuple[int, float]] = field(default_factory=list)  # steps, seconds
    warm_ups: list[int] = field(default_factory=lambda: [0])
    _started: float | None = None

    def start(self) -> None:
        """Go on, if it is paused."""
        if self._started is None:
            self._started = self.now()

    def pause(self, step: int) -> None:
        self.intervals = self.so_far(step)
        self._started = None

    def so_far(self, step: int) -> list[tuple[int, float]]:
        """The intervals, including the open one up to that step."""
        steps = step - self._measured_steps
        if self._started is None or not steps:
            return list(self.intervals)
        synchronize(self.device)
        return [*self.intervals, (steps, (self.now() - self._started) / self.runs)]

    @property
    def _measured_steps(self) -> int:
        return sum(steps for steps, _ in self.intervals)

    @property
    def training_s(self) -> float:
        return sum(seconds for _, seconds in self.intervals)

    def ms_per_step(self) -> float | None:
        later = [each for number, each in enumerate(self.intervals) if number not in self.warm_ups]
        measured = later or self.intervals
        steps = sum(count for count, _ in measured)
        return 1e3 * sum(seconds for _, seconds in measured) / steps if steps else None

    def samples_per_s(self, step: int) -> float:
        """Throughput of the open interval, for the progress bar."""
        seconds = self.now() - self._started if self._started is not None else 0.0
        return (step - self._measured_steps) * self.batch_size / seconds if seconds > 0 else 0.0
