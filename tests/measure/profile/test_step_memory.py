"""Peak memory of a training step, and its parts."""

from __future__ import annotations

import torch

from bncli.measure.profile import step_memory
from bncli.measure.profile.step_models import RecipeModel
from bncli.measure.timing.fresh_process import FreshProcesses
from tests.conftest import tiny

CPU = torch.device("cpu")


def test_the_parts_of_memory_are_those_of_the_definition() -> None:
    recipe = tiny(optimizer={"kind": "adam", "lr": 0.1})
    subject = RecipeModel("tiny", recipe)
    trainable = subject.trainable("native", subject.dataset(CPU), CPU)
    x, y = trainable.batch()
    trainable.step(x, y)
    parts = step_memory.parts_of(trainable, lambda: trainable.step(x, y))
    values = 8 * 16 + 2 * 16 + 16 * 3 + 3  # linear without bias, norm, output
    batch = 20 * (8 + 16 + 16 + 3)  # x, before the norm, after the relu, log softmax
    saved = 4 * 16  # the batch's statistics and the running ones
    tensors = 5  # each with a step counter of its own
    assert parts["parameters_mib"] == parts["gradients_mib"] == values * 4 / 2**20
    assert parts["optimizer_mib"] == (2 * values + tensors) * 4 / 2**20
    assert parts["activations_mib"] == ((batch + saved + 1) * 4 + 20 * 8) / 2**20  # and y, and a count


def test_the_peak_of_a_fresh_process_holds_the_parts() -> None:
    recipe = tiny(model={"kind": "mlp", "hidden": [1500, 1500]}, optimizer={"kind": "adam", "lr": 0.1})
    subject = RecipeModel("tiny", recipe)
    dataset = subject.dataset(CPU)
    batch = subject.trainable("native", dataset, CPU).batch()
    with FreshProcesses(step_memory.warm_up) as processes:
        found = step_memory.measure(processes, subject, "native", batch, dataset.classes)
    parts = found.parameters_mib + found.gradients_mib + found.optimizer_mib + found.activations_mib
    assert found.parameters_mib > 8
    assert found.peak_mib is not None
    assert parts * 0.9 < found.peak_mib < 5 * parts + 100
