"""A training step of ResNet-20 on a CPU, with each kernel; forward, backward, optimizer as `bncli train` has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bncli.measure.profile.budget import NATIVE
from bncli.measure.profile.step_models import RecipeModel
from bncli.measure.profile.steps import prepare, step_of
from bncli.measure.timing import clock as timing
from bncli.measure.timing import speedup
from bncli.measure.timing.clock import Deadline, Work
from bncli.recipe.load import load, with_values
from tests.benchmarks.kernels_check import Check
from tests.benchmarks.kernels_cpu_layers import LAYOUTS
from tests.benchmarks.kernels_report import faster, ms
from tests.benchmarks.kernels_sections import Run
from tests.benchmarks.kernels_speed import Target

RECIPE = Path(__file__).parents[2] / "recipes" / "cifar10.yaml"
AT_LEAST = 1.2
ROUNDS = 12
# Instead of the recipe's: random pictures of CIFAR-10's size, and float32, which a CPU trains in.
DATA = {"source": "synthetic", "shape": [3, 32, 32], "examples": 512, "held_out": 128}
VALUES: dict[str, Any] = {"data": DATA, "train.precision": "fp32", "norm": {"kind": "batch"}}


def subject_of(layout: str, **other_values: Any) -> RecipeModel:
    """The recipe's model, optimizer and batch size, in that memory format."""
    recipe = with_values(load(str(RECIPE)).base, {**VALUES, "train.memory_format": layout, **other_values})
    return RecipeModel(f"resnet20, {layout}", recipe)


def step(run: Run, deadline: Deadline, **other_values: Any) -> None:
    run.report.heading("ResNet-20, a training step: recipes/cifar10.yaml on random pictures, fp32")
    for place, layout in enumerate(LAYOUTS):
        subject = subject_of(layout, **other_values)
        _one_layout(run, subject, layout, Deadline(deadline.left_s / (len(LAYOUTS) - place)))


def _one_layout(run: Run, subject: RecipeModel, layout: str, deadline: Deadline) -> None:
    arms = prepare(subject, (NATIVE, run.candidate), subject.dataset(run.device), run.device)
    for arm in arms:
        if arm.error is None or arm.wrong:
            run.report.check([Check("resnet20", f"{layout}, {arm.kernel}", not arm.wrong, arm.error or "")])
        else:
            run.report.note(f"{subject.name}, {arm.kernel}: {arm.error}")
    steps = {arm.kernel: step_of(arm.trainable, "training", run.device) for arm in arms if arm.trainable is not None}
    if len(steps) < len(arms):
        return
    works = {str(kernel): Work(lambda _, step=one: step()) for kernel, one in steps.items()}  # type: ignore[misc]
    rounds = min(run.rounds, ROUNDS)
    samples = timing.interleaved(run.clock, works, rounds, deadline=deadline, fewest=speedup.FEWEST_ROUNDS)
    found = speedup.faster(samples[NATIVE], samples[run.candidate])
    run.report.record("resnet20", layout=layout, samples_ms=samples)
    times = ", ".join(f"{name} {ms(taken)}" for name, taken in samples.items())
    run.report.line(f"{layout:14} batch {subject.batch_size}: {times}  {faster(found)}  ({arms[-1].norms})")
    run.report.target("", [Target(f"resnet20 step, {layout}", found.value, AT_LEAST, found.interval)])
