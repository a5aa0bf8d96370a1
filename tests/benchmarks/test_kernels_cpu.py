"""The kernel benchmark of the kernel in C: every section on small shapes, and the arithmetic of its verdicts."""

from __future__ import annotations

import json
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bncli import errors
from bncli.kernels import native
from bncli.kernels.fused import cpu
from bncli.measure.profile.candidates import Candidate
from bncli.measure.profile.kernels import means
from bncli.measure.profile.shapes import Calls
from bncli.measure.timing import clock as timing
from bncli.measure.timing import speedup
from bncli.measure.timing.clock import Deadline, Work
from bncli.results.environment import Environment, Interval
from bncli.results.profile import Case, Ceilings, KernelCost, KernelProfile, Times
from tests.benchmarks import (
    kernels,
    kernels_check,
    kernels_cpu_large,
    kernels_cpu_layers,
    kernels_cpu_small,
    kernels_cpu_step,
    kernels_environment,
)
from tests.benchmarks.kernels_pool import Pool
from tests.benchmarks.kernels_report import Report, between
from tests.benchmarks.kernels_sections import Run
from tests.benchmarks.kernels_speed import Target

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason()))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with timing.threads(1):
        yield


def run_into(report: Report, rounds: int = 6) -> Run:
    clock = timing.CpuClock(flush_bytes=2**16)
    return Run(report, CPU, clock, "fused", False, True, Pool(0, 10.0), rounds)


# --- the sections -------------------------------------------------------------------------------------------------


@needs_compiler
def test_correctness_and_small_tensors_run_by_command_and_keep_their_raw_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "all.json"
    given = ["--device", "cpu", "--quick", "--sections", "correctness,small", "--rounds", "3", "--json", str(file)]
    assert kernels.main(given) == errors.OK
    printed = capsys.readouterr().out
    assert "candidate  fused" in printed
    assert "0 wrong" in printed
    assert "threads    1 of" in printed
    found = json.loads(file.read_text())
    records = [record for record in found["records"] if record["kind"] == "small"]
    assert len(records) == len(kernels_cpu_small.SHAPES) * 4
    assert all(len(samples) == 3 for record in records for samples in record["samples_ms"].values())
    assert {target["name"] for target in found["targets"]} >= {"small, 60x100, module, forward + backward"}


