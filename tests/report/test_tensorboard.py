"""The files that TensorBoard reads, read back."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from bncli.errors import FileError
from bncli.report.tensorboard import TensorBoard, check_installed
from bncli.results.train import Evaluated, Evaluation, Probed, ProbePoint, StepDone

PERCENTILES = [float(value) for value in range(-50, 51)]


def read(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"histograms": 0, "scalars": 0})
    found.Reload()
    return found


def written(folder: Path, *events: Any) -> Any:
    pytest.importorskip("tensorboard")
    sink = TensorBoard(folder)
    for event in events:
        sink(event)
    return read(folder)


def test_the_figures_of_a_run_are_scalars_by_step(tmp_path: Path) -> None:
    found = written(
        tmp_path,
        StepDone(20, 0.75, 0.1, 1e4, None),
        Evaluated(Evaluation(20, 0.5, 1.25, 0.75), 0.1),
        StepDone(40, 0.5, 0.1, 2e4, 64.0),
    )
    at = {tag: [(each.step, each.value) for each in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    assert at["training/loss"] == [(20, 0.75), (40, 0.5)]
    assert at["training/samples_per_s"] == [(20, 1e4), (40, 2e4)]
    assert at["training/memory_mib"] == [(40, 64.0)]
    assert at["training/learning_rate"] == [(20, pytest.approx(0.1)), (40, pytest.approx(0.1))]
    assert (at["held out/accuracy"], at["held out/loss"]) == ([(20, 0.5)], [(20, 1.25)])
    assert len(at) == 6


def test_what_the_probes_measured_are_scalars_of_a_layer_and_histograms_of_its_inputs(tmp_path: Path) -> None:
    points = (ProbePoint("inputs", "act", 5, {"p50": 0.5}), ProbePoint("landscape", None, 5, {"smoothness": 2.0}))
    distributions = {"act": PERCENTILES, "lost": [float("nan")] * 101}
    found = written(tmp_path, Probed(points, 0.1, distributions))
    assert [each.value for each in found.Scalars("inputs.p50/act")] == [0.5]
    assert [each.value for each in found.Scalars("landscape.smoothness/network")] == [2.0]
    assert found.Tags()["histograms"] == ["inputs/act"]
    (histogram,) = found.Histograms("inputs/act")
    value = histogram.histogram_value
    assert (histogram.step, value.num, value.min, value.max) == (5, 101, -50, 50)
    assert sum(value.bucket) == 101


def test_the_figures_of_an_earlier_run_are_kept_and_hidden(tmp_path: Path) -> None:
    written(tmp_path, StepDone(20, 0.75, 0.1, 1e4, None))
    (earlier,) = tmp_path.iterdir()
    earlier = earlier.rename(tmp_path / earlier.name.replace("tfevents.", "tfevents.0", 1))  # as if a second before
    found = written(tmp_path, StepDone(30, 0.5, 0.1, 1e4, None))
    assert [each.step for each in found.Scalars("training/loss")] == [30]
    assert earlier.exists()


def test_without_the_package_the_error_says_how_to_install_it() -> None:
    with mock.patch.dict(sys.modules, {"tensorboard": None}), pytest.raises(FileError, match="pip install tensorboard"):
        check_installed()