@needs_compiler
def test_layers_give_a_row_a_case_and_targets_from_the_warm_run_alone(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(None)
    kernels_cpu_layers.layers(run_into(report), Deadline(120.0), [Calls((8, 4, 6, 6), 1), Calls((4, 8, 3, 3), 1)])
    printed = capsys.readouterr().out
    assert not report.failed
    rows = [line for line in printed.splitlines() if "of copy" in line]
    assert len(rows) == 2 * 2 * 3 * 2  # warm and cold, shapes, operations, layouts
    names = [target.name for _, target in report.targets]
    assert len(names) == len(set(names)) == 3 * (2 * 2 + 1)  # operations; mean and worst of each layout, mean of both
    assert all(target.value is not None and target.value > 0 for _, target in report.targets)
    assert "peak memory" not in printed
    assert {record["cold"] for record in report.records} == {True, False}


@needs_compiler
def test_a_large_tensor_is_held_to_a_copy_of_its_own_size(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(None)
    kernels_cpu_large.large(run_into(report), Deadline(120.0), (64, 16, 32, 32))
    assert [target.name for _, target in report.targets] == ["large, contiguous, share of copy"]
    assert "page faults a call" in capsys.readouterr().out
    assert not report.failed


@needs_compiler
def test_a_step_of_a_small_resnet_is_timed_in_both_layouts(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(None)
    data = {**kernels_cpu_step.DATA, "shape": [3, 8, 8], "examples": 16, "held_out": 4}
    kernels_cpu_step.step(run_into(report), Deadline(120.0), **{"data": data, "train.batch_size": 4})
    assert [target.name for _, target in report.targets] == [
        "resnet20 step, contiguous",
        "resnet20 step, channels_last",
    ]
    assert "batch 4: native" in capsys.readouterr().out
    assert not report.failed


def shifted(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, var = native.batch_norm(*given)
    return y + 0.25, mean, var


@needs_compiler
def test_no_speed_is_printed_for_a_wrong_kernel(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(kernels_check.CANDIDATES, "fused", shifted)
    report = Report(None)
    run = run_into(report)
    run.sources["fused"] = lambda case: Candidate(case, kernels_check.call_of("fused"))
    kernels_cpu_layers.layers(run, Deadline(120.0), [Calls((8, 4, 6, 6), 1)])
    kernels_cpu_large.large(run, Deadline(60.0), (8, 4, 6, 6))
    kernels_cpu_small.small(run, Deadline(60.0), [(6, 5)])
    printed = capsys.readouterr().out
    assert {check.claim for check in report.failed} == {"layers, fused", "large", "small"}
    assert " ms " not in printed
    assert "us a call" not in printed
    assert not any(target.value is not None for _, target in report.targets)


def test_shapes_of_a_file_are_left_to_the_profile() -> None:
    options = kernels.arguments(["--shapes", "own.csv"])
    with pytest.raises(errors.RecipeError, match=r"bncli profile --shapes own\.csv"):
        kernels.sections_of(options, kernels.CPU_SHARES)


# --- the arithmetic of the verdicts -------------------------------------------------------------------------------


def row(case: Case, kernel: str, ms: tuple[float, ...], native_ms: tuple[float, ...] | None = None) -> KernelCost:
    faster = None if native_ms is None else speedup.faster(native_ms, ms)
    return KernelCost(case, kernel, 1, None, both=Times(ms, 1e6, 1e6), faster=faster)


def profile_of(rows: list[KernelCost]) -> KernelProfile:
    nowhere = Environment("", "", "", "", "", "", None, 1, "")
    return KernelProfile(nowhere, False, 1.0, Ceilings(((2**28, 10.0),), None), tuple(rows), means(rows), (), len(rows))


def pair(shape: tuple[int, ...], layout: str, times_faster: float) -> list[KernelCost]:
    case = Case(shape, "bn+relu", "fp32", layout)
    own = (1.0, 2.0, 1.0, 2.0, 1.0, 2.0)
    base = tuple(times_faster * ms for ms in own)
    return [row(case, "native", base), row(case, "fused", own, base)]


def by_name(targets: list[Target]) -> dict[str, Target]:
    return {target.name: target for target in targets}


def test_a_mean_is_geometric_over_shapes_and_layouts_and_the_worst_shape_is_named() -> None:
    rows = [
        *pair((8, 4, 6, 6), "contiguous", 8.0),
        *pair((4, 8, 3, 3), "contiguous", 2.0),
        *pair((8, 4, 6, 6), "channels_last", 4.0),
        *pair((4, 8, 3, 3), "channels_last", 1.0),
    ]
    found = by_name(kernels_cpu_layers.targets(profile_of(rows)))
    assert found["bn+relu contiguous, mean"].value == pytest.approx(4.0)
    assert found["bn+relu channels_last, mean"].value == pytest.approx(2.0)
    assert found["bn+relu, both layouts, mean"].value == pytest.approx(8.0**0.5)
    assert [found[f"bn+relu {name}"].met for name in ("contiguous, mean", "channels_last, mean")] == [True, False]
    assert found["bn+relu contiguous, worst (4x8x3x3)"].met
    assert not found["bn+relu channels_last, worst (4x8x3x3)"].met


def test_the_limit_is_what_a_kernel_at_the_copys_speed_would_reach() -> None:
    profile = profile_of([*pair((8, 4, 6, 6), "contiguous", 8.0), *pair((4, 8, 3, 3), "contiguous", 2.0)])
    # 10^6 bytes at 10 GB/s are 0.1 ms; native takes 12 and 3 ms in the median
    assert kernels_cpu_layers.at_copy_speed(profile, profile.means[0]) == pytest.approx((120 * 30) ** 0.5)


def test_a_mean_that_lacks_a_shape_is_not_measured() -> None:
    missing = KernelCost(Case((4, 8, 3, 3), "bn+relu", "fp32"), "fused", 1, None, error="no time")
    found = by_name(kernels_cpu_layers.targets(profile_of([*pair((8, 4, 6, 6), "contiguous", 8.0), missing])))
    assert found["bn+relu contiguous, mean"].value is None
    assert found["bn+relu, both layouts, mean"].value is None
    assert not any(target.met for target in found.values())


def test_a_share_of_the_copy_is_the_floor_over_what_the_copy_moves_in_the_same_time() -> None:
    case = Case((8, 4, 6, 6), "bn+relu", "fp32")
    moved = 2 * case.tensor_bytes
    samples = {"copy": (2.0, 4.0, 2.0), "both": (5.0, 20.0, 10.0)}
    found = kernels_cpu_large.shares(case, "both", samples, moved)
    assert found.value == pytest.approx(0.5)  # of 1, 0.5 and 0.5: five tensors against the copy's two


def test_a_target_whose_interval_holds_it_is_in_doubt() -> None:
    assert Target("a", 1.1, 1.0, Interval(0.9, 1.3)).in_doubt
    assert Target("a", 1.1, 1.0, Interval(None, None)).in_doubt
    assert not Target("a", 1.1, 1.0, Interval(1.05, 1.3)).in_doubt
    assert not Target("a", 0.9, 1.0, Interval(0.8, 0.95)).in_doubt
    assert between(Interval(0.8, None)) == "[0.80, unknown]"


def test_a_target_that_was_measured_once_is_summed_up_with_its_interval(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(None)
    report.target("", [Target("speed", 0.9, 1.0, Interval(0.8, 1.1)), Target("size", 3.0, 2.0, Interval(2.5, 3.5))])
    report.target("", [Target("share", None, 1.0)])
    report.summary()
    printed = capsys.readouterr().out
    assert "[0.80, 1.10]  NOT MET, in doubt" in printed
    assert "[2.50, 3.50]  met\n" in printed
    assert "targets: 1 met, 2 missed or not measured" in printed


def test_a_shape_beyond_the_cache_is_twice_as_large_and_no_larger_than_memory_allows() -> None:
    shape = kernels_cpu_large.shape_beyond(2**25)
    assert 4 * torch.Size(shape).numel() >= 2**26
    assert 4 * torch.Size((shape[0] - 1, *shape[1:])).numel() < 2**26
    assert 4 * torch.Size(kernels_cpu_large.shape_beyond(2**40)).numel() < 1.01 * kernels_cpu_large.MOST_BYTES


# --- where it runs ------------------------------------------------------------------------------------------------


def test_the_last_cache_is_read_from_the_system_or_unknown(tmp_path: Path) -> None:
    for place, text in enumerate(("48K\n", "2048K\n", "30M\n")):
        (tmp_path / f"index{place}").mkdir()
        (tmp_path / f"index{place}" / "size").write_text(text)
    assert kernels_environment.last_cache_bytes(tmp_path) == 30 * 2**20
    assert kernels_environment.last_cache_bytes(tmp_path / "nowhere") is None


def test_what_other_programs_use_is_the_time_that_cores_were_neither_idle_nor_waiting() -> None:
    times = namedtuple("times", "user system idle iowait steal guest")
    same = times(100.0, 50.0, 1000.0, 20.0, 5.0, 30.0)
    assert kernels_environment.busy_cores(0.01, lambda: same) == 0.0
    readings = iter([same, times(100.0, 50.0, 1001.0, 21.0, 5.0, 30.0)])
    assert kernels_environment.busy_cores(0.01, lambda: next(readings)) == 0.0
    readings = iter([same, times(101.0, 51.0, 1000.0, 20.0, 6.0, 31.0)])
    assert 0 < kernels_environment.busy_cores(0.01, lambda: next(readings)) <= 3 / 0.01


def test_new_memory_faults_and_memory_that_is_held_does_not() -> None:
    held = torch.ones(2**22)
    fresh = kernels_cpu_large.page_faults(Work(lambda _: torch.ones(2**24)))
    assert kernels_cpu_large.page_faults(Work(lambda _: held.add_(1.0))) < fresh


@needs_compiler
def test_a_busy_machine_is_warned_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(kernels_environment, "busy_cores", lambda: 1.5)
    kernels.header(run_into(Report(None)))
    assert "WARNING    other programs use 1.5 of the" in capsys.readouterr().out
